"""Worker processes change when a batch is ready, and nothing else; they let signals pass and end with their rank."""

import os
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data import registry
from syncbn.training.data import workers as processes
from syncbn.training.data.custom import CustomData
from syncbn.training.data.loader import Loader
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from tests.training.checkpoint.test_kills import JOB, check_same_run
from tests.training.checkpoint.test_resume import SMALL, without_speed
from tests.training.images import save_classes, save_masks
from tests.training.jobs import ROOT, LiveJob, compose_config, read_metrics, run_rank, start
from tests.training.trainer.test_train import load_last

HERE = RankContext(0, 1, torch.device("cpu"), torch.float32)
THIRD = RankContext(2, 3, torch.device("cpu"), torch.float32)


def load(*overrides):
    return registry.load_data(compose_config(*overrides).data)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where image files are, by data set."""
    root = tmp_path_factory.mktemp("files")
    save_classes(root / "classes", {"a": 12, "b": 11})
    save_masks(root / "masks", num=7)
    return root


def data_sets(files):
    folder = ["data=image_folder", f"data.path={files / 'classes'}", "data.size=12"]
    masks = ["data=mask_folder", f"data.path={files / 'masks'}", "data.size=12", "data.num_classes=3"]
    return {
        "in memory": ["data=synthetic", "data.num_samples=30", "data.shift=1"],
        "cached": folder,
        "not cached": [*folder, "data.cache=0"],
        "masks": masks,
    }


def batches_of(data, context, workers, *, steps, evaluate_after):
    """Micro-batches of these steps, with an evaluation in between."""
    sampler = Sampler(len(data.train), 5, 2, 0, context.rank, context.world_size)
    found = []
    with Loader(data, context, workers=workers) as loader:
        for step in steps:
            found += loader.micro_batches(sampler, 3, step)
            if step == evaluate_after:
                found += loader.eval_batches(data.val, torch.arange(len(data.val)).split(2))
    return found


def test_what_workers_cannot_be_given_is_an_error_that_names_the_remedy():
    class Local(torch.utils.data.TensorDataset):
        pass

    part = Local(torch.zeros(6, 2), torch.zeros(6))
    data = CustomData(part, part, part)
    with pytest.raises(ConfigError, match=r"data.workers: the data set cannot be sent .*Local.*or use data.workers=0"):
        batches_of(data, HERE, 1, steps=[0], evaluate_after=0)
    assert len(batches_of(data, HERE, 0, steps=[0], evaluate_after=0)) == 5


@pytest.mark.parametrize("name", ["in memory", "cached", "not cached", "masks"])
def test_batches_are_the_same_to_the_bit_whatever_the_number_of_workers(files, name):
    overrides = data_sets(files)[name]
    # From the middle of an epoch into the next; a third of the ranks, some of whose micro-batches are empty.
    wanted = {"steps": range(2, 9), "evaluate_after": 4}
    expected = batches_of(load(*overrides), THIRD, 0, **wanted)
    assert any(len(images) == 0 for images, _ in expected)
    for workers in (1, 3):
        found = batches_of(load(*overrides, f"data.workers={workers}"), THIRD, workers, **wanted)
        for (images, labels), (same_images, same_labels) in zip(found, expected, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_a_jump_to_another_step_gives_the_batches_of_that_step():
    data = load("data=synthetic", "data.num_samples=30")
    sampler = Sampler(len(data.train), 5, 1, 0, 0, 1)
    with Loader(data, HERE, workers=1) as loader:
        for step in (0, 1, 7, 3):
            [(images, _)] = loader.micro_batches(sampler, 0, step)
            index = sampler.shards(step)[0].index
            assert torch.equal(images, data.train_batch(index, 0, sampler.epoch_of(step), torch.float32)[0])


def test_workers_share_what_they_have_decoded(files):
    data = load(*data_sets(files)["cached"])
    sampler = Sampler(len(data.train), 4, 1, 0, 0, 1)
    with Loader(data, HERE, workers=2) as loader:
        for step in range(sampler.steps_per_epoch):
            list(loader.micro_batches(sampler, 0, step))
    assert data.train.images.cache.filled.all()


def test_no_workers_means_no_process(files):
    data = load(*data_sets(files)["cached"])
    with Loader(data, HERE) as loader:
        list(loader.eval_batches(data.val, [torch.arange(2)]))
        assert loader._workers is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named(tmp_path, workers):
    root = save_classes(tmp_path / "photos", {"a": 10, "b": 10})
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    data = load("data=image_folder", f"data.path={root}", "data.cache=0")
    data.__dict__["pixel_stats"] = (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))  # else they meet it first
    message = r"^data.path: cannot read the image '.*photos/[ab]/\d+\.png' \(.*\); repair it, or remove it$"
    with Loader(data, HERE, workers=workers) as loader, pytest.raises(ConfigError, match=message):
        list(loader.eval_batches(data.val, [torch.arange(2)]))


def workers_of(loader):
    return list(loader._workers._processes)


def test_workers_let_signals_pass():
    data = load("data=synthetic", "data.num_samples=30")
    sampler = Sampler(len(data.train), 5, 1, 0, 0, 1)
    with Loader(data, HERE, workers=2) as loader:
        list(loader.micro_batches(sampler, 0, 0))
        for pid in workers_of(loader):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
                os.kill(parent, number)  # the server that they come from
        for step in range(1, 20):
            assert len(list(loader.micro_batches(sampler, 0, step))) == 1


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_worker_that_dies_is_an_error_that_says_what_may_help(workers):
    data = load("data=synthetic", "data.num_samples=30")
    sampler = Sampler(len(data.train), 5, 1, 0, 0, 1)
    with closing(Loader(data, HERE, workers=workers)) as loader:  # the others end too, though no signal ends them
        list(loader.micro_batches(sampler, 0, 0))
        others = [os.pidfd_open(pid) for pid in workers_of(loader)]
        # The pool tells of a death only when nothing else has happened: it is waited for without further batches.
        assert isinstance(processes.submit(loader._workers, die).exception(60), BrokenProcessPool)
        with pytest.raises(TrainingError, match=r"^data.workers: a worker process died; .*--shm-size"):
            [list(loader.micro_batches(sampler, 0, step)) for step in range(1, 50)]
    check_ended(others)


def test_workers_end_with_the_loader_also_where_one_has_died_unseen():
    data = load("data=synthetic", "data.num_samples=30")
    with closing(Loader(data, HERE, workers=3)) as loader:
        list(loader.micro_batches(Sampler(len(data.train), 5, 1, 0, 0, 1), 0, 0))
        workers = [os.pidfd_open(pid) for pid in workers_of(loader)]
        signal.pidfd_send_signal(workers[0], signal.SIGKILL)
    check_ended(workers)


def check_ended(processes):
    """Processes by file descriptor, which is ready to be read when they are gone."""
    for process in processes:
        ended, _, _ = select.select([process], [], [], 60)
        os.close(process)
        assert ended


RANK = """
import time
from tests.training.data.test_loader import *

if __name__ == "__main__":
    data = load("data=synthetic", "data.num_samples=30")
    loader = Loader(data, HERE, workers=2)
    list(loader.micro_batches(Sampler(len(data.train), 5, 1, 0, 0, 1), 0, 0))
    [print(pid) for pid in workers_of(loader)]
    print("ready", flush=True)
    time.sleep(600)  # until the test kills it
"""


@pytest.mark.slow
def test_workers_end_when_their_rank_is_killed(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as rank:
        pids = [int(line) for line in iter(rank.stdout.readline, "ready\n")]
        assert pids
        workers = [os.pidfd_open(pid) for pid in pids]
        rank.kill()
    check_ended(workers)


def test_a_run_that_goes_on_with_other_workers_is_the_same_to_the_bit(job, tmp_path):
    same = [*SMALL, "data.shift=1", "duration=14", "log_every=1", "eval_every=5", "save.every=1", "save.keep=99"]
    whole = job(*same, "run=whole")
    parts = tmp_path / "outputs/parts"
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copyfile(whole / "checkpoints/step_00000004.pt", parts / "checkpoints/step_00000004.pt")  # of 7 in an epoch
    job(*same, "run=parts", "data.workers=2", "data.prefetch=3")
    expected, actual = load_last(whole), load_last(parts)
    for part in ("model", "optimizer", "counters"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0, msg=part)
    measured = [{(r["step"], *r): without_speed(r) for r in read_metrics(run)} for run in (parts, whole)]
    assert measured[0]
    assert all(measured[1][key] == record for key, record in measured[0].items())


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


@pytest.mark.slow
def test_sigterm_to_every_process_leaves_the_workers_alone_and_the_state_is_saved(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert start(whole, *JOB, num_ranks=2).returncode == 0
    with LiveJob(tmp_path, *JOB, "data.workers=2", num_ranks=2) as job:
        job.wait_for("step 9/")
        everything = [job.process.pid, *descendants(job.process.pid)]
        assert len(everything) >= 9  # torchrun, and of each rank: itself, a server, two workers
        for pid in everything:
            os.kill(pid, signal.SIGTERM)
        assert job.finish() != 0
    assert "stopped after step" in job.output, job.output
    assert "Traceback" not in job.output.split("SignalException")[0].split("torch/distributed/elastic")[0]
    done = start(tmp_path, *JOB, "data.workers=1", num_ranks=2)
    assert done.returncode == 0, done.stderr
    check_same_run(tmp_path / "outputs/job", whole / "outputs/job")


@pytest.mark.slow
def test_a_killed_rank_is_restarted_with_workers(tmp_path):
    with LiveJob(tmp_path, *JOB, "data.workers=1", num_ranks=2, options=("--max-restarts", "1"), timeout=200) as job:
        job.wait_for("step 23/")
        os.kill(job.workers()[-1], signal.SIGKILL)
        assert job.finish() == 0, job.output
    assert load_last(tmp_path / "outputs/job")["step"] == 60


@pytest.mark.slow
def test_the_loader_alone_prints_its_speed_and_trains_nothing(tmp_path):
    done = start(tmp_path, "debug=data", "data.workers=1", "batch_size=100", "run=a", num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("loading, rank 0", "loading, rank 1", "loading, all ranks", "1 per rank, 2 batches ahead each",
                "15 of 100 samples over 2 rank(s)"):  # fmt: skip
        assert row in done.stdout
    assert not (tmp_path / "outputs/a/checkpoints").exists()


def test_a_cache_is_measured_a_second_time(files, monkeypatch, capsys):
    from syncbn.training.tasks.measure_data import measure_loading

    config = compose_config("task=data", *data_sets(files)["cached"], "data.workers=0", "batch_size=4")
    metrics = measure_loading(config, HERE, registry.load_data(config.data))
    assert set(metrics) == {"data/samples_per_second"}
    printed = capsys.readouterr().out
    assert "decoding, rank 0" in printed
    assert "from the cache, rank 0" in printed


def test_tasks_with_load_use_workers_too_to_the_same_numbers(files, tmp_path):
    small = [override for override in SMALL if not override.startswith("data")]
    common = (*small, *data_sets(files)["not cached"], "batch_size=5", "duration=2", "data.workers=0", "run=a")
    run = run_rank(tmp_path, common)
    for name, task in (("eval", ("task=eval", "eval.precise_bn=2")), ("recalibrate", ("task=recalibrate",))):
        none = run_rank(tmp_path, (*task, f"load={run}", f"run={name}0"))
        with patch.object(processes, "start", wraps=processes.start) as start_workers:
            some = run_rank(tmp_path, (*task, f"load={run}", "data.workers=1", f"run={name}1"))
        assert start_workers.call_count == 3  # two evaluations, and the statistics between them
        assert read_metrics(none) == read_metrics(some)
