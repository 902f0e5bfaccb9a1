"""The rows of a table as samples: files, targets, groups, and what is wrong with any of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from syncbn.training.config.data import TableConfig
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded
from syncbn.training.data.masks import MaskValues
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.tables.dividing import folds_of, hold_out, three_splits
from syncbn.training.data.tables.table import Mistake, Table, read_table
from syncbn.training.data.tables.targets import Targets, read_targets

_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class CellFiles:
    """Image files that cells of a table name, as a `decoding.Source`."""

    paths: Sequence[str]
    rows: Sequence[int]
    column: str

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> Path:
        """The path of the file."""
        return Path(self.paths[position])

    def name(self, position: int) -> str:
        """The path, and the row and the column that name it."""
        return f"{self.paths[position]} (row {self.rows[position]}, column {self.column})"


@dataclass(frozen=True)
class Samples:
    """The rows of a table; all lists are by position, those of rows with a mistake included."""

    table: Table
    config: TableConfig
    images: Sequence[str]
    """Paths of the files."""
    masks: Sequence[str] | None
    targets: Targets | None
    """None with masks."""
    groups: Sequence[str]
    mistakes: dict[int, Mistake]
    """Mistakes by position, at most one of each row."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or of the columns of labels or numbers; empty for masks."""
        return () if self.targets is None else self.targets.names

    @property
    def num_classes(self) -> int:
        """Classes, or columns of labels or numbers."""
        return len(self.class_names) if self.targets is not None else self.config.num_classes or 0

    @property
    def intact(self) -> list[int]:
        """Positions of the rows without a mistake."""
        return [position for position in range(len(self.table)) if position not in self.mistakes]

    def all_mistakes(self) -> list[Mistake]:
        """Mistakes of the file and of its rows, in the order of the table."""
        return sorted([*self.table.mistakes, *self.mistakes.values()], key=lambda mistake: mistake.row)

    def require_none(self) -> None:
        """Raises a ConfigError about the first mistake, if there is any."""
        if found := self.all_mistakes():
            more = f" ({len(found) - 1} more rows have a mistake; task=check lists them all)" if len(found) > 1 else ""
            raise ConfigError(f"{found[0].key}: {found[0].place} of {str(self.table.path)!r}: {found[0].text}{more}")

    def split(self, positions: Sequence[int]) -> Split:
        """Images of these rows, and their labels or masks."""
        prepared = Preparation.of(self.config)
        rows = [self.table.rows[position] for position in positions]
        images = CellFiles([self.images[position] for position in positions], rows, self.config.image)
        if self.masks is None:
            assert self.targets is not None
            return Split(Decoded(images, prepared), self.targets.values[torch.tensor(positions, dtype=torch.int64)])
        assert self.config.mask is not None
        masks = CellFiles([self.masks[position] for position in positions], rows, self.config.mask)
        return Split(Decoded(images, prepared), Decoded(masks, prepared, MaskValues.of(self.config), of=images))

    def strata(self, position: int) -> Sequence[int]:
        """What every split should have as much of as the others, in a row; see `Targets`."""
        return (0,) if self.targets is None else self.targets.strata[position]


def read_samples(config: TableConfig, path: str | None = None, *, divided: bool = True) -> Samples:
    """Reads a table and looks at every row, and whether the files are there; it opens none of them.

    Args:
        path: another table than `data.path`, whose columns are the same; errors then name `eval.path`.
        divided: the columns by which it is divided are read too.

    Raises:
        ConfigError: the table cannot be read, or lacks a column. What is wrong in a row is in `Samples.mistakes`.
    """
    key = "data.path" if path is None else "eval.path"
    table = read_table(Path(path or config.path).expanduser(), key)
    mistakes: dict[int, Mistake] = {}
    images = _paths(table, "data.image", config.image, mistakes)
    masks = None if config.mask is None else _paths(table, "data.mask", config.mask, mistakes)
    targets = None if masks is not None else read_targets(table, config, mistakes)
    groups = [os.path.normpath(path) for path in images]
    if config.group is not None and divided:
        groups = list(table.cells("data.group", config.group))
        _check_groups(table, config.group, groups, images, config.image, mistakes)
    samples = Samples(table, config, images, masks, targets, groups, mistakes)
    if divided:
        _check_given(samples)
    return samples


def divide(samples: Samples) -> dict[str, list[int]]:
    """Positions of the rows of train, val and, if there is any, test; rows with a mistake are in none.

    Raises:
        ConfigError: too few groups to divide, no such fold, or no row of a split.
    """
    config, positions = samples.config, samples.intact
    groups, strata = [samples.groups[one] for one in positions], [samples.strata(one) for one in positions]
    seed = str(config.split_seed)
    if config.split is not None:
        cells = samples.table.cells("data.split", config.split)
        splits = [_SPLITS[cells[position].lower()] for position in positions]
        for wanted, is_there in (("train", "train" in splits), ("val or test", len({*splits}) > 1)):
            if not is_there:
                raise ConfigError(f"data.split: no row for {wanted} in column {config.split!r} of"
                                  f" {str(samples.table.path)!r}; expected train, val and test, or two of them"
                                  " with train among them")  # fmt: skip
    elif config.fold is not None:
        splits = ["test" if held else "train" for held in _in_fold(samples, positions, groups, strata, seed)]
    else:
        _require_groups(samples, groups, 3, "train, val and test")
        splits = three_splits(groups, strata, seed)
    if "val" not in splits:
        rest = [number for number, split in enumerate(splits) if split == "train"]
        few = [groups[number] for number in rest]
        _require_groups(samples, few, 2, "train and val")
        held = hold_out(few, [strata[number] for number in rest], f"{seed}/val")
        for number, is_held in zip(rest, held, strict=True):
            splits[number] = "val" if is_held else "train"
    names = [name for name in ("train", "val", "test") if name in splits]
    return {name: [one for one, split in zip(positions, splits, strict=True) if split == name] for name in names}


def digest_of(samples: Samples, splits: dict[str, list[int]]) -> str:
    """A digest of which image is in which split, whatever the order of rows and the place of the table."""
    cells = samples.table.cells("data.image", samples.config.image)
    lines = sorted(f"{split}\0{cells[position]}" for split, positions in splits.items() for position in positions)
    return sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _in_fold(
    samples: Samples, positions: Sequence[int], groups: Sequence[str], strata: Sequence[Sequence[int]], seed: str
) -> list[bool]:
    """Whether each row is in the fold that is tested."""
    config = samples.config
    if isinstance(config.folds, int):
        _require_groups(samples, groups, config.folds, f"{config.folds} folds")
        return [fold == config.fold for fold in folds_of(groups, strata, config.folds, f"{seed}/fold")]
    cells = samples.table.cells("data.folds", config.folds)
    known = sorted({cells[position] for position in positions})
    if str(config.fold) not in known or len(known) < 2:
        raise ConfigError(f"data.fold: expected one of the folds in column {config.folds!r} of"
                          f" {str(samples.table.path)!r} ({listed(known, 20)}), got {config.fold!r}")  # fmt: skip
    return [cells[position] == str(config.fold) for position in positions]


def _require_groups(samples: Samples, groups: Sequence[str], least: int, what: str) -> None:
    found, column = len(set(groups)), samples.config.group
    if found < least:
        of = f"groups in column {column!r}" if column else "images"
        raise ConfigError(f"data.{'group' if column else 'path'}: {found} {of} of {str(samples.table.path)!r} cannot be"
                          f" divided into {what}; give a column for data.split, or more data")  # fmt: skip


def _paths(table: Table, key: str, column: str, mistakes: dict[int, Mistake]) -> list[str]:
    """The paths that cells name, relative to the table; a mistake for each that leads to no file."""
    parent, cells = table.path.parent, table.cells(key, column)
    paths = [str(parent / cell) for cell in cells]
    known: dict[str, set[str]] = {}
    for position, (cell, path) in enumerate(zip(cells, paths, strict=True)):
        # A listing of each directory instead of a look at each file, which takes long where disks are far away.
        directory, name = os.path.split(path)
        if directory not in known:
            known[directory] = _names_in(directory)
        if not cell:
            text = "no file; fill it in, or remove the row"
        elif name not in known[directory] and not os.path.exists(path):
            text = f"no file {path!r}; paths are relative to the table"
        else:
            continue
        mistakes.setdefault(position, table.mistake(key, position, column, text))
    return paths


def _names_in(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()


def _check_groups(
    table: Table, column: str, groups: Sequence[str], images: Sequence[str], of_images: str,
    mistakes: dict[int, Mistake],
) -> None:  # fmt: skip
    """A mistake for each row without a group, and for an image that is in two of them."""
    first: dict[str, int] = {}
    for position, (group, image) in enumerate(zip(groups, images, strict=True)):
        other = first.setdefault(os.path.normpath(image), position)
        if not group:
            text = "empty; fill it in, or remove the row: it may belong to any group"
            mistakes.setdefault(position, table.mistake("data.group", position, column, text))
        elif groups[other] != group and other not in mistakes:
            text = f"the image of row {table.rows[other]}, which is of another group in {column!r} ({groups[other]})"
            mistakes.setdefault(position, table.mistake("data.group", position, of_images, text))


def _check_given(samples: Samples) -> None:
    """A mistake for each row whose split or fold is empty, unknown, or another than that of its group."""
    config, table = samples.config, samples.table
    if config.split is not None:
        key, column = "data.split", config.split
    elif config.fold is not None and isinstance(config.folds, str):
        key, column = "data.folds", config.folds
    else:
        return
    cells, first = table.cells(key, column), dict[str, int]()
    for position, cell in enumerate(cells):
        if position in samples.mistakes:
            continue
        split = _SPLITS.get(cell.lower()) if key == "data.split" else cell
        other = first.setdefault(samples.groups[position], position)
        text = ""
        if not split:
            expected = "train, val or test" if key == "data.split" else "a fold"
            text = f"expected {expected}, got {cell!r}"
        elif other != position and _differ(cells[other], cell, key):
            what = f"the group {samples.groups[position]!r}" if config.group else "the same image"
            text = f"{cell!r}, but {what} is in {cells[other]!r} too (row {table.rows[other]}); keep it in one of them"
        if text:
            samples.mistakes[position] = table.mistake(key, position, column, text)
            if other == position:
                del first[samples.groups[position]]


def _differ(one: str, other: str, key: str) -> bool:
    return _SPLITS.get(one.lower()) != _SPLITS.get(other.lower()) if key == "data.split" else one != other
