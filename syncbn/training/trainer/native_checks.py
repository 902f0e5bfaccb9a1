"""`data.size=native`: checks at start that a network can train on images of different sizes, side by side."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from syncbn.nn.lockstep import forward_together
from syncbn.nn.modes import evaluating
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.loading import NATIVE, DecodedConfig
from syncbn.training.config.schema import Config

_LARGEST = 256  # pixels of each side of the images that are tried
_TOLERANCE = 1e-6  # of the largest number that is compared; float64, whose rounding is far below
_REMEDY = (
    "samples have to meet in batch normalization layers alone (activation checkpointing calls them again, F.batch_norm"
    " is none); use data.size=[HEIGHT,WIDTH]"
)


def check(config: Config) -> None:
    """Checks the keys beside `data.size=native`.

    Raises:
        ConfigError: one that images of different sizes do not go with; the message names it and the remedy.
    """
    if not isinstance(config.data, DecodedConfig) or config.data.size != NATIVE:
        return
    for key, asks, wanted in (
        ("compile", config.compile is not False, "compile=false"),
        ("graph", config.graph, "graph=false"),
        ("bn.virtual_ranks", config.bn.virtual_ranks is not None, "bn.virtual_ranks=null"),
    ):
        if asks:
            raise ConfigError(f"{key}: goes without data.size=native, where every step has other sizes; set {wanted},"
                              " or data.size=[HEIGHT,WIDTH]")  # fmt: skip


def check_network(model: nn.Module, images: Tensor) -> None:
    """Checks that samples meet in batch normalizations alone, by what the network does with two images of one size.

    As one batch and side by side (see `nn.lockstep`), outputs, gradients and running statistics have to be the same to
    rounding. A copy of the model computes in float64; the model does not change. If layers synchronize, a collective.

    Args:
        images: (N, C, H, W), of which the first is used.

    Raises:
        ConfigError: they differ; the message names the largest difference.
    """
    first = images[:1, :, :_LARGEST, :_LARGEST].to(torch.float64)
    batch = torch.cat([first, 0.5 * first.flip(-1) + 1.0])
    together = _results(model, [batch])
    try:
        apart = _results(model, [batch[:1], batch[1:]])
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"data.size=native: two images cannot go through the model side by side ({reason});"
                          f" {_REMEDY}") from None  # fmt: skip
    for what, expected in together.items():
        scale = float(expected.abs().max().clamp(min=1e-3)) if expected.numel() else 1.0
        difference = float((expected - apart[what]).abs().max()) / scale if expected.numel() else 0.0
        if not difference <= _TOLERANCE:
            raise ConfigError(
                f"data.size=native: {what} of two images differ by {difference:.1e} between one batch and the same"
                f" images side by side; {_REMEDY}"
            )


def _results(model: nn.Module, parts: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a training step with all that draws random numbers in evaluation mode."""
    worker = copy.deepcopy(model).to(torch.float64)
    layers = [layer for layer in worker.modules() if isinstance(layer, _NormBase)]
    with evaluating(worker, but=layers):
        outputs = forward_together(worker, parts)
        if not all(isinstance(output, Tensor) for output in outputs):
            return {}  # the loss alone knows what they are
        joined = torch.cat(outputs)
        if joined.requires_grad:
            (joined * joined.detach().cos()).sum().backward()
    found = {"the outputs": joined.detach()}
    found |= {
        f"the gradients of {name}": parameter.grad
        for name, parameter in worker.named_parameters()
        if parameter.grad is not None
    }
    return found | {f"the values of {name}": buffer.double() for name, buffer in worker.named_buffers()}
