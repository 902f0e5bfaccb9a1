"""Building of models, their batch normalization, and loading of pretrained sub-networks."""
