"""Lightning: `Trainer(plugins=[SyncBatchNormLayers()], strategy="ddp", ...)` instead of `sync_batchnorm=True`."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.nn.patterns import Patterns
from syncbn.surgery.converting import convert_sync_batchnorm, revert_sync_batchnorm


class SyncBatchNormLayers(LayerSync):
    """Synchronizes the batch normalization of a LightningModule for the time of a fit.

    Lightning calls `apply` before it wraps the model, and `revert` when it tears the strategy down; both work in place,
    so what was frozen, shared, hooked or optimized stays so. Layers that were `syncbn.SyncBatchNorm` before stay it.

    Args:
        match: see `syncbn.convert_sync_batchnorm`.
        exclude: likewise.
        process_group: the ranks to sum over; None for all.
    """

    def __init__(
        self, match: Patterns = "*", exclude: Patterns = (), process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.match, self.exclude, self.process_group = match, exclude, process_group

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the layers that are selected."""
        return convert_sync_batchnorm(model, self.process_group, match=self.match, exclude=self.exclude)

    def revert(self, model: nn.Module) -> nn.Module:
        """Gives each its original class back."""
        return revert_sync_batchnorm(model)
