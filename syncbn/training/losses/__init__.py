"""Losses, each of which returns a sum and a count."""
