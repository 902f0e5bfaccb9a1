"""`memory="lean"`: backward recovers the normalized input from the output, so that the input need not be saved.

The next layer (a convolution, a linear layer) saves its own input, which is this layer's output, anyway. So a layer
that saves its output instead of its input takes no further memory. Its backward pass needs only xhat = (z - bias) /
weight, where z is the output with the activation inverted. The existing operators compute it: `normalize` with the bias
as the mean and 1 / weight as the inverse standard deviation is this formula, and the backward pass in terms of xhat is
that of an input with mean 0 and standard deviation 1.

Accuracy: the output carries a rounding error of u |z| (u is half the distance from 1 to the next number of the type).
Division by the weight makes it u |z / weight|, which is at most u (|xhat| + |bias / weight|). With

    r = (|bias| + smallest) / |weight|,     |error of xhat| <= 4 u (|xhat| + r + 4)

where xhat is the exact normalized input, and `smallest` is the smallest normal number of the type (divided by the slope
for a leaky ReLU). The rounding of an input whose mean lies r standard deviations from 0 has the same effect. Where r is
large, xhat cannot be recovered from the output (with a weight of 0 not at all), so the input is saved as well:

* On CPU, for all channels with r > 4, however many there are: the host can read the weights. Hence no weight makes the
  bound worse than it is for r = 4.
* On other devices, and in compiled code, the host must not wait for the weights, and sizes must not depend on them.
  There it is saved for the C/8 channels with the largest r, whatever their r is. If r of any other channel exceeds
  1 / sqrt(u), where half of the digits are lost, an assertion on the device fails.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn import torch_compat
from syncbn.kernels import operators
from syncbn.kernels.activations import LEAKY_SLOPE

INVERTIBLE_ACTIVATIONS = (None, "leaky_relu")
_MAX_CONDITION = 4.0  # r above which the input of a channel is saved, on CPU
_KEPT_SHARE = 8  # elsewhere one in so many channels has its input saved


def check_lean(activation: str | None, mask: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Rejects layers and calls whose input cannot be recovered from their output.

    Raises:
        ValueError: an activation that is not invertible, a mask, or a residual.
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
    """r of each channel (see the module docstring), (C,) float64; None without weight and bias.

    It is NaN where weight or bias is NaN.

    Args:
        dtype: type of the input and output.
    """
    smallest = torch.finfo(dtype).tiny / (1.0 if activation is None else LEAKY_SLOPE)
    size, offset = (None if vector is None else vector.detach().to(torch.float64).abs() for vector in (weight, bias))
    if size is None:
        return None if offset is None else offset + smallest
    return (smallest if offset is None else offset + smallest) / size


def channels_to_keep(
    weight: Tensor | None, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> Tensor | None:
    """Indices of the channels whose input has to be saved; None for none."""
    found = conditions(weight, bias, activation, dtype)
    if found is None:
        return None
    if found.device.type == "cpu" and not torch.compiler.is_compiling():
        index = (~(found <= _MAX_CONDITION)).nonzero().view(-1)
        return index if index.numel() else None
    return _worst(found, dtype)


def budget(num_channels: int) -> int:
    """Number of channels whose input is saved where the host must not read the weights."""
    return max(1, num_channels // _KEPT_SHARE)


def limit(dtype: torch.dtype) -> float:
    """The largest r that is allowed there for a channel whose input is not saved: 1 / sqrt(u)."""
    return math.sqrt(2.0 / torch.finfo(dtype).eps)


def are_too_many(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether r exceeds `limit` in more channels than `budget` allows; a bool tensor without dimensions.

    Args:
        found: r of each channel, from `conditions`.
    """
    return (found > limit(dtype)).sum() > budget(found.numel())


def _worst(found: Tensor, dtype: torch.dtype) -> Tensor:
    torch_compat.assert_on_device(
        ~are_too_many(found, dtype),
        'SyncBatchNorm(memory="lean"): weights of too many channels are 0, or too small against the bias, to tell the'
        ' input from the output; use memory="default" for this layer',
    )
    return found.argsort(descending=True)[: budget(found.numel())]  # NaN sorts first


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
    """Recovers xhat, in the shape, type and layout of `output`.

    Args:
        index: the result of `channels_to_keep`.
        kept: the saved input of these channels, (N, len(index), ...).
    """
    # The inverse of a leaky ReLU is one of slope 1 / LEAKY_SLOPE.
    z = output if activation is None else F.leaky_relu(output, 1.0 / LEAKY_SLOPE)
    inverse = torch.ones_like(invstd) if weight is None else weight.to(invstd.dtype).reciprocal()
    offset = torch.zeros_like(mean)
    if bias is not None:
        offset[0] = bias
    if index is None or kept is None:
        return operators.normalize(z, offset, inverse, None, None)
    inverse.index_fill_(0, index, 1.0)  # a placeholder: 1 / 0 is infinite, which is slow
    offset.index_fill_(1, index, 0.0)
    xhat = operators.normalize(z, offset, inverse, None, None)
    part = operators.normalize(kept, mean.index_select(1, index), invstd.index_select(0, index), None, None)
    return xhat.index_copy_(1, index, part)
