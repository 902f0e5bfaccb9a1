"""Virtual ranks: batch normalization as that many ranks would do it each on its own, in fewer processes.

What local statistics do to a run at 16 ranks can so be seen on a laptop. A process's part of the batch is cut into
groups, one for each rank that it stands for, and each group is normalized by its own statistics ("ghost batch
normalization": Hoffer et al. 2017, arXiv:1705.08741). The gradient is that of one graph over all groups: the loss sums
over samples, so it is what DDP averages to.
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
    """A batch normalization whose training forward cuts (N, C, ...) into groups of rows, as `tensor_split` does, and
    normalizes each by itself. Weight and bias are shared.

    Each group has running statistics of its own, `group_mean` and `group_var` (groups, C), as each rank has. They are
    buffers, so they move to devices, are averaged and put back like all others, but no part of the state dict, which is
    that of `nn.BatchNorm*`: there, in evaluation, and for whoever looks, `running_mean` and `running_var` stand for all
    groups together. A state dict that is loaded is where every group goes on from, as ranks do from a checkpoint.
    """

    group_mean: Tensor | None
    group_var: Tensor | None
    num_groups: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes by the statistics of each group; in evaluation by the running ones.

        Raises:
            ValueError: in training, a group with a single value per channel.
        """
        if not self.training:
            return super().forward(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        statistics = _rows(self.group_mean, self.num_groups), _rows(self.group_var, self.num_groups)
        outputs = [
            F.batch_norm(rows, mean, var, self.weight, self.bias, True, momentum or 0.0, self.eps)
            for rows, mean, var in zip(input.tensor_split(self.num_groups), *statistics, strict=True)
        ]
        self.pool()
        return torch.cat(outputs)

    @torch.no_grad()
    def pool(self, weights: Sequence[float] | None = None) -> None:
        """Sets `running_mean` and `running_var` to those of all groups together: the weighted mean of the means, and of
        the variances plus the spread of the means.

        Args:
            weights: how much each group counts, usually the samples that it has seen; None: all alike.
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
        """Lets every group go on from `running_mean` and `running_var`."""
        for of_groups, running in ((self.group_mean, self.running_mean), (self.group_var, self.running_var)):
            if of_groups is not None and running is not None:
                of_groups.copy_(running.expand_as(of_groups))

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self.begin()

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from 2 up: the class before has been any of torch's three."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


def groups_per_rank(bn: BnConfig, world_size: int) -> int:
    """Virtual ranks that each real one stands for; 1 without `bn.virtual_ranks`.

    Raises:
        ConfigError: the virtual ranks cannot be shared out evenly.
    """
    if bn.virtual_ranks is None:
        return 1
    if bn.virtual_ranks % world_size:
        raise ConfigError(
            f"bn.virtual_ranks: expected a multiple of the {world_size} ranks of this job, got {bn.virtual_ranks}"
        )
    return bn.virtual_ranks // world_size


def make_virtual(model: nn.Module, num_groups: int) -> None:
    """Makes every batch normalization of a model a `VirtualBatchNorm`, in place; parameters and keys stay.

    Raises:
        ConfigError: a layer of another class than torch's three, whose own behaviour would be lost; no layer at all.
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
        layer.__dict__["num_groups"] = num_groups
        for name in ("mean", "var"):
            running = getattr(layer, f"running_{name}")
            of_groups = None if running is None else running.repeat(num_groups, 1)
            layer.register_buffer(f"group_{name}", of_groups, persistent=False)


def virtual_layers(model: nn.Module) -> Iterator[VirtualBatchNorm]:
    """The layers that `make_virtual` has made."""
    return (layer for layer in model.modules() if isinstance(layer, VirtualBatchNorm))


def _rows(of_groups: Tensor | None, num_groups: int) -> Sequence[Tensor | None]:
    return [None] * num_groups if of_groups is None else of_groups.unbind(0)
