"""What a weekend on machines that get preempted does to a job: real processes, killed and stopped."""

import json
import os
import random
import re
import select
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

from tests.once import made_once
from tests.training.jobs import ROOT, LiveJob, read_metrics, run_rank, start
from tests.training.trainer.test_train import load_last

# Float32, so that equality is equality of bits and not of a wide type's leading digits.
STEPS = 60
DATA = ["data=synthetic", "data.num_samples=400", "data.size=8", "data.shift=1", "model.width=4", "batch_size=16"]
JOB = [*DATA, f"duration={STEPS}", "log_every=1", "eval_every=10", "save.every=7", "tracker=none", "run=job"]


@pytest.fixture(scope="module")
def undisturbed(_pool, tmp_path_factory):
    """The run directory of the job when nothing happens to it."""
    return made_once(tmp_path_factory, "undisturbed", lambda cwd: _pool.run(2, run_rank, cwd, JOB)[0])


def check_same_run(run_dir, expected, num_steps=STEPS):
    ours, theirs = load_last(run_dir), load_last(expected)
    assert ours["step"] == theirs["step"] == num_steps
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    records = [
        [{k: v for k, v in record.items() if k != "train/samples_per_second"} for record in read_metrics(directory)]
        for directory in (run_dir, expected)
    ]
    assert records[0] == records[1]  # every step once, with the same numbers


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("rank(s) on cpu", id="before the first step", marks=pytest.mark.slow),
        pytest.param("step 1/", id="first step", marks=pytest.mark.slow),
        pytest.param("step 9/", id="training", marks=pytest.mark.slow),
        pytest.param("step 10/", id="evaluation", marks=pytest.mark.slow),
        pytest.param("step 14/", id="saving", marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_and_the_next_start_goes_on_as_if_nothing_had_happened(tmp_path, undisturbed, moment):
    with LiveJob(tmp_path, *JOB, num_ranks=2, warm_ranks=True) as job:
        job.wait_for(moment)
        job.process.send_signal(signal.SIGTERM)
        assert job.finish() != 0  # it is not done, and says so
    stopped = re.search(r"stopped after step (\d+)", job.output)
    assert stopped, job.output
    run_dir = tmp_path / "outputs/job"
    assert load_last(run_dir)["step"] == int(stopped.group(1)) < STEPS
    assert "Traceback" not in job.output.split("SignalException")[0].split("torch/distributed/elastic")[0]
    done = start(tmp_path, *JOB, num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"at step {stopped.group(1)}" in done.stdout
    check_same_run(run_dir, undisturbed)


def test_ctrl_c_saves_and_leaves_too(tmp_path):
    with LiveJob(tmp_path, *JOB, num_ranks=2, warm_ranks=True) as job:
        job.wait_for("step 9/")
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: to torchrun and to every rank
        assert job.finish() != 0
    stopped = re.search(r"stopped after step (\d+)", job.output)
    assert stopped, job.output
    assert load_last(tmp_path / "outputs/job")["step"] == int(stopped.group(1))


@pytest.mark.slow
def test_ctrl_c_without_torchrun_saves_and_leaves_with_one_line_and_exit_code_130(tmp_path):
    launcher = [sys.executable, str(ROOT / "train.py")]
    with LiveJob(tmp_path, *JOB, num_ranks=1, launcher=launcher) as job:
        job.wait_for("step 9/")
        job.process.send_signal(signal.SIGINT)
        seen = len(job.output)
        assert job.finish() == 130
    told = [line for line in job.output[seen:].splitlines() if not re.search(r"step \d+(/60)?  ", line)]
    assert len(told) == 1, job.output
    assert re.search(r"stopped after step \d+; the same command with this run's name goes on", told[0])


@pytest.mark.slow
def test_sigterm_to_every_process_saves_too(tmp_path):
    # A service manager signals all of them: the ranks then get it twice, once through torchrun.
    with LiveJob(tmp_path, *JOB, num_ranks=2, warm_ranks=True) as job:
        job.wait_for("step 9/")
        for pid in (*job.workers(), job.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert job.finish() != 0
    stopped = re.search(r"stopped after step (\d+)", job.output)
    assert stopped, job.output
    assert load_last(tmp_path / "outputs/job")["step"] == int(stopped.group(1))


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 23])
def test_a_killed_rank_is_restarted_and_the_run_ends_with_the_same_weights(tmp_path, undisturbed, step):
    with LiveJob(tmp_path, *JOB, num_ranks=2, warm_ranks=True, options=("--max-restarts", "1")) as job:
        job.wait_for(f"step {step}/")
        os.kill(job.workers()[-1], signal.SIGKILL)
        assert job.finish() == 0, job.output
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["job"]
    check_same_run(tmp_path / "outputs/job", undisturbed)


def kill(job, victims):
    """Kills processes of a job with SIGKILL; returns when all of its ranks are gone."""
    with ExitStack() as stack:
        ranks = job.workers()
        descriptors = [os.pidfd_open(pid) for pid in ranks]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        for pid in victims(job.process.pid, ranks):
            os.kill(pid, signal.SIGKILL)
        try:
            for descriptor in descriptors:
                left, _, _ = select.select([descriptor], [], [], 60)
                assert left, f"a rank trains on without torchrun:\n{job.output}"
        finally:
            for descriptor in descriptors:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        job.finish()


KILLS = {
    "torchrun": lambda agent, ranks: [agent],
    "rank 0": lambda agent, ranks: ranks[:1],
    "rank 1": lambda agent, ranks: ranks[1:],
    "all ranks": lambda agent, ranks: ranks,
    "everything": lambda agent, ranks: [agent, *ranks],
}


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_leave_and_the_same_command_ends_with_the_same_weights(
    tmp_path, undisturbed
):
    with LiveJob(tmp_path, *JOB, num_ranks=2) as job:
        job.wait_for("step 9/")
        kill(job, KILLS["torchrun"])
    stopped = re.search(r"stopped after step (\d+)", job.output)
    assert stopped, job.output
    assert job.output.count(f"torchrun (process {job.process.pid}) has died") == 1
    assert "Traceback" not in job.output
    done = start(tmp_path, *JOB, num_ranks=2)
    assert f"at step {stopped.group(1)}" in done.stdout
    check_same_run(tmp_path / "outputs/job", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_end_in_the_uninterrupted_bits(tmp_path, ranks):
    # Long enough that steps are left for the last kill: on average three go by before each, and some until it is done.
    longer = [*JOB, "duration=240", "eval_every=50", "save.every=5"]
    (tmp_path / "undisturbed").mkdir()
    [expected, _] = ranks(2, run_rank, tmp_path / "undisturbed", longer, timeout=300)
    drawn = random.Random(22)
    victims = [*KILLS] * 4
    drawn.shuffle(victims)
    for number, name in enumerate(victims):
        with LiveJob(tmp_path, *longer, num_ranks=2) as job:
            job.wait_for("rank(s) on cpu")
            begun = re.search(r"resumed from .* at step (\d+)", job.output)
            ahead = drawn.randint(0, 6)  # 0: before the first step
            step = ahead + (int(begun.group(1)) if begun else 0)
            if ahead:
                job.wait_for(f"step {step}/")
            print(f"kill {number + 1}: {name} at step {step}")
            kill(job, KILLS[name])
    done = start(tmp_path, *longer, num_ranks=2, timeout=300)
    assert done.returncode == 0, done.stderr
    check_same_run(tmp_path / "outputs/job", expected, num_steps=240)


@pytest.mark.slow
def test_a_multirun_that_is_restarted_goes_on_in_the_job_where_it_was(tmp_path):
    options = ("--max-restarts", "1")
    sweep = [*DATA, "duration=40", "log_every=1", "save.every=5", "tracker=none", "seed=0,1,2", "-m"]
    with LiveJob(tmp_path, *sweep, num_ranks=2, options=options) as job:
        job.wait_for("step 40/")  # of the first job
        job.wait_for("step 22/")  # of the second
        os.kill(job.workers()[-1], signal.SIGKILL)
        assert job.finish() == 0, job.output
    [directory] = (tmp_path / "outputs").iterdir()
    for number in range(3):
        steps = [record["step"] for record in read_metrics(directory / str(number)) if "train/loss" in record]
        assert steps == list(range(1, 41))
    assert job.output.count("this run is finished") == 1
    assert re.search(rf"resumed from outputs/{directory.name}/1/checkpoints/step_000000(20|15).pt", job.output)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A job all of whose ranks are killed: its working directory, and the addresses on which they listened."""

    def make(cwd):
        with LiveJob(cwd, *JOB, num_ranks=2) as job:
            job.wait_for("step 12/")
            addresses = {address for pid in job.workers() for address in listening_addresses(pid)}
            for pid in job.workers():
                os.kill(pid, signal.SIGKILL)
            job.finish()
        return cwd, addresses

    return made_once(tmp_path_factory, "killed", make)


@pytest.mark.slow
@pytest.mark.slow
def test_metrics_are_readable_after_a_kill_of_everything(killed):
    lines = (killed[0] / "outputs/job/metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) >= 12


def test_a_rank_that_raises_ends_all_and_is_reported_once_with_its_rank(tmp_path):
    Path(tmp_path, "mine.py").write_text(BREAKS)
    with LiveJob(
        tmp_path, "model=custom", "model._target_=mine.Net", "tracker=none", "duration=50", num_ranks=2, warm_ranks=True
    ) as job:
        assert job.finish() != 0
    ours = job.output.split("torch/distributed/elastic")[0]
    assert ours.count("rank 1 failed:") == 1
    assert "rank 0 failed" not in ours
    assert ours.count("ZeroDivisionError") == 1
    assert ours.count("Traceback") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_after_the_timeout_and_is_named_with_the_step(tmp_path):
    # The signal handler goes first: otherwise torchrun waits 30 s for the hung rank to save and leave.
    hang = "(signal.signal(signal.SIGTERM, signal.SIG_DFL), threading.Event().wait())"
    Path(tmp_path, "mine.py").write_text(BREAKS.replace("1 / 0", hang))
    job = ["model=custom", "model._target_=mine.Net", "tracker=none", "duration=50", "collective_timeout=2"]
    with LiveJob(tmp_path, *job, num_ranks=2, warm_ranks=True, timeout=60) as live:
        assert live.finish() != 0
    # The model has been called twice while DDP was wrapped, so the ninth call is that of step 6.
    message = "step 6: rank 0 waited for rank 1 in a collective for longer than collective_timeout allows"
    assert live.output.count(message) == 1


@pytest.mark.slow
def test_on_one_machine_the_ranks_listen_on_the_loopback_device_alone(killed):
    assert killed[1] == {"0100007F"}  # 127.0.0.1


def listening_addresses(pid):
    """The addresses, as /proc writes them, that a process listens on."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    rows = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


BREAKS = """
import os
import signal
import threading
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.bn = torch.nn.BatchNorm1d(10)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 9 and os.environ["RANK"] == "1":
            1 / 0
        return self.bn(self.head(x.flatten(1)))
"""
