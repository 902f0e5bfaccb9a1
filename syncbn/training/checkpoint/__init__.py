"""Checkpoints: the named parts of a job's state, the files, and the rules for resuming from them."""
