"""This rank among the others: the world, DDP, stopping together, failing together."""
