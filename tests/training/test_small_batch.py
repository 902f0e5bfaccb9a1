"""The experiment on small batches, from its runs to the tables of docs/small-batch.md."""

import runpy

import pytest

from tests.training.jobs import ROOT, compose_config, read_metrics

SCRIPT = runpy.run_path(str(ROOT / "benchmarks/small_batch.py"))
TINY = ["data=synthetic", "data.size=8", "data.num_samples=200", "model.width=4", "duration=4", "eval_every=2",
        "log_every=2", "tracker=none", "batch_size=8"]  # fmt: skip
CASES = {
    "synchronized": [],
    "local_2": ["bn.sync=false", "bn.virtual_ranks=4"],
    "group_norm": ["model.norm=group"],
}


def test_the_cases_are_what_they_are_called():
    for case in SCRIPT["CASES"]:
        config = compose_config("experiment=small_batch", f"experiment/small_batch={case}")
        assert SCRIPT["case_of"](config) == case
        assert config.batch_size == 32


def test_runs_become_rows(job, tmp_path):
    runs = [job(*TINY, *options, f"run={case}") for case, options in reversed(CASES.items())]
    curves, ends = SCRIPT["collect"]([*runs, tmp_path])  # the last is no run
    assert [(row["case"], row["step"]) for row in curves] == [(case, step) for case in CASES for step in (2, 4)]
    for row in ends:
        [last] = [r for r in read_metrics(tmp_path / f"outputs/{row['case']}") if r["step"] == 4 and "val/loss" in r]
        assert float(row["eval_loss"]) == pytest.approx(last["val/loss"], abs=1e-3)
        assert (row["eval_loss"] == row["train_loss"]) == (row["case"] == "group_norm")


def test_the_tables_of_the_page_are_those_of_the_raw_numbers():
    page = (ROOT / "docs/small-batch.md").read_text()
    assert all(table in page for table in SCRIPT["tables"]())


def test_the_picture_is_drawn_from_the_raw_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    SCRIPT["plot"](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
