"""Exact synchronized batch normalization for PyTorch, with tools to freeze, fuse, monitor and audit the layers.

Public names are imported on first use, so that importing the package (as composing a config does) does not import
torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Module that defines each public name.
_HOMES = {
    "SyncBatchNorm": "syncbn.nn.batchnorm",
    "sync_batch_norm": "syncbn.nn.functional",
    "even_steps": "syncbn.nn.even_steps",
    "accumulate_stats": "syncbn.nn.accumulate",
    "disable_running_stats": "syncbn.nn.disabled_stats",
    "convert_sync_batchnorm": "syncbn.surgery.convert",
    "new_bn_groups": "syncbn.nn.groups",
    "revert_sync_batchnorm": "syncbn.surgery.revert",
    "fuse": "syncbn.surgery.fuse",
    "freeze": "syncbn.surgery.freeze",
    "unfreeze": "syncbn.surgery.freeze",
    "FreezePlan": "syncbn.surgery.freeze_plan",
    "Monitor": "syncbn.stats.monitor",
    "precise_bn": "syncbn.stats.precise_bn",
    "audit": "syncbn.auditing.audit",
    "parity": "syncbn.auditing.parity.parity",
    "Finding": "syncbn.auditing.rules",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from syncbn.auditing.audit import audit as audit
    from syncbn.auditing.parity.parity import parity as parity
    from syncbn.auditing.rules import Finding as Finding
    from syncbn.nn.accumulate import accumulate_stats as accumulate_stats
    from syncbn.nn.batchnorm import SyncBatchNorm as SyncBatchNorm
    from syncbn.nn.disabled_stats import disable_running_stats as disable_running_stats
    from syncbn.nn.even_steps import even_steps as even_steps
    from syncbn.nn.functional import sync_batch_norm as sync_batch_norm
    from syncbn.nn.groups import new_bn_groups as new_bn_groups
    from syncbn.stats.monitor import Monitor as Monitor
    from syncbn.stats.precise_bn import precise_bn as precise_bn
    from syncbn.surgery.convert import convert_sync_batchnorm as convert_sync_batchnorm
    from syncbn.surgery.freeze import freeze as freeze
    from syncbn.surgery.freeze import unfreeze as unfreeze
    from syncbn.surgery.freeze_plan import FreezePlan as FreezePlan
    from syncbn.surgery.fuse import fuse as fuse
    from syncbn.surgery.revert import revert_sync_batchnorm as revert_sync_batchnorm


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
