"""Optimizers, learning-rate schedules, updates that can be skipped on the device, and weight averages."""
