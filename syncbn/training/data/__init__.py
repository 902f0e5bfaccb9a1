"""From disk to a batch: data sets, decoding, augmentation, sampling, loading."""
