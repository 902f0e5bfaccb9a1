"""`memory="lean"`: what normalization made of its input, from its output.

The output is kept by whatever comes next (a convolution, a linear layer) anyway. So a layer that keeps its output and
not its input adds nothing, and its backward pass asks for no more than xhat = (z - bias) / weight, where z is the
output taken back through the activation. The existing operators do the rest: `normalize` with the bias as the mean and
1 / weight as the inverse standard deviation is this formula, and a backward pass over xhat is one over an input of mean
0 and deviation 1.

What it costs in accuracy. The output was rounded, by u |z| (u is half the distance from 1 to the next number of the
type), and to divide by the weight makes u |bias / weight| of it: with

    r = (|bias| + smallest) / |weight|,     |error of xhat| <= 4 u (|xhat| + r + 4)

where xhat is what the layer's statistics make of the input, and `smallest` is the smallest normal number (over the
slope, behind a leaky ReLU). That is what the rounding of an input costs whose mean lies r standard deviations from 0.
Where r is large the output does not tell; a weight of 0 loses everything. Of such channels the input is kept as well:

* On CPU: of all with r > 4, however many, for the host can look. No weight, then, makes the bound worse than r = 4.
* On other devices, and in compiled code, the host must not wait for the weights, and sizes must not depend on them: of
  the C/8 channels with the largest r, whatever it is. That r of any other exceeds 1 / sqrt(u), where half of the digits
  are gone, is an error, asserted on the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn import torch_compat
from syncbn.kernels import operators
from syncbn.kernels.activations import LEAKY_SLOPE

INVERTIBLE_ACTIVATIONS = (None, "leaky_relu")
_MAX_CONDITION = 4.0
_KEPT_SHARE = 8


def check_lean(activation: str | None, mask: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Rejects what the output of a layer does not tell the input of.

    Raises:
        ValueError: the name of the activation, a mask, or a residual.
    """
    if activation not in INVERTIBLE_ACTIVATIONS:
        raise ValueError(
            f'memory="lean" keeps the output, which does not tell what went into {activation!r}; the activation has to'
            ' be None or "leaky_relu"'
        )
    for name, value in (("a residual", residual), ("a mask", mask)):
        if value is not None:
            raise ValueError(
                f'memory="lean" keeps the output, which does not tell the input where there is {name}; set the layer\'s'
                ' memory to "default"'
            )


def conditions(weight: Tensor | None, bias: Tensor | None, activation: str | None, dtype: torch.dtype) -> Tensor | None:
    """r of each channel, (C,) float64; NaN for parameters that are not numbers; None without weight and bias.

    Args:
        dtype: of the activations.
    """
    smallest = torch.finfo(dtype).tiny / (1.0 if activation is None else LEAKY_SLOPE)
    size, offset = (None if vector is None else vector.detach().to(torch.float64).abs() for vector in (weight, bias))
    if size is None:
        return None if offset is None else offset + smallest
    return (smallest if offset is None else offset + smallest) / size


def channels_to_keep(
    weight: Tensor | None, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> Tensor | None:
    """The indices of the channels whose input has to be kept; None for none."""
    found = conditions(weight, bias, activation, dtype)
    if found is None:
        return None
    if found.device.type == "cpu" and not torch.compiler.is_compiling():
        index = (~(found <= _MAX_CONDITION)).nonzero().view(-1)
        return index if index.numel() else None
    return _worst(found, dtype)


def budget(num_channels: int) -> int:
    """Of how many channels the input is kept where the host must not look."""
    return max(1, num_channels // _KEPT_SHARE)


def limit(dtype: torch.dtype) -> float:
    """The largest r of any other channel there."""
    return math.sqrt(2.0 / torch.finfo(dtype).eps)


def are_too_many(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether there are more channels beyond the limit than the budget has, a bool without dimensions."""
    return (found > limit(dtype)).sum() > budget(found.numel())


def _worst(found: Tensor, dtype: torch.dtype) -> Tensor:
    torch_compat.assert_on_device(
        ~are_too_many(found, dtype),
        'SyncBatchNorm(memory="lean"): weights of too many channels are 0, or too small against the bias, to tell the'
        ' input from the output; use memory="default" for this layer',
    )
    return found.argsort(descending=True)[: budget(found.numel())]  # NaN first


def restore(
    output: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    index: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    """xhat, of the shape, type and layout of `output`.

    Args:
        index: of `channels_to_keep`.
        kept: the input of these channels.
    """
    z = output if activation is None else F.leaky_relu(output, 1.0 / LEAKY_SLOPE)  # a leaky ReLU too
    inverse = torch.ones_like(invstd) if weight is None else weight.to(invstd.dtype).reciprocal()
    offset = torch.zeros_like(mean)
    if bias is not None:
        offset[0] = bias
    if index is None or kept is None:
        return operators.normalize(z, offset, inverse, None, None)
    inverse.index_fill_(0, index, 1.0)  # nothing that is infinite, which would make it slow
    offset.index_fill_(1, index, 0.0)
    xhat = operators.normalize(z, offset, inverse, None, None)
    part = operators.normalize(kept, mean.index_select(1, index), invstd.index_select(0, index), None, None)
    return xhat.index_copy_(1, index, part)
