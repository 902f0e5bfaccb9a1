"""The `SyncBatchNorm` layer, its functional form, its process groups and its moments."""

from syncbn.nn.batchnorm import SyncBatchNorm as SyncBatchNorm
from syncbn.nn.functional import sync_batch_norm as sync_batch_norm
from syncbn.nn.groups import new_bn_groups as new_bn_groups
from syncbn.nn.moments import Moments as Moments
