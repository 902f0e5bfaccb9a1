"""Adds up what samples show, and finds what only several samples show together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from syncbn.training.data.dataset import IGNORE
from syncbn.training.data.inspection.inventory import Inventory
from syncbn.training.data.inspection.parts import locate
from syncbn.training.data.inspection.records import Finding, PixelSums, Record

_MOST_SIZES = 10  # sizes that are listed


@dataclass
class SplitTally:
    """Sums over the samples of a split."""

    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    """Samples of each label; of masks: those in which the class occurs."""
    pixels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    pixel_sums: PixelSums | None = None


@dataclass
class DatasetTally:
    """What some samples show, added up; which rank has looked at which makes no difference to the sum."""

    splits: dict[str, SplitTally] = field(default_factory=dict)
    problems: list[tuple[int, str, str, str]] = field(default_factory=list)
    """Position, rule, item and text of each."""
    digests: dict[bytes, list[tuple[int, int | None]]] = field(default_factory=dict)
    """Positions and labels of the samples with these pixels."""

    def add(self, position: int, split: str, record: Record) -> None:
        """Adds a sample."""
        tally = self.splits.setdefault(split, SplitTally())
        tally.samples += 1
        if record.label is not None:
            tally.labels[record.label] += 1
        tally.labels.update(record.labels)
        tally.labels.update(record.pixels.keys())
        tally.pixels.update(record.pixels)
        if record.size is not None:
            tally.sizes[record.size] += 1
            tally.kinds[record.kind] += 1
        _add_pixel_sums(tally, record.pixel_sums)
        self.problems += [(position, *problem) for problem in record.problems]
        if record.digest is not None:
            self.digests.setdefault(record.digest, []).append((position, record.label))

    def merge(self, other: DatasetTally) -> None:
        """Adds the samples of another tally."""
        for split, theirs in other.splits.items():
            mine = self.splits.setdefault(split, SplitTally())
            mine.samples += theirs.samples
            for name in ("labels", "pixels", "sizes", "kinds"):
                getattr(mine, name).update(getattr(theirs, name))
            _add_pixel_sums(mine, theirs.pixel_sums)
        self.problems += other.problems
        for digest, found in other.digests.items():
            self.digests.setdefault(digest, []).extend(found)


def _add_pixel_sums(tally: SplitTally, pixel_sums: PixelSums | None) -> None:
    if pixel_sums is not None and tally.pixel_sums is None:
        tally.pixel_sums = PixelSums([0] * len(pixel_sums.sums), [0] * len(pixel_sums.squares), 0)
    if pixel_sums is not None and tally.pixel_sums is not None:
        tally.pixel_sums.add(pixel_sums)


def summarize(inventory: Inventory, tally: DatasetTally) -> dict[str, Any]:
    """The content of check.json: counts by split, findings in the order of the samples, notes."""
    findings = [*inventory.findings, *_of_samples(inventory, tally), *_of_copies(inventory, tally)]
    findings += _of_classes(inventory, tally)
    return {
        "classes": list(inventory.class_names),
        "splits": {
            split: _describe(tally.splits.get(split, SplitTally()), inventory.class_names)
            for split in dict.fromkeys(part.split for part in inventory.parts)
        },
        "findings": [finding.as_dict() for finding in findings],
        "notes": [*inventory.notes, *_notes(inventory, tally)],
    }


def _of_samples(inventory: Inventory, tally: DatasetTally) -> Iterator[Finding]:
    for position, rule, item, text in sorted(tally.problems):
        yield Finding(rule, locate(inventory.parts, position)[0].split, item, text)


def _of_copies(inventory: Inventory, tally: DatasetTally) -> Iterator[Finding]:
    """Images that are in two splits, or in one with two labels; the later one is named."""
    for copies in _copies(tally):
        first, label = copies[0]
        part, index = locate(inventory.parts, first)
        for position, other_label in copies[1:]:
            other, other_index = locate(inventory.parts, position)
            name, original = other.name(other_index), part.name(index)
            if other.split != part.split:
                yield Finding("duplicate", other.split, name, f"the same image as {original} of {part.split}")
            elif label != other_label:
                yield Finding("two labels", other.split, name, f"the same image as {original}, with another label")


def _copies(tally: DatasetTally) -> Iterable[list[tuple[int, int | None]]]:
    """Positions and labels of images that occur several times, in the order of their first occurrence."""
    return sorted(sorted(found, key=lambda one: one[0]) for found in tally.digests.values() if len(found) > 1)


def _of_classes(inventory: Inventory, tally: DatasetTally) -> Iterator[Finding]:
    train = tally.splits.get("train")
    if train is not None and train.samples:
        for name in _absent(inventory, train):
            why = f": {inventory.if_binary}" if inventory.if_binary and train.pixels.keys() == {0, IGNORE} else ""
            yield Finding("class absent", "train", "", f"no {name}{why}")


def _absent(inventory: Inventory, tally: SplitTally) -> list[str]:
    expected = inventory.class_names if inventory.expected is None else inventory.expected
    return [name for number, name in enumerate(inventory.class_names) if name in expected and not tally.labels[number]]


def _notes(inventory: Inventory, tally: DatasetTally) -> Iterator[str]:
    for split, found in sorted(tally.splits.items()):
        if split != "train" and (absent := _absent(inventory, found)):
            yield f"{split} has no {', '.join(absent)}"
    again: defaultdict[str, int] = defaultdict(int)
    for copies in _copies(tally):
        seen = Counter((locate(inventory.parts, position)[0].split, label) for position, label in copies)
        for (split, _), number in seen.items():
            again[split] += number - 1
    for split, number in sorted(again.items()):
        if number:
            yield f"{split} has {number} images more than once"


def _describe(tally: SplitTally, class_names: Iterable[str]) -> dict[str, Any]:
    """A split in plain containers."""
    counts: dict[str, Any] = {}
    for number, name in enumerate(class_names):
        counts[name] = {"samples": tally.labels[number]}
        if tally.pixels:
            counts[name]["pixels"] = tally.pixels[number]
    described: dict[str, Any] = {"samples": tally.samples, "classes": counts}
    if tally.pixels:
        described["ignored_pixels"] = tally.pixels[IGNORE]
    most = sorted(tally.sizes.items(), key=lambda item: (-item[1], item[0]))
    described["sizes"] = {"distinct": len(most), "most": [[*size, count] for size, count in most[:_MOST_SIZES]]}
    if most:
        sizes = [size for size, _ in most]
        described["sizes"] |= {"smallest": min(sizes, key=_area), "largest": max(sizes, key=_area)}
    described["kinds"] = dict(sorted(tally.kinds.items()))
    if tally.pixel_sums is not None and tally.pixel_sums.count:
        scale = 255 if not any(kind.startswith(("float", "int")) for kind in tally.kinds) else 1
        mean, std = tally.pixel_sums.mean_and_std(scale)
        described |= {"channels": len(mean), "mean": mean, "std": std}
    return described


def _area(size: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    area = 1
    for side in size:
        area *= side
    return area, size
