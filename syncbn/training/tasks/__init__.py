"""The tasks of `train.py`, one file each, and what they share."""
