"""Converting a model's batch normalization to `SyncBatchNorm`, in place."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.conversion import convert
from syncbn.nn.patterns import Patterns


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    match: Patterns = "*",
    exclude: Patterns | None = (),
) -> nn.Module:
    """Makes every selected batch normalization of `module` a `SyncBatchNorm`, in place.

    Needs no process group. `nn.BatchNorm1d/2d/3d` and `nn.SyncBatchNorm` become exactly `SyncBatchNorm`. A subclass
    keeps what it adds (a fused activation, say): its class becomes a subclass of both it and `SyncBatchNorm`. A lazy
    layer is converted when it has seen its width. Every other normalization, and a layer that is synchronized already,
    is left. `conversion_report` tells which layer is what, and why.

    Args:
        module: any model, or a single layer.
        process_group: the ranks to sum over; None for all ranks of the job (a torch `SyncBatchNorm` keeps its own).
        match: patterns of the modules to convert: shell globs over dotted names; a plain name selects all below it.
        exclude: patterns of the modules to leave.

    Returns:
        `module` itself.

    Raises:
        TypeError: a subclass whose behaviour cannot be kept; the message names the layer. Nothing has been converted
            then.
        ValueError: a pattern that selects nothing.
    """
    return convert(module, SyncBatchNorm, process_group, match=match, exclude=exclude)
