"""From the configuration to a model, its normalization and its pretrained parts."""
