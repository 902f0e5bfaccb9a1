"""Adapters for training frameworks of third parties; each module imports the framework that it is for."""
