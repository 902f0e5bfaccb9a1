"""Plugin for Lightning, to use instead of `sync_batchnorm=True`.

`Trainer(plugins=[SyncBatchNormLayers()], strategy="ddp", ...)`
"""

from __future__ import annotations

import warnings

import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.nn.patterns import Patterns
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.surgery.revert import revert_sync_batchnorm


class SyncBatchNormLayers(LayerSync):
    """Converts the batch normalization of a LightningModule to `SyncBatchNorm` for the duration of a fit.

    Lightning calls `apply` before it wraps the model, and `revert` when it tears the strategy down. Both work in place,
    so frozen and shared parameters, hooks and optimizers stay valid. Layers that were synchronized before the fit stay
    synchronized. So does, with a warning, a layer in training mode whose statistics are frozen at the end, because its
    original class cannot represent that. Strategies for a single device call neither method.

    Args:
        match: patterns of the modules to convert, as in `syncbn.convert_sync_batchnorm`.
        exclude: patterns of the modules to leave unchanged.
        process_group: the ranks to sum over; None for all.
    """

    def __init__(
        self, match: Patterns = "*", exclude: Patterns = (), process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.match, self.exclude, self.process_group = match, exclude, process_group
        self._converted: list[nn.Module] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the selected layers in place; returns `model`."""
        before = {module: type(module) for module in model.modules()}
        convert_sync_batchnorm(model, self.process_group, match=self.match, exclude=self.exclude)
        self._converted = [module for module, kind in before.items() if type(module) is not kind]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Reverts the layers that `apply` has converted to their original class, in place; returns `model`."""
        for layer in self._converted:
            try:
                revert_sync_batchnorm(layer)
            except ValueError as error:
                warnings.warn(f"a {type(layer).__name__} stays synchronized: {error}", stacklevel=2)
        self._converted = []
        return model
