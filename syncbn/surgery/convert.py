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
    skip_nonfinite: bool = False,
) -> nn.Module:
    """Makes every selected batch normalization of `module` a `SyncBatchNorm`, in place.

    Works without a process group. `nn.BatchNorm1d/2d/3d` and `nn.SyncBatchNorm` become `SyncBatchNorm` itself. A
    subclass keeps what it adds (a fused activation, for example): the layer gets a generated class that inherits from
    both its original class and `SyncBatchNorm`. A lazy layer is synchronized from the first forward on, which
    determines its number of channels. All other normalization layers, and layers that are synchronized already, are
    left unchanged. `conversion_report`, in `syncbn.surgery.conversion_report`, lists the status of every layer with the
    reason.

    Args:
        module: any model, or a single layer.
        process_group: the ranks to sum over; None for all ranks of the job (a torch `SyncBatchNorm` keeps its own).
        match: patterns of the modules to convert: shell globs over dotted names; a plain name also selects all
            modules below it.
        exclude: patterns of the modules to leave unchanged.
        skip_nonfinite: batches whose statistics are not finite move no running statistics (see `SyncBatchNorm`).

    Returns:
        `module` itself.

    Raises:
        TypeError: a subclass whose behavior conversion could not keep, or a layer that `torch.jit` has compiled; the
            message names the layer, and no layer has been converted.
        ValueError: a pattern that selects nothing.
    """
    return convert(module, SyncBatchNorm, process_group, match=match, exclude=exclude, skip_nonfinite=skip_nonfinite)
