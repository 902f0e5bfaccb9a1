"""Stratified splits of a data set, the same at every call.

They are, bit for bit, those of scikit-learn's `train_test_split` with `stratify`, by which runs of version 0.1.0 were
split; scikit-learn itself, whose import takes half as long as torch's, is not needed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0  # fixed: the split belongs to the data set and does not vary with the run's seed


def stratified_indices(labels: Tensor) -> list[Tensor]:
    """Indices of train, val and test, 80/10/10 per class, each ascending; the same at every call."""
    train, rest = _cut(np.arange(len(labels)), labels.numpy(), 0.2)
    val, test = _cut(rest, labels.numpy()[rest], 0.5)
    return [torch.from_numpy(part).sort().values for part in (train, val, test)]


def hold_out(labels: Tensor) -> list[Tensor]:
    """Indices of train and val, 90/10 per class, each ascending; the same at every call."""
    parts = _cut(np.arange(len(labels)), labels.numpy(), 0.1)
    return [torch.from_numpy(part).sort().values for part in parts]


def _cut(index: np.ndarray, labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Two parts of `index`, the second with this share of every class of `labels`, shuffled.

    Raises:
        ValueError: a class has one sample alone, or a part has fewer samples than there are classes.
    """
    random = np.random.RandomState(SPLIT_SEED)
    num_second = math.ceil(share * len(index))
    num_first = len(index) - num_second
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < 2 or min(num_first, num_second) < len(counts):
        raise ValueError(f"{len(index)} samples of {len(counts)} classes cannot be split")
    of_first = _shares(counts, num_first, random)
    of_second = _shares(counts - of_first, num_second, random)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])
    firsts, seconds = [], []
    for positions, first, second in zip(members, of_first, of_second, strict=True):
        shuffled = positions[random.permutation(len(positions))]
        firsts.append(shuffled[:first])
        seconds.append(shuffled[first : first + second])
    first, second = (index[random.permutation(np.concatenate(parts))] for parts in (firsts, seconds))
    return first, second


def _shares(counts: np.ndarray, number: int, random: np.random.RandomState) -> np.ndarray:
    """How many of each class make up `number`, in proportion to `counts`; classes with equal remainders draw lots."""
    exact = counts / counts.sum() * number
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(number - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing <= 0:
            break
        equal = np.flatnonzero(remainders == remainder)
        chosen = random.choice(equal, size=min(len(equal), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    return shares.astype(int)
