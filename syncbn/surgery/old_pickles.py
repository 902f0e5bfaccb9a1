"""Stand-ins for the modules that pickles of whole models from version 0.1.0 refer to by name.

Unpickling finds them in `sys.modules`, because `syncbn/surgery/__init__.py` imports this module. New pickles refer to
the present modules.
"""

import sys
from types import ModuleType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.subclasses import rebuild
from syncbn.surgery import fusion_classes


def _rebuild_subclass(original: type[_BatchNorm]) -> nn.Module:
    return rebuild(original, SyncBatchNorm)


def _stand_in(name: str, **members: object) -> None:
    module = ModuleType(name, __doc__)
    module.__dict__.update(members)
    sys.modules[name] = module


_stand_in("syncbn.surgery.subclasses", _rebuild=_rebuild_subclass)
_stand_in("syncbn.surgery.fusing", _rebuild=fusion_classes._rebuild, _import=fusion_classes._import)
