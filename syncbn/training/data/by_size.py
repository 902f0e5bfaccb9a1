"""Batches of images that have different sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BySize:
    """Images or masks of a batch, those of one height and width in a tensor; from the smallest height on."""

    parts: tuple[Tensor, ...]
    """(N, C, H, W) or (N, H, W) each; one of zero rows if the batch has no sample."""
    rows: tuple[Tensor, ...]
    """(N,) int64 for each part, the positions of its samples in the batch."""

    @classmethod
    def of(cls, samples: Sequence[Tensor], empty: Tensor) -> BySize:
        """Samples (C, H, W) or (H, W) in the order of the batch; `empty` is the only part if there is none."""
        found: dict[tuple[int, ...], list[int]] = {}
        for row, sample in enumerate(samples):
            found.setdefault(tuple(sample.shape[-2:]), []).append(row)
        if not found:
            return cls((empty,), (torch.zeros(0, dtype=torch.int64),))
        by_size = [found[size] for size in sorted(found)]
        parts = tuple(torch.stack([samples[row] for row in rows]) for rows in by_size)
        return cls(parts, tuple(torch.tensor(rows) for rows in by_size))

    def map(self, function: Callable[[Tensor], Tensor]) -> BySize:
        """The same with each part replaced by what the function makes of it."""
        return BySize(tuple(map(function, self.parts)), self.rows)


Pixels = Tensor | BySize  # images or targets of a batch


def parts_of(pixels: Pixels) -> tuple[Tensor, ...]:
    """The tensors of a batch: itself, or one for each size."""
    return pixels.parts if isinstance(pixels, BySize) else (pixels,)


def mapped(pixels: Pixels, function: Callable[[Tensor], Tensor]) -> Pixels:
    """What the function makes of a batch, or of each of its parts."""
    return pixels.map(function) if isinstance(pixels, BySize) else function(pixels)


def of_one_size(pixels: Pixels) -> Tensor:
    """A batch that is known to have images of one size."""
    assert isinstance(pixels, Tensor)
    return pixels


def in_order(pixels: Pixels) -> list[Tensor]:
    """The samples of a batch one by one, in its order."""
    if not isinstance(pixels, BySize):
        return [*pixels]
    found = {
        row: sample
        for rows, part in zip(pixels.rows, pixels.parts, strict=True)
        for row, sample in zip(rows.tolist(), part, strict=True)
    }
    return [found[row] for row in sorted(found)]


def each_size(index: Tensor, images: Pixels, targets: Pixels) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Index, images and targets of the samples of one size, for each size of a batch."""
    if not isinstance(images, BySize):
        yield index, images, of_one_size(targets)
        return
    for rows, part, own in zip(images.rows, images.parts, parts_of(targets), strict=True):
        yield index[rows], part, own
