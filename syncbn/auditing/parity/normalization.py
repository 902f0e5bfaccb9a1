"""Batch normalization under other rules: synchronized wherever it is, or without a look at the batch.

`F.batch_norm` is intercepted by a function mode, so that every layer class, and calls inside of a module's forward,
are covered. What a scripted function or hand-written code normalizes is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncbn.auditing.parity.recorder import first_names
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.functional import sync_batch_norm
from syncbn.nn.groups import spans_world
from syncbn.surgery.convert import convert_sync_batchnorm


class Arguments(NamedTuple):
    """The arguments of `F.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _of_operator(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Arguments:
    return Arguments(input, running_mean, running_var, weight, bias, training, momentum, eps)


_READ: dict[Any, Callable[..., Arguments]] = {F.batch_norm: Arguments, torch.batch_norm: _of_operator}


class Intercepted(TorchFunctionMode):
    """Context in which normalizations by the local batch are counted by module, in `calls`.

    Args:
        where: the module that runs.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = _READ.get(func)
        if read is not None:
            arguments = read(*args, **(kwargs or {}))
            if arguments.training:
                self.calls[self.where()] += 1
                return self.normalize(arguments)
        return func(*args, **(kwargs or {}))

    def normalize(self, arguments: Arguments) -> Tensor:
        """Computes the layer, as it is."""
        return F.batch_norm(*arguments)


class Synchronized(Intercepted):
    """Context in which `F.batch_norm` normalizes with the samples of all ranks.

    `moved` says for each module the sums of squares of the difference that it makes, and of the result.

    Args:
        left: modules that not all ranks call; they stay as they are, because a sum over ranks would wait for ever.
    """

    def __init__(self, where: Callable[[], str], left: Container[str] = ()) -> None:
        super().__init__(where)
        self.left = left
        self.moved: dict[str, tuple[float, float]] = {}

    def normalize(self, arguments: Arguments) -> Tensor:
        """Computes the layer over the samples of all ranks."""
        name, input = self.where(), arguments.input
        if name in self.left or not _have_same_channels(input):
            return F.batch_norm(*arguments)
        output = sync_batch_norm(*arguments)
        with torch.no_grad():
            x, _, _, weight, bias, *_ = arguments
            if x.numel() > x.size(1):
                local = F.batch_norm(x, None, None, weight, bias, True, 0.0, arguments.eps)
            else:  # a value per channel has no variance of its own
                local = torch.zeros_like(output)
            before = self.moved.get(name, (0.0, 0.0))
            self.moved[name] = (
                before[0] + float((local - output).double().square().sum()),
                before[1] + float(output.double().square().sum()),
            )
        return output


class Neutral(Intercepted):
    """Context in which `F.batch_norm` normalizes with the running statistics, or not at all where it has none."""

    def normalize(self, arguments: Arguments) -> Tensor:
        """Computes the layer without a look at other samples."""
        x, mean, var, weight, bias, *_ = arguments
        if mean is None or var is None:
            mean, var = x.new_zeros(x.size(1)), x.new_ones(x.size(1))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, arguments.eps)


def neutralize(model: nn.Module) -> None:
    """Freezes the statistics of synchronized layers, in place, as `Neutral` does for all others."""
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            if layer.running_mean is None:
                layer.register_buffer("running_mean", torch.zeros(layer.num_features))
                layer.register_buffer("running_var", torch.ones(layer.num_features))
                parameter = next(layer.parameters(), None)
                layer.to(torch.float64 if parameter is None else parameter.dtype)
            layer._stats_frozen = True


def replace_torch_sync_bn(model: nn.Module) -> nn.Module:
    """Puts this package's layer in the place of `nn.SyncBatchNorm`, which computes the same but refuses CPU tensors."""
    if isinstance(model, nn.SyncBatchNorm):
        return convert_sync_batchnorm(model)
    names = [name for name, layer in first_names(model).items() if isinstance(layer, nn.SyncBatchNorm)]
    return convert_sync_batchnorm(model, match=names) if names else model


def sum_over_all_ranks(model: nn.Module) -> list[str]:
    """Lets synchronized layers with a sub-group sum over all ranks, in place; returns their names."""
    changed = []
    for name, layer in first_names(model).items():
        if isinstance(layer, SyncBatchNorm) and not spans_world(layer.process_group):
            layer.process_group = None
            changed.append(name)
    return changed


def _have_same_channels(input: Tensor) -> bool:
    """Whether all ranks have as many channels; an instance normalization by way of `F.batch_norm` has not."""
    if dist.get_world_size() == 1:
        return True
    mine = torch.tensor([input.size(1) if input.dim() > 1 else -1])
    sizes = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, mine)
    return len({int(size) for size in sizes}) == 1
