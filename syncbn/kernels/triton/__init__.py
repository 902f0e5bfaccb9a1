"""Triton kernels of the operators, and the tiles and launch grids by which they cover an activation."""
