"""The place that pickles of version 0.1.0 name for `syncbn.surgery.fuse`: `torch.load` of such a file finds it here."""

from syncbn.surgery.fuse import _import as _import
from syncbn.surgery.fuse import _rebuild as _rebuild
