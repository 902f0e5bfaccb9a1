"""Metrics, and their evaluation over a split."""
