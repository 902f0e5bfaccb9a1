"""Tracking can fail; training goes on, and metrics.jsonl has everything."""

import json
import logging
import math
import os
import re
import subprocess
import sys
import types
from collections import Counter

import pytest
import torch

from syncbn.report.metric_names import LAYER_TABLE
from syncbn.stats.monitor import LayerSnapshot
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.optim import CosineConfig
from syncbn.training.config.run import TrackerConfig
from syncbn.training.optim import schedules
from syncbn.training.tracking import tracker as tracking
from syncbn.training.tracking.tracker import Tracker, _histograms, _vectors
from tests.training import wandb_servers
from tests.training.checkpoint.test_resume import SMALL
from tests.training.jobs import ROOT, read_metrics, run_job, start
from tests.training.wandb_file import read_config, read_records, read_run


def test_a_wandb_that_cannot_start_is_one_warning_and_nothing_else(tmp_path, monkeypatch, caplog):
    import wandb

    def refuse(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(TrackerConfig("offline", "syncbn", None, 30.0), tmp_path, {}, active=True)
        tracker.start()
        tracker.log(3, {"train/loss": 0.5})
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed and is switched off, metrics.jsonl goes on: no route to host"
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "train/loss": 0.5}


def test_off_rank_zero_nothing_is_written(tmp_path):
    tracker = Tracker(TrackerConfig("offline", "syncbn", None, 30.0), tmp_path, {}, active=False)
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_lacks_stay_readable(tmp_path):
    tracker = Tracker(TrackerConfig("disabled", "syncbn", None, 30.0), tmp_path, {}, active=True)
    tracker.log(0, {"train/loss": float("nan"), "val/loss": float("inf")})
    tracker.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record == {"step": 0, "train/loss": "nan", "val/loss": "inf"}


def snapshot_of(**vectors):
    held = dict.fromkeys(("running_mean", "running_var", "weight", "bias"))
    return LayerSnapshot(**{**held, "stats_frozen": False, "affine_frozen": False, **vectors})


@pytest.mark.parametrize(
    "values", [[1.0, 1.0 + 2**-52], [3.0, 3.0], [0.0, 5e-324], [-1e17, -1e17], [0.5, 2.0], [1.0, math.nan]]
)
def test_a_histogram_of_channels_that_differ_by_rounding_alone_does_not_end_the_wandb_run(values):
    vector = torch.tensor(values, dtype=torch.float64)
    [histogram] = _histograms(_vectors({"a": snapshot_of(running_mean=vector)})).values()
    assert sum(histogram.histogram) == vector.isfinite().sum()
    assert histogram.bins == sorted(set(histogram.bins))


class Wandb:
    """In the place of wandb's run: how often it got what."""

    def __init__(self, *_, **__):
        self.got = Counter()

    def do(self, action):
        action(self)

    def log(self, record):
        self.got.update({"records": 1, "tables": LAYER_TABLE in record, "scalars": "bn/a/drift" in record,
                         "histograms": sum("/hist/" in key for key in record)})  # fmt: skip

    def finish(self, **_): ...


def logged(monkeypatch, directory, steps, layers):
    """What wandb gets of a run that logs and shows its layers at these steps."""
    wandb = Wandb()
    monkeypatch.setattr(tracking, "WandbRun", lambda *_, **__: wandb)
    monkeypatch.setattr(tracking, "_table", lambda _: "a table")
    with Tracker(TrackerConfig("offline", "syncbn", None, 30.0), directory, {}, active=True) as tracker:
        tracker.start()
        for step in steps:
            tracker.log(step, {"train/loss": 0.5}, layers)
            tracker.show_layers(step, layers)
    return wandb.got


def test_wandb_gets_every_scalar_but_histograms_and_tables_ever_more_rarely(tmp_path, monkeypatch):
    layers = {"a": snapshot_of(running_mean=torch.tensor([1.0, 2.0]), drift=torch.tensor([0.5, 0.5]))}
    num_vectors = len(layers["a"].vectors())
    short = logged(monkeypatch, tmp_path, range(50, 2501, 50), layers)
    assert short["histograms"] == short["scalars"] * num_vectors == 50 * num_vectors
    long = logged(monkeypatch, tmp_path, range(50, 100_001, 50), layers)
    assert long["scalars"] == 2000
    assert 200 * num_vectors <= long["histograms"] <= 250 * num_vectors
    assert 200 <= long["tables"] <= 250
    # each tenfold adds the same number, so that a million steps have fewer than four hundred
    tenfold = long["tables"] - logged(monkeypatch, tmp_path, range(50, 10_001, 50), layers)["tables"]
    assert long["tables"] + tenfold < 400
    assert len(read_metrics(tmp_path)) == short["scalars"] + 2000 + 200


@pytest.mark.parametrize("at", range(3))
def test_a_layer_whose_numbers_are_not_finite_is_the_worst_of_all(tmp_path, at):
    drifts = [0.1, 0.3]
    drifts.insert(at, math.nan)
    layers = {str(n): snapshot_of(drift=torch.tensor([d], dtype=torch.float64)) for n, d in enumerate(drifts)}
    with Tracker(TrackerConfig("disabled", "syncbn", None, 30.0), tmp_path, {}, active=True) as tracker:
        tracker.log(1, {}, layers)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["bn/max_drift"] == "nan"


def test_warmup_is_linear_and_the_cosine_ends_at_its_final_share():
    share = schedules.build_schedule(CosineConfig("cosine", "4", 0.1), num_steps=20, steps_per_epoch=5)
    assert [share(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert share(4) == 1.0
    assert share(12) == pytest.approx(0.55)
    assert share(20) == pytest.approx(0.1)


def test_an_online_run_goes_on_under_its_id_and_no_other_run_takes_it(tmp_path, monkeypatch):
    import wandb

    started = []

    class Run:
        def define_metric(self, *_, **__): ...
        def finish(self, **_): ...

    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or Run())
    monkeypatch.setattr(wandb, "login", lambda **_: True)

    def attempt(directory, mode, state=None):
        directory.mkdir(exist_ok=True)
        tracker = Tracker(TrackerConfig(mode, "syncbn", None, 30.0), directory, {}, active=True)
        if state is not None:
            tracker.load_state_dict(state)
        tracker.start()
        tracker.close()
        return tracker.state_dict(), started[-1]

    state, first = attempt(tmp_path / "a", "online")
    assert (first["id"], first["resume"]) == (state["id"], "allow")
    again, second = attempt(tmp_path / "a", "online", state)
    assert (second["id"], again) == (state["id"], state)
    _, other = attempt(tmp_path / "b", "online", state)  # another run, from the first one's checkpoint
    assert other["id"] != state["id"]
    kept, offline = attempt(tmp_path / "a", "offline", state)  # which wandb cannot continue
    assert offline["id"] != state["id"]
    assert "resume" not in offline
    assert kept == state  # the next online attempt can


@pytest.fixture
def online(monkeypatch):
    """`online(address)`: from here on wandb's server is there, for this process and those that it starts."""

    def use(address):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", wandb_servers.KEY)

    return use


def warnings_of(done):
    return [line for line in (done.stdout + done.stderr).splitlines() if "wandb" in line and "overrides: " not in line]


ONLINE = [*SMALL, "tracker=wandb", "tracker.mode=online", "tracker.timeout=3", "log_every=1", "run=a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "server", [wandb_servers.refusing, pytest.param(wandb_servers.hanging, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("num_ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_server_that_cannot_be_used_costs_a_warning_and_the_run_is_recorded_offline(
    tmp_path, online, server, num_ranks
):
    with server() as address:
        online(address)
        done = start(tmp_path, *ONLINE, "duration=3", "collective_timeout=30", num_ranks=num_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    [warning] = warnings_of(done)
    assert "wandb's server cannot be used, this attempt is recorded offline (`wandb sync` sends it): " in warning
    run = tmp_path / "outputs/a"
    assert [record["step"] for record in read_metrics(run) if "train/loss" in record] == [1, 2, 3]
    assert "test/accuracy" in read_metrics(run)[-1]
    assert read_run(run).run_group == "a"
    assert wandb_servers.KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_server_that_goes_in_the_middle_costs_a_warning_that_names_what_to_sync(tmp_path, online):
    with wandb_servers.answering(until="file_stream") as (address, seen):
        online(address)
        done = start(tmp_path, *ONLINE, "duration=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "file_stream" in seen  # it had begun
    [warning] = warnings_of(done)
    assert "wandb failed and is switched off, metrics.jsonl goes on: " in warning
    [path] = re.findall(r"`wandb sync (\S+)` sends what it has kept", warning)
    assert list((tmp_path / path).glob("run-*.wandb"))
    assert [record["step"] for record in read_metrics(tmp_path / "outputs/a") if "train/loss" in record] == [1, 2, 3]


# Two attempts of one run; the second has the state of the first. (A whole job logs tables, which need a real server.)
RESUMED = """
import logging
from pathlib import Path
from syncbn.training.config.run import TrackerConfig
from syncbn.training.tracking.tracker import Tracker

logging.basicConfig(format="%(levelname)s %(message)s")
state = None
for step in range(2):
    with Tracker(TrackerConfig("online", "syncbn", None, 30.0), Path(), {"task": "train"}, active=True) as tracker:
        if state is not None:
            tracker.load_state_dict(state)
        tracker.start()
        tracker.log(step, {"train/loss": 0.5})
        state = tracker.state_dict()
"""


@pytest.mark.slow
def test_an_online_run_that_is_resumed_is_the_same_run_to_the_server(tmp_path, online):
    with wandb_servers.answering() as (address, seen):
        online(address)
        done = subprocess.run(
            [sys.executable, "-c", RESUMED],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert seen.count("RunResumeStatus") == 2
    assert len({name for name in seen if name.startswith("UpsertBucket")}) == 1


@pytest.mark.slow
def test_without_a_key_nobody_is_asked_for_one(tmp_path, online, monkeypatch):
    with wandb_servers.answering() as (address, seen):
        online(address)
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        done = start(tmp_path, *ONLINE, "duration=1")
    assert done.returncode == 0, done.stdout + done.stderr
    [warning] = warnings_of(done)
    assert "no API key; `wandb login` stores one" in warning
    assert not [name for name in seen if name.startswith("UpsertBucket")]


# wandb's own process is killed while a run goes on, then another run is started, as in a multirun.
KILLED = """
import logging, os, signal, threading
from pathlib import Path
from syncbn.training.config.run import TrackerConfig
from syncbn.training.tracking.tracker import Tracker

logging.basicConfig(format="%(levelname)s %(message)s")
for name in ("a", "b"):
    Path(name).mkdir()
    with Tracker(TrackerConfig("offline", "syncbn", None, 30.0), Path(name), {"task": "train"}, active=True) as tracker:
        tracker.start()
        started = threading.Event()
        tracker._wandb.do(lambda run: started.set())
        assert started.wait(60)
        if name == "a":
            children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
            [service] = [int(p) for p in children if b"wandb-core" in Path(f"/proc/{p}/cmdline").read_bytes()]
            os.kill(service, signal.SIGKILL)
            os.waitid(os.P_PID, service, os.WEXITED | os.WNOWAIT)
        for step in range(100):
            tracker.log(step, {"train/loss": 0.5})
print("ended")
"""


@pytest.mark.slow
def test_a_wandb_process_that_dies_costs_a_warning_and_the_next_run_has_another(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr
    [warning] = done.stderr.splitlines()
    assert warning.startswith("WARNING wandb failed and is switched off, metrics.jsonl goes on: ")
    assert [len(read_metrics(tmp_path / name)) for name in ("a", "b")] == [100, 100]
    assert read_run(tmp_path / "b").run_group == "b"


def test_what_an_offline_run_was_made_with_is_in_its_file(job):
    run = job(*SMALL, "tracker=wandb", "duration=1", "run=a", "optimizer.lr=0.03", num_ranks=2)
    recorded = read_run(run)
    assert (recorded.project, recorded.run_group, recorded.job_type) == ("syncbn", "a", "train")
    config = read_config(run)
    assert config["optimizer"]["lr"] == 0.03
    environment = json.loads((run / "environment.json").read_text())
    assert config["environment"] == environment
    assert environment["ranks"] == 2
    assert "optimizer.lr=0.03" in environment["command"]
    assert {"commit", "python", "torch", "wandb", "device"} <= environment.keys()


@pytest.mark.slow
def test_attempts_offline_are_runs_of_one_group_with_one_step_metric(tmp_path):
    for duration in (1, 2):
        run = run_job(tmp_path, *SMALL, "tracker=wandb", f"duration={duration}", "run=a")
    runs = [read_run(run, path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    assert [recorded.run_group for recorded in runs] == ["a", "a"]
    assert runs[0].run_id != runs[1].run_id
    for path in run.glob("wandb/offline-run-*/*.wandb"):
        metrics = {record.metric.glob_name or record.metric.name: record.metric.step_metric
                   for record in read_records(path) if record.WhichOneof("record_type") == "metric"}  # fmt: skip
        assert metrics == {"step": "", "*": "step"}


class Writer:
    """In the place of torch's writer for TensorBoard: what it was called with."""

    calls: list = []

    def __init__(self, directory, **options):
        self.calls.append(("open", directory, options["purge_step"]))

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def writer(monkeypatch):
    """torch's module with a `Writer`, so that the tests need no package of TensorBoard's."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = type("Writer", (Writer,), {"calls": []})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module.SummaryWriter


BESIDE = TrackerConfig("disabled", "syncbn", None, 30.0, tensorboard=True)


def test_tensorboard_gets_the_names_of_metrics_jsonl_and_histograms(tmp_path, writer):
    with Tracker(BESIDE, tmp_path, {"seed": 3}, active=True) as tracker:
        tracker.start(7)
        layers = {"stem": snapshot_of(running_mean=torch.tensor([1.0, 2.0]))}
        tracker.log(8, {"train/loss": 0.5, "val/accuracy": 1}, layers)
    assert writer.calls[0] == ("open", str(tmp_path / "tensorboard"), 8)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    scalars = {name: (value, step) for kind, name, value, step in writer.calls[1:-1] if kind == "add_scalar"}
    assert scalars == {name: (value, 8) for name, value in record.items() if name != "step"}
    [(name, values, step)] = [call[1:] for call in writer.calls[1:-1] if call[0] == "add_histogram"]
    assert (name, values.tolist(), step) == ("bn/stem/hist/running_mean", [1.0, 2.0], 8)
    assert writer.calls[-1] == ("close",)


def test_a_tensorboard_that_fails_is_one_warning_and_nothing_else(tmp_path, writer, caplog):
    writer.add_scalar = lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    with Tracker(BESIDE, tmp_path, {}, active=True) as tracker:
        tracker.start()
        for step in (1, 2):
            tracker.log(step, {"train/loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard failed and is switched off, metrics.jsonl goes on: no space left"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_package_tensorboard_is_an_error_before_training(job, monkeypatch):
    monkeypatch.setattr("syncbn.training.tracking.tensorboard_run.find_spec", lambda _: None)
    without_tracker = [override for override in SMALL if override != "tracker=none"]
    with pytest.raises(ConfigError, match=r"^tracker\.tensorboard: needs the package tensorboard, which is not inst"):
        job(*without_tracker, "tracker=tensorboard", "duration=1", "run=a")


def test_tensorboard_reads_what_a_run_wrote(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step in (0, 2):
        with Tracker(BESIDE, tmp_path, {}, active=True) as tracker:
            tracker.start(step)
            for at in range(step + 1, step + 4):
                tracker.log(at, {"train/loss": 10.0 * step + at})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == {1: 1.0, 2: 2.0, 3: 23.0, 4: 24.0, 5: 25.0}
