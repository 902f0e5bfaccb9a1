"""The operators as Triton programs, and how they are laid out over an activation."""
