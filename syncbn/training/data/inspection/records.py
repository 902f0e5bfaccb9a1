"""What a look at a data set finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

# Everything that is a finding, by its rule; docs/data.md has the same list.
RULES = {
    "layout": "directories or splits that a run would refuse",
    "stray image": "an image outside of the directories that are read",
    "row": "a row of a table that a run would refuse",
    "unreadable": "a file that cannot be read, or pixels that cannot be used",
    "no mask": "an image without a mask",
    "no image": "a mask without an image",
    "same name": "two files for one name",
    "mask": "a mask that is no palette or gray of 8 bits",
    "mask size": "a mask of another size than its image",
    "mask values": "a mask with values that are no classes",
    "item": "an item that raises, or is no image and target",
    "shape": "an image or target of another shape than the first of its split",
    "not finite": "an image or target with NaN or infinite values",
    "label": "a label outside of the classes",
    "duplicate": "the same image in two splits",
    "two labels": "the same image with two labels in one split",
    "class absent": "a class that never occurs in training",
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a data set."""

    rule: str
    """One of RULES."""
    split: str
    """Empty if it concerns no single split."""
    item: str
    """The file, or the position in the split; empty if it concerns more than one."""
    text: str

    def as_dict(self) -> dict[str, Any]:
        """The finding as an entry of check.json."""
        return asdict(self)

    def line(self) -> str:
        """The finding as a line of the console."""
        return ": ".join(part for part in (self.item or self.split, self.text) if part)


Number = int | Fraction  # sums of them do not depend on their order


@dataclass
class PixelSums:
    """Exact sums over the pixels of images, by channel."""

    sums: list[Number]
    squares: list[Number]
    count: int
    """Pixels."""

    def add(self, other: PixelSums) -> None:
        """Adds the sums of other images of as many channels."""
        self.sums = [one + another for one, another in zip(self.sums, other.sums, strict=True)]
        self.squares = [one + another for one, another in zip(self.squares, other.squares, strict=True)]
        self.count += other.count

    def mean_and_std(self, scale: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation by channel, divided by `scale`."""
        means = [Fraction(total) / self.count for total in self.sums]
        variances = [
            (Fraction(square) - total * mean) / max(1, self.count - 1)
            for total, square, mean in zip(self.sums, self.squares, means, strict=True)
        ]
        return [float(mean / scale) for mean in means], [float(variance) ** 0.5 / scale for variance in variances]


@dataclass
class Record:
    """What a single sample shows."""

    label: int | None = None
    labels: Sequence[int] = ()
    """Where an image has several labels: those that it has."""
    size: tuple[int, ...] | None = None
    """Width and height of an image file; the shape of a tensor."""
    kind: str = ""
    """Pillow's mode of an image file; the type of a tensor."""
    pixel_sums: PixelSums | None = None
    digest: bytes | None = None
    """Digest of the pixels; None if they could not be read."""
    pixels: dict[int, int] = field(default_factory=dict)
    """The number of pixels of each class in a mask."""
    problems: Sequence[tuple[str, str, str]] = ()
    """Rule, item and text of what is wrong with it."""
