"""Virtual ranks: the local batch statistics of many ranks, reproduced in fewer processes.

This shows, for example, on one machine how local statistics affect a run at 16 ranks. A process's part of the batch is
split into groups, one per virtual rank, and each group is normalized by its own statistics ("ghost batch
normalization": Hoffer et al. 2017, arXiv:1705.08741). One graph spans all groups, and the loss is a sum over samples,
so the gradient is the one that DDP would obtain by averaging over that many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.patterns import named_modules
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.model import BnConfig

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class VirtualBatchNorm(_BatchNorm):
    """Batch normalization that in training splits (N, C, ...) into groups of rows, by `tensor_split`, and normalizes
    each group by its own statistics. Weight and bias are shared.

    Each group has its own running statistics, `group_mean` and `group_var`, (groups, C), as each rank would have. They
    are non-persistent buffers: they move between devices, are averaged and restored like other buffers, but are not in
    the state dict, which is that of `nn.BatchNorm*`. `running_mean` and `running_var`, (C,), are the statistics pooled
    over the groups; evaluation and the state dict use them. Loading a state dict sets every group's statistics to them,
    as ranks start from a common checkpoint.

    With `skip_nonfinite`, the statistics of a group stay as they are where they would not be finite in some channel
    afterwards, and the counter stays where those of all groups do.
    """

    group_mean: Tensor | None
    group_var: Tensor | None
    num_groups: int
    skip_nonfinite: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, ...) by the statistics of each group in training, by the running statistics in evaluation.

        Raises:
            ValueError: in training, a group with a single value per channel.
        """
        if not self.training:
            return super().forward(input)
        momentum = self.momentum
        mean, var, counter = self.group_mean, self.group_var, self.num_batches_tracked
        if self.skip_nonfinite:  # `F.batch_norm` keeps for backward what it moves, so copies are moved
            mean, var, counter = (None if buffer is None else buffer.clone() for buffer in (mean, var, counter))
        if self.num_batches_tracked is not None and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        statistics = _rows(mean, self.num_groups), _rows(var, self.num_groups)
        outputs = [
            F.batch_norm(rows, moved_mean, moved_var, self.weight, self.bias, True, momentum or 0.0, self.eps)
            for rows, moved_mean, moved_var in zip(input.tensor_split(self.num_groups), *statistics, strict=True)
        ]
        if self.skip_nonfinite:
            self._take_finite(mean, var, counter)
        self.pool()
        return torch.cat(outputs)

    @torch.no_grad()
    def _take_finite(self, mean: Tensor | None, var: Tensor | None, counter: Tensor | None) -> None:
        """Takes over the moved statistics of the groups for which they are finite.

        Args:
            mean: (groups, C), as is `var`.
            counter: of batches, before this one.
        """
        if self.group_mean is None or self.group_var is None or mean is None or var is None:
            return
        is_finite = (mean.isfinite() & var.isfinite()).all(1)
        self.group_mean.copy_(torch.where(is_finite[:, None], mean, self.group_mean))
        self.group_var.copy_(torch.where(is_finite[:, None], var, self.group_var))
        if self.num_batches_tracked is not None and counter is not None:
            self.num_batches_tracked.copy_(torch.where(is_finite.any(), self.num_batches_tracked, counter))

    @torch.no_grad()
    def pool(self, weights: Sequence[float] | None = None) -> None:
        """Sets `running_mean` and `running_var` to the statistics pooled over all groups.

        The mean is the weighted mean of the groups' means; the variance is the weighted mean of their variances plus
        the weighted variance of their means (law of total variance).

        Args:
            weights: weight of each group, usually the number of samples it has processed; None: equal weights.
        """
        if self.running_mean is None or self.running_var is None:
            return
        assert self.group_mean is not None
        assert self.group_var is not None
        if weights is None or sum(weights) == 0:
            share = self.group_mean.new_full((self.num_groups, 1), 1.0 / self.num_groups)
        else:
            share = self.group_mean.new_tensor(weights)[:, None] / sum(weights)
        self.running_mean.copy_((share * self.group_mean).sum(0))
        spread = self.group_mean - self.running_mean
        self.running_var.copy_((share * (self.group_var + spread * spread)).sum(0))

    @torch.no_grad()
    def begin(self) -> None:
        """Sets the running statistics of every group to `running_mean` and `running_var`."""
        for of_groups, running in ((self.group_mean, self.running_mean), (self.group_var, self.running_var)):
            if of_groups is not None and running is not None:
                of_groups.copy_(running.expand_as(of_groups))

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self.begin()

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any number of dimensions, because the layer may have been made from nn.BatchNorm1d, 2d or 3d."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


def groups_per_rank(bn: BnConfig, world_size: int) -> int:
    """Number of virtual ranks per rank; 1 without `bn.virtual_ranks`.

    Raises:
        ConfigError: the number of virtual ranks is not a multiple of the world size.
    """
    if bn.virtual_ranks is None:
        return 1
    if bn.virtual_ranks % world_size:
        raise ConfigError(
            f"bn.virtual_ranks: expected a multiple of the {world_size} ranks of this job, got {bn.virtual_ranks}"
        )
    return bn.virtual_ranks // world_size


def make_virtual(model: nn.Module, num_groups: int, *, skip_nonfinite: bool = False) -> None:
    """Turns every batch normalization of a model into a `VirtualBatchNorm`, in place; parameters and keys stay.

    Raises:
        ConfigError: a layer of another class than nn.BatchNorm1d, 2d or 3d, whose behavior would be lost; no layer.
    """
    layers = {name: layer for name, layer in named_modules(model) if isinstance(layer, _BatchNorm)}
    for name, layer in layers.items():
        if type(layer) not in _PLAIN:
            raise ConfigError(
                f"bn.virtual_ranks: {name or 'the model'} is a {type(layer).__name__}, expected nn.BatchNorm1d, 2d or"
                " 3d; set bn.virtual_ranks=null"
            )
    if not layers:
        raise ConfigError("bn.virtual_ranks: the model has no batch normalization; set bn.virtual_ranks=null")
    for layer in dict.fromkeys(layers.values()):
        layer.__class__ = VirtualBatchNorm
        layer.__dict__.update(num_groups=num_groups, skip_nonfinite=skip_nonfinite)
        for name in ("mean", "var"):
            running = getattr(layer, f"running_{name}")
            of_groups = None if running is None else running.repeat(num_groups, 1)
            layer.register_buffer(f"group_{name}", of_groups, persistent=False)


def virtual_layers(model: nn.Module) -> Iterator[VirtualBatchNorm]:
    """Iterates over the `VirtualBatchNorm` layers of a model."""
    return (layer for layer in model.modules() if isinstance(layer, VirtualBatchNorm))


def _rows(of_groups: Tensor | None, num_groups: int) -> Sequence[Tensor | None]:
    return [None] * num_groups if of_groups is None else of_groups.unbind(0)
