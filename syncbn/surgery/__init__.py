"""Changing models without losing anything: convert, revert, freeze, unfreeze, fuse."""

from syncbn.surgery import old_pickles as old_pickles
