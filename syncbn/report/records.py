"""Reading metrics.jsonl for the report: line by line, in one pass, and thinned while it is read.

Memory depends on how many metrics there are, and not on how long a run is. The same file gives the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncbn.report.metric_names import BN, FREEZE, STEP

MOST = 1000  # maximum number of points per metric; a longer record is kept as means over steps of equal number
# Of longer records the numbers of layers are read from fewer lines, of the n-th DENSE lines from every n-th: reading
# numbers is what takes time, most of them are of layers, and a heatmap has 400 columns at most.
DENSE = 3000
NUM_BUFFERED = 2048  # records that are held until their numbers are distributed over the metrics
_MAX_STEP = 2**53  # a larger one is no exact position on an axis


@dataclass
class Series:
    """A metric over the steps of a run.

    Attributes:
        points: by step in ascending order; values may be NaN or infinite. Of a long record, each is the mean of the
            finite values of as many steps, at the last step of them.
        last: the last recorded value.
        last_step: its step.
        num_bad: the number of values that were not finite.
        first_bad: the first step of those.
        is_thinned: whether points are means.
    """

    points: dict[int, float] = field(default_factory=dict)
    last: float = math.nan
    last_step: int = -1
    num_bad: int = 0
    first_bad: int = -1
    is_thinned: bool = False


def read_records(lines: Iterable[str]) -> tuple[dict[str, Series], list[str]]:
    """The metrics in lines of JSON, and remarks about lines that are damaged, or read in part.

    Of several records of one step that follow each other, the last one counts, for each key.
    """
    metrics = _Metrics()
    num_with_layers, num_cut, num_damaged = 0, 0, 0
    step, pending = -1, dict[str, Any]()
    uncut = ""  # the latest line, if it was cut
    for line in lines:
        has_layers = f', "{BN}/' in line
        every = 1 + num_with_layers // DENSE
        text = _without_layers(line) if has_layers and num_with_layers % every else line
        num_with_layers += has_layers
        try:
            record = json.loads(text)
            now = _step(record)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            num_damaged += bool(line.strip())
            continue
        num_cut += text is not line
        if has_layers:
            uncut = "" if text is line else line
        if now == step:
            pending |= record
        else:
            metrics.add(step, pending)
            step, pending = now, record
    metrics.add(step, pending)
    if uncut:  # what the layers were at the end is shown
        metrics.add(*_layers_of(uncut))
    remarks = [f"{num_damaged} damaged line(s) left out"] if num_damaged else []
    if num_cut:
        whole = num_with_layers - num_cut
        remarks.append(
            f"of {num_with_layers} records with numbers of layers, these were read from {whole} and the last"
        )
    return metrics.series(), remarks


def _step(record: dict[str, Any]) -> int:
    """Takes the step out of a record.

    Raises:
        TypeError, LookupError, AttributeError: there is none that is a position on an axis.
    """
    step = record.pop(STEP)
    if not isinstance(step, int) or not 0 <= step <= _MAX_STEP:
        raise TypeError
    return step


def _without_layers(line: str) -> str:
    """The record without the numbers of layers, if these are its end, as they are in what the trainer writes."""
    head, _, tail = line.partition(f', "{BN}/')
    is_end = tail.endswith("}\n") and tail.count('": ') == tail.count(f'"{BN}/') + 1
    return head + "}" if is_end else line


def _layers_of(line: str) -> tuple[int, dict[str, Any]]:
    """Step and numbers of layers of a record; 0 and none if it is damaged."""
    try:
        record = json.loads(line)
        return _step(record), {key: value for key, value in record.items() if key.startswith(f"{BN}/")}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0, {}


class _Metrics:
    """The metrics of the records that were added, with a buffer of records by their keys.

    Most records of a run have the same keys, so that the numbers of a buffer make a matrix.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, ...], tuple[list[int], list[NDArray[np.float64]]]] = {}
        self._num_buffered, self._newest = 0, -1
        self._thinning: dict[str, _Thinning] = {}

    def add(self, step: int, record: dict[str, Any]) -> None:
        if not set(map(type, record.values())) <= {float}:
            numbers = {key: number_of(value) for key, value in record.items()}
            record = {key: number for key, number in numbers.items() if number is not None}
        if not record:
            return
        if step < self._newest:  # of records that are out of order the later one counts, too
            self._empty()
        self._newest = step
        steps, rows = self._buffers.setdefault(tuple(record), ([], []))
        steps.append(step)
        rows.append(np.fromiter(record.values(), np.float64, len(record)))
        self._num_buffered += 1
        if self._num_buffered == NUM_BUFFERED:
            self._empty()

    def series(self) -> dict[str, Series]:
        self._empty()
        return {key: thinning.series() for key, thinning in self._thinning.items()}

    def _empty(self) -> None:
        for keys, (steps, rows) in self._buffers.items():
            for key, column in zip(keys, np.stack(rows).T, strict=True):
                if key not in self._thinning:
                    self._thinning[key] = _Switch() if key.startswith(f"{FREEZE}/") else _Thinning()
                self._thinning[key].extend(steps, column)
        self._buffers, self._num_buffered = {}, 0


class _Thinning:
    """A metric while it is read: value by value at first, in a long run as means over bins of equally many steps.

    A bin is as wide as 2^k records, so that with records at even distances no bin has more of them than another. Where
    bins become too many, each is merged with its neighbor.
    """

    def __init__(self) -> None:
        self._series = Series()
        self._origin, self._width = 0, 0  # in steps; a width of 0 stands for no bins
        self._bins = np.empty((3, 0))  # of each bin: its last step, the sum of its finite values, and their number

    def extend(self, steps: list[int], values: NDArray[np.float64]) -> None:
        """Takes further values; the steps are in ascending order, but may begin before those of the last call."""
        series, bad = self._series, ~np.isfinite(values)
        if bad.any():
            series.first_bad = series.first_bad if series.num_bad else steps[int(bad.argmax())]
            series.num_bad += int(bad.sum())
        if steps[-1] >= series.last_step:
            series.last_step, series.last = steps[-1], float(values[-1])
        if self._width:
            self._merge(np.array(steps, dtype=np.float64), values)
            return
        series.points.update(zip(steps, values.tolist(), strict=True))
        if len(series.points) > MOST:
            points = sorted(series.points.items())
            ordered = np.array([step for step, _ in points], dtype=np.float64)
            self._origin, self._width = points[0][0], int(np.median(np.diff(ordered)))
            self._merge(ordered, np.array([value for _, value in points]))

    def series(self) -> Series:
        """The metric as read so far."""
        series = self._series
        if self._width:
            last, total, count = self._bins
            means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
            series.points = dict(zip(last.astype(int).tolist(), means.tolist(), strict=True))
            series.is_thinned = True
        else:
            series.points = dict(sorted(series.points.items()))
        return series

    def _merge(self, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        finite = np.isfinite(values)
        entries = np.concatenate([self._bins, [steps, np.where(finite, values, 0.0), finite]], axis=1)
        entries = entries[:, np.argsort(entries[0], kind="stable")]
        while True:
            numbers, begins = np.unique((entries[0] - self._origin) // self._width, return_index=True)
            if len(numbers) <= MOST:
                break
            self._width *= 2
        last = np.maximum.reduceat(entries[0], begins)
        self._bins = np.stack([last, *np.add.reduceat(entries[1:], begins, axis=1)])


class _Switch(_Thinning):
    """A switch that is recorded where it changes: every change is kept, and what repeats the value before is not."""

    def extend(self, steps: list[int], values: NDArray[np.float64]) -> None:
        for step, value in zip(steps, values.tolist(), strict=True):
            if value != self._series.last:
                self._series.points[step] = value
            if step >= self._series.last_step:
                self._series.last_step, self._series.last = step, value


def number_of(value: Any) -> float | None:
    """A recorded value as float (NaN and infinity are recorded as strings); None if it is not a number."""
    if isinstance(value, (int, float, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return None
