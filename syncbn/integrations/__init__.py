"""Adapters for other people's trainers; each imports the library that it is for."""
