"""What keeps frozen running statistics as they are when other code resets them, and who else could write them.

`forward` leaves frozen statistics alone by itself. Code that gathers statistics anew (`update_bn` of
`torch.optim.swa_utils`, the weight averaging of Lightning) resets them first, by a method or by assignment.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from syncbn.nn.rank_checks import name_of
from syncbn.torch_compat import is_replica

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_COUNTER = "_counter_when_frozen"  # attribute of a layer with frozen statistics: a copy of its batch counter


def remember_counter(layer: nn.Module) -> None:
    """Keeps a copy of the counter: `layer.num_batches_tracked *= 0` writes before it assigns, unlike the others."""
    counter = layer._buffers.get("num_batches_tracked")
    layer.__dict__[_COUNTER] = None if counter is None else counter.detach().clone()


def forget_counter(layer: nn.Module) -> None:
    layer.__dict__.pop(_COUNTER, None)


def is_reset(layer: nn.Module, name: str, value: object) -> bool:
    """Whether assigning `value` to a buffer of frozen statistics would reset it; warns if so.

    A counter that was written in place is restored then. A tensor of another shape, type or on another device is not a
    reset but a move, and replicas of `DataParallel` are given their buffers.
    """
    buffer = layer._buffers.get(name)
    if not (isinstance(buffer, Tensor) and isinstance(value, Tensor)) or is_replica(layer):
        return False
    if (buffer.shape, buffer.dtype, buffer.device) != (value.shape, value.dtype, value.device):
        return False
    if value is buffer:
        counter = layer.__dict__.get(_COUNTER)
        if name != "num_batches_tracked" or counter is None or counter.is_meta != buffer.is_meta:
            return False
        with torch.no_grad():
            buffer.copy_(counter)
    warn_not_reset(layer)
    return True


def warn_not_reset(layer: nn.Module) -> None:
    """Warns that statistics have not been reset."""
    warnings.warn(
        f"the running statistics of {name_of(layer)} are frozen and have not been reset; call unfreeze before, if they"
        " are to move",
        stacklevel=4,
    )


def sharers(frozen: Iterable[nn.Module], live: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The frozen layers of which a live layer would write a buffer, with the buffer's name and that layer."""
    places = [(layer, _places(layer)) for layer in live if _writes_statistics(layer)]
    for layer in frozen:
        for name, (first, last) in _places(layer).items():
            for other, theirs in places:
                if any(first < end and start < last for start, end in theirs.values()):
                    yield layer, name, other


def _writes_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _NormBase) and layer.track_running_stats


def _places(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Where in memory the statistics of a layer lie, by name; for tensors without memory, a place by identity."""
    found = {}
    for name in BUFFERS:
        buffer = layer._buffers.get(name)
        if buffer is None or is_lazy(buffer) or buffer.numel() == 0:
            continue
        if buffer.is_meta or type(buffer) is not Tensor:
            found[name] = (-id(buffer), -id(buffer) + 1)
        else:
            length = 1 + sum((size - 1) * step for size, step in zip(buffer.shape, buffer.stride(), strict=True))
            found[name] = (buffer.data_ptr(), buffer.data_ptr() + length * buffer.element_size())
    return found
