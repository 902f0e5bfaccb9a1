"""Augmentation as a user would write it, for `data.augment`; small, so that ranks and workers import it quickly."""

import random

import numpy as np
import torch


class Jiggle:
    """Cuts a part out, of random size (torch), and changes its brightness (NumPy); mirrors half of them (random)."""

    def __init__(self, smallest=0.5):
        self.smallest = smallest

    def __call__(self, image, *mask):
        height, width = image.shape[-2:]
        shares = self.smallest + (1 - self.smallest) * torch.rand(2)
        rows, columns = (max(1, int(length * share)) for length, share in zip((height, width), shares, strict=True))
        top, left = (int(torch.randint(most + 1, ())) for most in (height - rows, width - columns))
        parts = [part[..., top : top + rows, left : left + columns] for part in (image, *mask)]
        if random.random() < 0.5:
            parts = [part.flip(-1) for part in parts]
        parts[0] = (parts[0] * np.random.uniform(0.5, 1.0)).to(image.dtype)
        return tuple(parts) if mask else parts[0]


class Turn:
    """Turns by 90 degrees, so many times."""

    def __init__(self, times=1):
        self.times = times

    def __call__(self, image, *mask):
        parts = [part.rot90(self.times, (-2, -1)) for part in (image, *mask)]
        return tuple(parts) if mask else parts[0]


class Paint:
    """Paints the first row, in a value that is drawn when it is built if none is given; keeps what it has seen."""

    seen = []

    def __init__(self, value=None):
        self.value = int(torch.randint(256, ())) if value is None else value

    def __call__(self, image, *mask):
        Paint.seen.append(image.clone())
        image[:, 0] = self.value
        return (image, *mask) if mask else image


class OwnGenerator:
    """Adds noise from a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, image):
        return image ^ self.generator.integers(2)


class Float:
    """Returns another type."""

    def __call__(self, image):
        return image / 255


class Fails:
    def __call__(self, image):
        raise RuntimeError("no such\nluck")


class Nothing:
    """Cannot be called."""
