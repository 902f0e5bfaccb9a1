"""Seeing what batch normalization layers do."""
