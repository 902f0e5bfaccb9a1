"""The place that pickles of version 0.1.0 name for `syncbn.nn.subclasses`: `torch.load` of such a file finds it here."""

from syncbn.nn.subclasses import _rebuild as _rebuild
