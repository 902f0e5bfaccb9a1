"""One training run: the loop, and what it is built from."""
