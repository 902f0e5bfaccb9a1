"""Data sets, decoding, augmentation, sampling, and loading of batches."""
