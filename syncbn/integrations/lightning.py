"""Lightning: `Trainer(plugins=[SyncBatchNormLayers()], strategy="ddp", ...)` instead of `sync_batchnorm=True`."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.nn.patterns import Patterns
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.surgery.revert import revert_sync_batchnorm


class SyncBatchNormLayers(LayerSync):
    """Synchronizes the batch normalization of a LightningModule for the time of a fit.

    Lightning calls `apply` before it wraps the model, and `revert` when it tears the strategy down; both work in place,
    so what was frozen, shared, hooked or optimized stays so. Layers that were synchronized before stay it, and so does
    one whose statistics are frozen at the end, which its original class cannot express (with a warning). Strategies for
    a single device call neither.

    Args:
        match: see `syncbn.convert_sync_batchnorm`.
        exclude: likewise.
        process_group: the ranks to sum over; None for all.
    """

    def __init__(
        self, match: Patterns = "*", exclude: Patterns = (), process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.match, self.exclude, self.process_group = match, exclude, process_group
        self._converted: list[nn.Module] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the layers that are selected."""
        before = {module: type(module) for module in model.modules()}
        convert_sync_batchnorm(model, self.process_group, match=self.match, exclude=self.exclude)
        self._converted = [module for module, kind in before.items() if type(module) is not kind]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Gives the layers that `apply` converted their original class back."""
        for layer in self._converted:
            try:
                revert_sync_batchnorm(layer)
            except ValueError as error:
                warnings.warn(f"a {type(layer).__name__} stays synchronized: {error}", stacklevel=2)
        self._converted = []
        return model
