"""What pickles of version 0.1.0 name here; it lives in `syncbn.surgery.fuse`."""

from syncbn.surgery.fusion_classes import _import as _import
from syncbn.surgery.fusion_classes import _rebuild as _rebuild
