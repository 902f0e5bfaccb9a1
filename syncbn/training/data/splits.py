"""Stratified splits of a data set, the same at every call."""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT_SEED = 0  # fixed: the split belongs to the data set and does not vary with the run's seed


def stratified_indices(labels: Tensor) -> list[Tensor]:
    """Indices of train, val and test, 80/10/10 per class, each ascending; the same at every call."""
    from sklearn.model_selection import train_test_split

    index, numpy_labels = torch.arange(len(labels)).numpy(), labels.numpy()
    train, rest = train_test_split(index, test_size=0.2, stratify=numpy_labels, random_state=SPLIT_SEED)
    val, test = train_test_split(rest, test_size=0.5, stratify=numpy_labels[rest], random_state=SPLIT_SEED)
    return [torch.from_numpy(part).sort().values for part in (train, val, test)]


def hold_out(labels: Tensor) -> list[Tensor]:
    """Indices of train and val, 90/10 per class, each ascending; the same at every call."""
    from sklearn.model_selection import train_test_split

    index = torch.arange(len(labels)).numpy()
    parts = train_test_split(index, test_size=0.1, stratify=labels.numpy(), random_state=SPLIT_SEED)
    return [torch.from_numpy(part).sort().values for part in parts]
