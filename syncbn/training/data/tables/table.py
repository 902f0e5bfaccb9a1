"""Tables as text: CSV by the standard library, Parquet by pandas or pyarrow, whichever is installed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syncbn.training.config.errors import ConfigError, listed, one_line
from syncbn.training.config.layout import table_file

PARQUET = (".parquet", ".pq")
_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Mistake:
    """Something wrong in a table."""

    key: str
    """The configuration key that it concerns."""
    row: int
    """The number of the line as people see it; see `Table.rows`."""
    column: str
    text: str

    @property
    def place(self) -> str:
        """Row and column, for messages."""
        return f"row {self.row}, column {self.column!r}"


@dataclass(frozen=True)
class Table:
    """The cells of a table, as text without surrounding blanks; an empty cell is ""."""

    path: Path
    columns: Mapping[str, Sequence[str]]
    rows: Sequence[int]
    """The number of each row as people see it: in CSV the header is row 1, in Parquet the first row is row 0."""
    mistakes: Sequence[Mistake] = field(default=())
    """Rows that are left out, because they have more or fewer cells than the header."""

    def __len__(self) -> int:
        return len(self.rows)

    def mistake(self, key: str, position: int, column: str, text: str) -> Mistake:
        """A mistake in a cell."""
        return Mistake(key, self.rows[position], column, text)

    def cells(self, key: str, column: str) -> Sequence[str]:
        """The cells of a column.

        Raises:
            ConfigError: there is no such column; the message begins with the key.
        """
        if column not in self.columns:
            raise ConfigError(f"{key}: no column {column!r} in {str(self.path)!r}; it has"
                              f" {listed(list(self.columns), 20)}")  # fmt: skip
        return self.columns[column]


def read_table(path: Path, key: str = "data.path") -> Table:
    """Reads a CSV file (UTF-8; separated by comma, semicolon or tab, whichever the header has most of) or Parquet.

    Raises:
        ConfigError: no such file, or one that cannot be read; no row; two columns of one name.
    """
    table_file(path, key)
    table = _read_parquet(path, key) if path.suffix.lower() in PARQUET else _read_csv(path, key)
    if not table.rows and not table.mistakes:
        raise ConfigError(f"{key}: {str(path)!r} has no row below its header")
    return table


def _read_csv(path: Path, key: str) -> Table:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            lines = list(csv.reader(file, delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        reason = "is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else f"is no CSV ({error})"
        raise ConfigError(f"{key}: {str(path)!r} {reason}; save it as CSV in UTF-8") from None
    header = [name.strip() for name in lines[0]] if lines else []
    again = sorted({name for name in header if header.count(name) > 1 and name})
    if not any(header) or again:
        found = f"two columns {again[0]!r}" if again else "none"
        raise ConfigError(f"{key}: expected a header with names of columns in {str(path)!r}, found {found}")
    rows, kept, mistakes = list[int](), list[list[str]](), list[Mistake]()
    for number, line in enumerate(lines[1:], start=2):
        if len(line) == len(header):
            rows.append(number)
            kept.append(line)
        elif any(cell.strip() for cell in line):  # otherwise a blank line
            column = header[min(len(line), len(header) - 1)]
            text = f"{len(line)} cells, the header has {len(header)}; quote cells with a {delimiter!r} in them"
            mistakes.append(Mistake(key, number, column, text))
    columns = {name: [line[number].strip() for line in kept] for number, name in enumerate(header) if name}
    return Table(path, columns, rows, mistakes)


def _read_parquet(path: Path, key: str) -> Table:
    try:
        columns = parquet_columns(path)
    except ImportError:
        remedy = f"pip install pyarrow, or save {path.name} as CSV"
        raise ConfigError(f"{key}: Parquet needs pandas or pyarrow; {remedy}") from None
    except Exception as error:  # of many types
        raise ConfigError(f"{key}: {str(path)!r} cannot be read ({one_line(error)})") from None
    texts = {str(name): [_text(value) for value in values] for name, values in columns.items()}
    return Table(path, texts, range(len(next(iter(texts.values()), ()))))


def parquet_columns(path: Path) -> Mapping[str, Sequence[Any]]:
    """Columns of a Parquet file, by pyarrow or else by pandas."""
    try:
        from pyarrow import parquet
    except ImportError:
        return pandas_columns(path)
    columns: Mapping[str, Sequence[Any]] = parquet.read_table(path).to_pydict()
    return columns


def pandas_columns(path: Path) -> Mapping[str, Sequence[Any]]:
    """Columns of a Parquet file, by pandas and whichever engine it finds."""
    import pandas

    frame = pandas.read_parquet(path)
    return {name: frame[name].tolist() for name in frame.columns}


def _text(value: Any) -> str:
    """A cell as CSV has it: whole numbers without a point, missing ones empty, true and false as 1 and 0."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value) in ("<NA>", "NaT"):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():  # whole numbers beside missing ones are read as such
        return str(int(value))
    return str(value).strip()
