"""The columns of labels: classes, several labels of 0 and 1, or numbers; and the strata by which rows are divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.training.config.data import TableConfig
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.tables.table import Mistake, Table

UNKNOWN = -1.0  # the label that is not known, which loss.ignore_index=-1 leaves out
_NUM_BINS = 10  # of a column of numbers, by which rows are divided


@dataclass(frozen=True)
class Targets:
    """The targets of the rows."""

    values: Tensor
    """Classes (N,) int64, or labels or numbers (N, columns) float32; undefined in the rows with a mistake."""
    names: tuple[str, ...]
    """Names of the classes; where there are none, of the columns."""
    strata: Sequence[Sequence[int]]
    """What every split should have as much of: the class of each row, its labels, or the tenth its number is in."""


def read_targets(table: Table, config: TableConfig, mistakes: dict[int, Mistake]) -> Targets:
    """Reads the columns of `data.label`.

    Args:
        mistakes: by position; gets those of rows that have none yet.

    Raises:
        ConfigError: a column is missing; the labels are no classes.
    """
    columns = [table.cells("data.label", name) for name in config.labels]
    if config.kind == "classes":
        return _classes(table, config.labels[0], columns[0], mistakes)
    values = torch.zeros(len(table), len(columns))
    for number, (name, cells) in enumerate(zip(config.labels, columns, strict=True)):
        for position, cell in enumerate(cells):
            value = _number(cell)
            wrong = _why_wrong(cell, value, config.kind)
            if wrong or value is None:
                mistakes.setdefault(position, table.mistake("data.label", position, name, wrong))
            else:
                values[position, number] = value
    strata = _by_label(values) if config.kind == "labels" else _by_size(values[:, 0].tolist())
    return Targets(values, tuple(config.labels), strata)


def _classes(table: Table, name: str, cells: Sequence[str], mistakes: dict[int, Mistake]) -> Targets:
    found = {cell for cell in cells if cell}
    numbers = {cell: _number(cell) for cell in found}
    if all(number is not None for number in numbers.values()):
        position = next((at for at, cell in enumerate(cells) if cell and not (numbers[cell] or 0.0).is_integer()), None)
        if position is not None:
            raise ConfigError(
                f"data.label: row {table.rows[position]}, column {name!r} of {str(table.path)!r}: {cells[position]} is"
                " a number, expected classes; data.target=numbers (with loss=mse), or give the classes names"
            )
        # Whole numbers beside an empty cell have a point in the CSV files of some programs.
        cells = [cell.partition(".")[0] for cell in cells]
        ordered = sorted({cell for cell in cells if cell}, key=lambda cell: (int(float(cell)), cell))
    else:
        ordered = sorted(found)
    if len(ordered) < 2 and not (ordered and "" in cells):  # an empty cell is told by its row
        raise ConfigError(f"data.label: expected two classes or more in column {name!r} of {str(table.path)!r}, found"
                          f" {ordered[0] if ordered else 'none'}")  # fmt: skip
    for position, cell in enumerate(cells):
        if not cell:
            mistake = table.mistake("data.label", position, name, "no class; fill it in, or remove the row")
            mistakes.setdefault(position, mistake)
    number_of = {cell: number for number, cell in enumerate(ordered)}
    labels = [number_of.get(cell, 0) for cell in cells]
    return Targets(torch.tensor(labels), tuple(ordered), [[label] for label in labels])


def _why_wrong(cell: str, value: float | None, kind: str) -> str:
    """What is wrong with a cell; empty if nothing is."""
    if kind == "numbers":
        return "" if value is not None else f"{cell!r} is no number; fill it in, or remove the row"
    if value is not None and (0 <= value <= 1 or value == UNKNOWN):
        return ""
    return f"{cell!r} is no label; expected 0 or 1, or -1 for unknown with loss.ignore_index=-1"


def _number(cell: str) -> float | None:
    """The finite number that a cell holds; None for any other."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in cell else None


def _by_label(values: Tensor) -> list[list[int]]:
    """The labels that a row has; one more stands for none of them."""
    return [[label for label, value in enumerate(row) if value > 0.5] or [len(row)] for row in values.tolist()]


def _by_size(numbers: Sequence[float]) -> list[list[int]]:
    """Which tenth of all rows a number is in, equal ones in the same."""
    first: dict[float, int] = {}
    for rank, number in enumerate(sorted(numbers)):
        first.setdefault(number, rank)
    return [[_NUM_BINS * first[number] // len(numbers)] for number in numbers]
