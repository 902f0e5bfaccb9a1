"""What pickles of version 0.1.0 name here; it lives in `syncbn.nn.subclasses`."""

from syncbn.nn.subclasses import _rebuild as _rebuild
