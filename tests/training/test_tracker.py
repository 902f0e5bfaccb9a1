"""Tracking can fail; training goes on, and metrics.jsonl has everything."""

import json
import logging

import pytest

from syncbn.training import schedules
from syncbn.training.config import CosineConfig, TrackerConfig
from syncbn.training.tracker import Tracker


def test_a_wandb_that_cannot_start_is_one_warning_and_nothing_else(tmp_path, monkeypatch, caplog):
    import wandb

    def refuse(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(TrackerConfig("offline", "syncbn", None), tmp_path, {}, active=True)
        tracker.start()
        tracker.log(3, {"train/loss": 0.5})
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed and is switched off, metrics.jsonl goes on: no route to host"
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "train/loss": 0.5}


def test_off_rank_zero_nothing_is_written(tmp_path):
    tracker = Tracker(TrackerConfig("offline", "syncbn", None), tmp_path, {}, active=False)
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_lacks_stay_readable(tmp_path):
    tracker = Tracker(TrackerConfig("disabled", "syncbn", None), tmp_path, {}, active=True)
    tracker.log(0, {"train/loss": float("nan"), "val/loss": float("inf")})
    tracker.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record == {"step": 0, "train/loss": "nan", "val/loss": "inf"}


def test_warmup_is_linear_and_the_cosine_ends_at_its_final_share():
    share = schedules.build(CosineConfig("cosine", "4", 0.1), num_steps=20, steps_per_epoch=5)
    assert [share(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert share(4) == 1.0
    assert share(12) == pytest.approx(0.55)
    assert share(20) == pytest.approx(0.1)


def test_an_online_run_goes_on_under_its_id_and_no_other_run_takes_it(tmp_path, monkeypatch):
    import wandb

    started = []

    class Run:
        id = "abc123"

        def define_metric(self, *_, **__): ...
        def finish(self, **_): ...

    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or Run())

    def attempt(directory, mode, state=None):
        directory.mkdir(exist_ok=True)
        tracker = Tracker(TrackerConfig(mode, "syncbn", None), directory, {}, active=True)
        if state is not None:
            tracker.load_state_dict(state)
        tracker.start()
        tracker.close()
        return tracker.state_dict(), (started[-1]["id"], started[-1]["resume"])

    state, first = attempt(tmp_path / "a", "online")
    assert first == (None, "allow")
    assert attempt(tmp_path / "a", "online", state)[1] == ("abc123", "allow")
    assert attempt(tmp_path / "b", "online", state)[1] == (
        None,
        "allow",
    )  # another run, from the first one's checkpoint
    assert attempt(tmp_path / "a", "offline", state)[1] == (None, None)  # which wandb cannot continue
