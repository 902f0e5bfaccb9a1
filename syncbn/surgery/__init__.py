"""Changing models without losing anything: convert, revert, freeze, unfreeze."""
