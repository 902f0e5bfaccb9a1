"""What pickles of version 0.1.0 name here; it lives in `syncbn.nn.subclasses`."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.subclasses import rebuild


def _rebuild(original: type[_BatchNorm]) -> nn.Module:
    return rebuild(original, SyncBatchNorm)
