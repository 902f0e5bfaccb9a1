"""Parity: does a model train the same on several ranks as in one process, and if not, why not."""
