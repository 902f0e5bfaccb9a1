"""Statistics of batch normalization layers: monitoring them, recomputing them (`precise_bn`), pooling over ranks."""
