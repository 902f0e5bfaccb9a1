"""How often each class occurs in a split, and what training says of classes that do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.data.dataset import IGNORE, Data, Rows
from syncbn.training.data.decoding import Decoded, values_of
from syncbn.training.data.images import ImageData

log = logging.getLogger(__name__)

COUNTED_MASKS = 1000  # of a training set, at the start of a run; all of its labels


@dataclass(frozen=True)
class ClassCounts:
    """Occurrences of each class: labels, or pixels of masks."""

    counts: Tensor
    """(num_classes,) int64."""
    num_ignored: int
    """Pixels that do not count."""

    def absent(self, names: Sequence[str] = ()) -> list[str]:
        """Names of the classes that do not occur; those without a name are called "class 2"."""
        missing = (self.counts == 0).nonzero().flatten().tolist()
        return [names[number] if names else f"class {number}" for number in missing]


def count_classes(labels: Rows, num_classes: int, index: Tensor | None = None) -> ClassCounts:
    """Counts the classes of labels or masks (see `dataset.Split`).

    Args:
        index: (N,) int64, the positions to count; None for all.

    Raises:
        ConfigError: a mask that cannot be read, or holds a value that is no class; the message names file and value.
        ValueError: labels or masks in memory that are no classes.
    """
    found = torch.zeros(IGNORE + 1, dtype=torch.int64) if len(labels.shape) > 1 else torch.zeros(num_classes).long()
    for part in (torch.arange(len(labels)) if index is None else index).split(32 if len(labels.shape) > 1 else 10**6):
        more = torch.bincount(values_of(labels, part).to(torch.int64), minlength=len(found))
        if len(more) > len(found):
            raise ValueError(f"expected classes below {num_classes}, got {len(more) - 1}")
        found += more
    if found[num_classes:IGNORE].any():
        raise ValueError(f"expected classes below {num_classes}, got {int(found[:IGNORE].nonzero().max())}")
    return ClassCounts(found[:num_classes], int(found[IGNORE]) if len(labels.shape) > 1 else 0)


def check_training_classes(data: Data) -> None:
    """Logs a warning that names the classes that the training set lacks.

    Of masks at most COUNTED_MASKS are looked at, evenly spaced. Targets of `data=custom` are not looked at.

    Raises:
        ConfigError: masks of 0 and 255 with two classes, where 255 does not count: nothing but class 0 would be learnt;
            a mask that cannot be read.
    """
    if not isinstance(data, ImageData) or data.num_classes is None or data.targets == "numbers":
        return
    labels, num = data.train.labels, len(data.train)
    num_counted = min(num, COUNTED_MASKS) if data.has_masks else num
    if data.targets == "labels":
        _warn_of_absent_labels(labels[torch.arange(num)], data.class_names)
        return
    counted = count_classes(labels, data.num_classes, torch.arange(num_counted) * num // num_counted)
    absent = counted.absent(data.class_names)
    if not absent:
        return
    # No other value occurs beside 0 and the one that does not count, which is 255 by default.
    is_binary = data.num_classes == 2 and counted.counts[0] and counted.num_ignored
    values = labels.values if isinstance(labels, Decoded) else None
    if is_binary and values is not None and not values.given and values.table[255] == IGNORE:
        raise ConfigError(
            "data.values: the training masks hold 0 and 255 alone, and 255 is data.ignore, which does not count: class"
            " 1 would not be learnt; data.values={0:0,255:1} makes it class 1"
        )
    part = f"{num_counted} of the {num}" if num_counted < num else f"{num}"
    log.warning("no %s of the %s training %s: the model cannot learn %s", listed(absent), part,
                "masks" if data.has_masks else "images", "it" if len(absent) == 1 else "them")  # fmt: skip


def _warn_of_absent_labels(labels: Tensor, names: Sequence[str]) -> None:
    """Warns of labels that no training image has, or every one."""
    share = (labels > 0.5).to(torch.float64).mean(0)
    for what, found in (("none", share == 0), ("every one", share == 1)):
        if found.any():
            named = listed([names[number] for number in found.nonzero().flatten().tolist()])
            log.warning("%s of the %d training images has %s: the model cannot learn when it is there", what,
                        len(labels), named)  # fmt: skip
