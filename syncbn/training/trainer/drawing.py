"""Random draws of an optimizer, which have to be the same on every rank: else their weights part ways."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from syncbn.training.data.randomness import Draw, mix_key, seed_generators


def drawing_alike(seed: int, device: torch.device) -> Callable[[int], AbstractContextManager[None]]:
    """A function from a step to a context in which torch, NumPy and `random` draw what seed and step say.

    NumPy and `random` then go on as before; torch's generators are seeded in every step anyway.
    """

    @contextmanager
    def drawing(step: int) -> Iterator[None]:
        key = mix_key(seed, step, Draw.OPTIMIZER)
        numpy = sys.modules.get("numpy")  # one that is not imported draws nothing
        before = random.getstate(), None if numpy is None else numpy.random.get_state()
        seed_generators(key, device)
        random.seed(key)
        if numpy is not None:
            numpy.random.seed(key % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            if numpy is not None:
                numpy.random.set_state(before[1])

    return drawing
