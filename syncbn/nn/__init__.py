"""The layer and its maths."""
