"""The samples of a data set, and a look at one of them. Worker processes have copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from syncbn.training.config.errors import SampleError, one_line
from syncbn.training.data.custom import CustomData
from syncbn.training.data.dataset import IGNORE, Rows
from syncbn.training.data.decoding import Decoded, as_classes
from syncbn.training.data.inspection.records import PixelSums, Record

_DIGEST_BYTES = 16


class Part(Protocol):
    """Protocol of some samples of one split."""

    @property
    def split(self) -> str:
        """Name of the split."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file of a sample, or its position."""

    def look(self, index: int) -> Record:
        """What a sample shows; never raises for what is wrong with it."""


@dataclass(frozen=True)
class RowsPart:
    """Images and labels as `Rows`, or images alone, or masks alone (those that lack the other).

    Labels in floating point are several of 0 and 1, which have been checked.
    """

    split: str
    images: Rows | None
    labels: Rows | None
    num_classes: int | None

    def __len__(self) -> int:
        rows = self.images if self.images is not None else self.labels
        assert rows is not None
        return len(rows)

    def name(self, index: int) -> str:
        """See `Part`."""
        rows = self.images if self.images is not None else self.labels
        return rows.source.name(index) if isinstance(rows, Decoded) else f"{self.split}[{index}]"

    def look(self, index: int) -> Record:
        """See `Part`."""
        record, problems = Record(), list[tuple[str, str, str]]()
        if isinstance(self.images, Decoded):
            _look_at_file(self.images, index, record, problems)
        elif self.images is not None:
            _look_at_tensor(self.images[torch.tensor([index])][0], self.name(index), record, problems)
        if isinstance(self.labels, Decoded):
            _look_at_mask(self.labels, index, record, problems)
        elif self.labels is not None:
            label = self.labels[torch.tensor([index])][0]
            if label.is_floating_point():
                record.labels, record.problems = (label > 0.5).nonzero().flatten().tolist(), problems
                return record
            _look_at_label(label, self.num_classes, self.name(index), record, problems, ignore=label.dim() > 0)
        record.problems = problems
        return record


@dataclass(frozen=True)
class ItemsPart:
    """Items of a user's dataset, as the first epoch of the seed 0 draws them."""

    split: str
    data: CustomData
    first: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Shapes of image and target of the first item; None if it cannot be read."""

    @classmethod
    def of(cls, split: str, data: CustomData) -> ItemsPart:
        """All items of a split."""
        part = cls(split, data, None)
        try:
            image, target = part._read(0)
        except SampleError:
            return part
        return cls(split, data, (tuple(image.shape), tuple(target.shape)))

    def __len__(self) -> int:
        return len(getattr(self.data, self.split))

    def name(self, index: int) -> str:
        """See `Part`."""
        return f"{self.split}[{index}]"

    def look(self, index: int) -> Record:
        """See `Part`."""
        record, problems, name = Record(), list[tuple[str, str, str]](), self.name(index)
        try:
            image, target = self._read(index)
        except SampleError as error:
            record.problems = [("item", name, str(error).removeprefix(f"{self.data.key}: {name}: "))]
            return record
        for what, tensor, first in zip(("image", "target"), (image, target), self.first or (None, None), strict=True):
            if first is not None and tensor.shape != first:
                problems.append(("shape", name, f"{what} of shape {tuple(tensor.shape)}, the first has {first}"))
        _look_at_tensor(image, name, record, problems)
        if self.first is not None and image.shape != self.first[0]:
            record.pixel_sums = None  # perhaps of other channels
        if target.is_floating_point():
            if not target.isfinite().all():
                problems.append(("not finite", name, "NaN or infinite values in the target"))
        else:
            _look_at_label(target, self.data.num_classes, name, record, problems, ignore=False)
        record.problems = problems
        return record

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            return self.data.item(getattr(self.data, self.split), index, (0, 0, index))


def look_at(parts: Sequence[Part], positions: Sequence[int]) -> list[tuple[int, Record]]:
    """Looks at samples by their positions in all parts together."""
    found = []
    for position in positions:
        part, index = locate(parts, position)
        found.append((position, part.look(index)))
    return found


def locate(parts: Sequence[Part], position: int) -> tuple[Part, int]:
    """The part that holds a position in all parts together, and the index there."""
    for part in parts:
        if position < len(part):
            return part, position
        position -= len(part)
    raise IndexError("no such sample")


Problems = list[tuple[str, str, str]]


def _look_at_file(images: Decoded, index: int, record: Record, problems: Problems) -> None:
    name = images.source.name(index)
    try:
        image = images.upright(index)
        record.size, record.kind = image.size, image.mode
        row = images.fitted(image, index)
    except Exception as error:  # on a damaged file Pillow's readers raise exceptions of many types
        problems.append(("unreadable", name, one_line(error)))
        return
    record.pixel_sums = _pixel_sums(row)
    record.digest = _digest_of_image(image)


def _look_at_mask(masks: Decoded, index: int, record: Record, problems: Problems) -> None:
    name = masks.source.name(index)
    try:
        mask = masks.upright(index)
    except Exception as error:
        problems.append(("unreadable", name, one_line(error)))
        return
    try:
        values = np.bincount(np.asarray(as_classes(mask)).ravel(), minlength=256)
    except ValueError as error:
        problems.append(("mask", name, one_line(error)))
        return
    if record.size is not None and mask.size != record.size:
        problems.append(("mask size", name, "{}x{} pixels for an image of {}x{}".format(*mask.size, *record.size)))
    assert masks.values is not None
    table = masks.values.table
    unknown = [value for value in values.nonzero()[0].tolist() if table[value] < 0]
    if unknown:
        share = values[unknown].sum() / values.sum()
        problems.append(("mask values", name, f"the values {unknown} in {share:.1%} of its pixels are no classes"))
    for value in values.nonzero()[0].tolist():
        if table[value] >= 0:
            record.pixels[table[value]] = record.pixels.get(table[value], 0) + int(values[value])


def _look_at_label(
    label: Tensor, num_classes: int | None, name: str, record: Record, problems: Problems, *, ignore: bool
) -> None:
    """Looks at an integer label, or at a mask of them in which IGNORE counts as no class if `ignore`."""
    values, counts = label.unique(return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if num_classes is not None:
        outside = [value for value in found if not 0 <= value < num_classes and not (ignore and value == IGNORE)]
        if outside:
            several = "s" if len(outside) > 1 else ""
            shown = ", ".join(map(str, outside[:5]))
            problems.append(("label", name, f"label{several} {shown}, expected 0 to {num_classes - 1}"))
        found = {value: count for value, count in found.items() if value not in outside}
    if label.dim() > 0:
        record.pixels = found
    elif found:
        record.label = next(iter(found))


def _look_at_tensor(image: Tensor, name: str, record: Record, problems: Problems) -> None:
    record.size, record.kind = tuple(image.shape), str(image.dtype).removeprefix("torch.")
    if not image.isfinite().all():
        problems.append(("not finite", name, "NaN or infinite values in the image"))
        return
    record.pixel_sums = _pixel_sums(image)
    content = image.contiguous().cpu().numpy()
    record.digest = blake2b(content.tobytes(), digest_size=_DIGEST_BYTES, person=record.kind.encode()[:16]).digest()


def _pixel_sums(image: Tensor) -> PixelSums:
    """Sums over the pixels of an image (C, ...), exact for integers and order-independent for floats."""
    exact = not (image.is_floating_point() or image.is_complex())
    values = image.to(torch.int64 if exact else torch.float64).flatten(1 if image.dim() > 1 else 0)
    values = values if image.dim() > 1 else values[None]
    sums: list[Any] = [values.sum(1).tolist(), (values * values).sum(1).tolist()]
    if not exact:
        sums = [[Fraction(total) for total in totals] for totals in sums]
    return PixelSums(sums[0], sums[1], values.size(1))


def _digest_of_image(image: Image.Image) -> bytes:
    """Digest of the pixels that training sees before it resizes them: colours, without transparency."""
    if not image.mode.startswith(("I", "F")):  # 16 bits and more are taken as they are
        image = image.convert("RGB")
    head = f"{image.mode} {image.size}".encode()
    return blake2b(head + image.tobytes(), digest_size=_DIGEST_BYTES).digest()
