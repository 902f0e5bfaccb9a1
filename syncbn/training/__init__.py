"""The training service behind `train.py`; needs the extra `train`."""
