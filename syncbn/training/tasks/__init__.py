"""One file per task of `train.py`."""
