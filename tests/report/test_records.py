"""Records are read line by line and thinned while they are read; what is small stays as it was recorded."""

import json
import math
from itertools import pairwise

import pytest

pytest.importorskip("numpy")

from syncbn.report import records
from syncbn.report.records import MOST, read_records


def lines(num_records, every=50, **more):
    for number in range(1, num_records + 1):
        yield json.dumps({"step": number * every, "train/loss": float(number)} | more) + "\n"


class Line(str):
    """A line that knows how many of its kind exist."""

    __slots__ = ()
    alive = most = 0

    def __init__(self, _text):
        Line.alive += 1
        Line.most = max(Line.most, Line.alive)

    def __del__(self):
        Line.alive -= 1


def test_no_more_than_three_lines_are_held_at_a_time():
    Line.alive = Line.most = 0
    metrics, _ = read_records(map(Line, lines(3000)))
    assert metrics["train/loss"].last == 3000.0
    assert Line.most <= 3


@pytest.mark.parametrize("num_records", [1001, 2000, 4500, 12345])
def test_the_points_of_a_long_run_are_means_of_equally_many_records(monkeypatch, num_records):
    monkeypatch.setattr(records, "NUM_BUFFERED", 512)
    series = read_records(lines(num_records))[0]["train/loss"]
    steps = list(series.points)
    assert MOST // 2 <= len(steps) <= MOST
    assert len({after - before for before, after in pairwise(steps[:-1])}) == 1
    assert steps[-1] == series.last_step == num_records * 50
    width = steps[1] // 50 - steps[0] // 50
    assert list(series.points.values())[:2] == [(width + 1) / 2, width + (width + 1) / 2]
    assert (series.last, series.is_thinned) == (num_records, True)


def test_what_fits_is_kept_value_by_value_whatever_the_order_and_the_last_record_of_a_step_counts():
    text = [*lines(MOST), '{"step": 100, "train/loss": "inf"}\n', "{", '{"step": 100, "more": 7}\n']
    metrics, remarks = read_records(text)
    loss = metrics["train/loss"]
    assert list(loss.points) == [number * 50 for number in range(1, MOST + 1)]
    assert (loss.points[100], loss.points[150], loss.last, remarks) == (
        math.inf,
        3.0,
        MOST,
        ["1 damaged line(s) left out"],
    )
    assert (loss.first_bad, loss.num_bad, loss.is_thinned) == (100, 1, False)
    assert metrics["more"].points == {100: 7.0}


def test_values_that_are_not_finite_are_counted_and_not_averaged():
    text = [*lines(2000), *(json.dumps({"step": step, "train/loss": "nan"}) for step in (100_050, 100_100))]
    loss = read_records(text)[0]["train/loss"]
    assert (loss.first_bad, loss.num_bad, str(loss.last)) == (100_050, 2, "nan")
    assert math.isfinite(loss.points[100_000])
    assert math.isnan(loss.points[100_100])


def test_a_switch_keeps_the_steps_at_which_it_changed():
    text = [json.dumps({"step": step, "freeze/a/stats": float(step > 1500)}) for step in range(2000)]
    assert read_records(text)[0]["freeze/a/stats"].points == {0: 0.0, 1501: 1.0}


def test_of_a_very_long_run_the_layers_of_fewer_lines_are_read_and_those_of_the_last(monkeypatch):
    monkeypatch.setattr(records, "DENSE", 10)
    layer = {"bn/a/drift": 0.5, 'bn/a ": b/drift': 0.5, "bn/max_drift": 0.5}
    text = [*lines(39, **dict.fromkeys(["bn/a/drift", "bn/max_drift"], 0.5)), *lines(1, every=2000, **layer)]
    metrics, remarks = read_records(text)
    assert list(metrics["train/loss"].points) == [number * 50 for number in range(1, 41)]
    # Ten, every second of ten, every third of ten, every fourth of ten, and the last, whose odd name forbids to cut it.
    assert len(metrics["bn/a/drift"].points) == 10 + 5 + 3 + 2 + 1
    assert metrics["bn/a/drift"].last_step == metrics['bn/a ": b/drift'].last_step == 2000
    assert remarks == ["of 40 records with numbers of layers, these were read from 21 and the last"]


def test_layers_are_read_from_every_line_where_other_numbers_come_after_them(monkeypatch):
    monkeypatch.setattr(records, "DENSE", 10)
    metrics, remarks = read_records(lines(40, **{"bn/a/drift": 0.5, "val/loss": 1.0}))
    assert len(metrics["bn/a/drift"].points) == len(metrics["val/loss"].points) == 40
    assert remarks == []
    assert read_records(lines(36, **{"bn/a/drift": 0.5}))[0]["bn/a/drift"].last_step == 1800
