"""In-place changes to the layers of a model: convert, revert, freeze, unfreeze, fuse."""

# Imported for its side effect: it registers the module names that pickles of version 0.1.0 refer to.
from syncbn.surgery import old_pickles as old_pickles
