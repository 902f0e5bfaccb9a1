"""Exact synchronized batch normalization, freezing that holds, and sight of what the layers do.

Names are resolved when first used, so that importing the package (as composing a config does) does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "SyncBatchNorm": "syncbn.nn.batchnorm",
    "sync_batch_norm": "syncbn.nn.functional",
    "even_steps": "syncbn.nn.stepping",
    "accumulate_stats": "syncbn.nn.accumulating",
    "convert_sync_batchnorm": "syncbn.surgery.converting",
    "new_bn_groups": "syncbn.nn.groups",
    "revert_sync_batchnorm": "syncbn.surgery.converting",
    "fuse": "syncbn.surgery.fusing",
    "freeze": "syncbn.surgery.freezing",
    "unfreeze": "syncbn.surgery.freezing",
    "FreezePlan": "syncbn.surgery.plan",
    "Monitor": "syncbn.stats.monitor",
    "precise_bn": "syncbn.stats.population",
    "audit": "syncbn.stats.auditing",
    "Finding": "syncbn.stats.findings",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from syncbn.nn.accumulating import accumulate_stats as accumulate_stats
    from syncbn.nn.batchnorm import SyncBatchNorm as SyncBatchNorm
    from syncbn.nn.functional import sync_batch_norm as sync_batch_norm
    from syncbn.nn.groups import new_bn_groups as new_bn_groups
    from syncbn.nn.stepping import even_steps as even_steps
    from syncbn.stats.auditing import audit as audit
    from syncbn.stats.findings import Finding as Finding
    from syncbn.stats.monitor import Monitor as Monitor
    from syncbn.stats.population import precise_bn as precise_bn
    from syncbn.surgery.converting import convert_sync_batchnorm as convert_sync_batchnorm
    from syncbn.surgery.converting import revert_sync_batchnorm as revert_sync_batchnorm
    from syncbn.surgery.freezing import freeze as freeze
    from syncbn.surgery.freezing import unfreeze as unfreeze
    from syncbn.surgery.fusing import fuse as fuse
    from syncbn.surgery.plan import FreezePlan as FreezePlan


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
