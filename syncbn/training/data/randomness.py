"""Stateless random numbers: functions of a key (seed, epoch, sample, purpose), not of what was drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """Purpose of a random number, a part of its key, so that no two purposes share a number.

    The values must not change: a resumed run has to draw the same numbers from its seed.
    """

    SHUFFLE = 1
    """Order of the samples in an epoch."""
    SHIFT_Y = 2
    SHIFT_X = 3
    FLIP = 4
    MODEL = 5
    """Draws of the model in a step: dropout, stochastic depth."""
    ITEM = 6
    """Draws of a user-defined data set for a sample."""
    AUGMENT = 7
    """Draws of user-defined transforms for a sample."""
    BALANCE = 8
    """Order of the samples of a class, where draws are balanced."""
    OPTIMIZER = 20
    """Draws of an optimizer in a step, the same on every rank."""


_MASK = (1 << 64) - 1
# The constants of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic for int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def mix(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer: int64 to well-mixed int64, elementwise."""
    bits = bits + _signed(_GAMMA)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift_right(bits, 31)


def _mix_int(bits: int) -> int:
    """`mix` of one Python integer, 0 <= bits < 2^64; some fifty times faster than operators on a tensor."""
    bits = (bits + _GAMMA) & _MASK
    bits = (bits ^ (bits >> 30)) * _FIRST & _MASK
    bits = (bits ^ (bits >> 27)) * _SECOND & _MASK
    return bits ^ (bits >> 31)


def mix_key(*parts: int) -> int:
    """Hashes integers into one, 0 <= key < 2^63, for seeding generators; their order counts."""
    key = 0
    for part in parts:
        key = _mix_int(key ^ (part & _MASK))
    return key & (_MASK >> 1)


def seed_generators(key: int, device: torch.device) -> None:
    """Seeds torch's default generators of the host and of `device`, which models draw from (dropout, stochastic depth).

    `torch.manual_seed` also seeds every other backend, and records a stack trace for each one that is not initialized:
    0.1 to 0.4 ms, which is noticeable in a training step.
    """
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Context in which the global generators of torch (on the host), NumPy and Python start from `key`.

    Afterwards they are as they were before.

    Args:
        key: 0 <= key < 2^63.
    """
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(key)
        np.random.seed([key & 0xFFFFFFFF, key >> 32])
        random.seed(key)
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def occurrences(index: Tensor, repeats: Tensor | None) -> Tensor:
    """Names for draws of samples, (N,) int64: the sample's position in the data set where it occurs for the first time.

    Args:
        index: (N,) int64, the positions.
        repeats: (N,) int64, how often each was drawn in this epoch before; None for never.
    """
    return index if repeats is None else index + (repeats << 40)


def integers(high: int, index: Tensor, *key: int) -> Tensor:
    """For every sample index an integer 0 <= value < high that depends only on the index and the key.

    Args:
        high: exclusive bound, far below 2^62 (the bias is high / 2^62).
        index: int64, any shape; the output has the same.
        key: further parts of the key: seed, epoch, purpose.
    """
    bits = mix(mix(index) ^ _signed(mix_key(*key)))
    return _shift_right(bits, 2) % high
