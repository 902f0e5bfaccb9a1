"""docker/cluster/slurm.sbatch, run by bash with stand-ins for srun and scontrol that start real nodes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.hosts import Network
from tests.deploy.test_nodes import JOB, STEPS, WIDTH, check_same_bits, undisturbed  # noqa: F401 - a fixture
from tests.training.jobs import ROOT, LiveJob
from tests.training.test_train import load_last

SCONTROL = """#!/bin/sh
case "$1" in
  show) echo a; echo b ;;
  requeue) echo "requeue $2" >> "$REQUEUED" ;;
esac
"""


def slurm(cwd, **variables):
    """The environment of a job of two nodes."""
    tools = cwd / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "scontrol").write_text(SCONTROL)
    (tools / "scontrol").chmod(0o755)
    if not (tools / "srun").exists():
        (tools / "srun").symlink_to(ROOT / "tests/deploy/srun.py")
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a,b", "NPROC": "1",
            "REQUEUED": str(cwd / "requeued"), "OMP_NUM_THREADS": "1", **variables}  # fmt: skip


class Batch(LiveJob):
    """slurm.sbatch as the batch shell of a job."""

    def __init__(self, cwd, environment, *overrides):
        super().__init__(cwd, *overrides, num_ranks=1, launcher=["bash", str(ROOT / "docker/cluster/slurm.sbatch")],
                         timeout=150, **environment)  # fmt: skip


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_whose_time_is_over_saves_is_queued_again_and_goes_on(tmp_path, undisturbed):  # noqa: F811
    for name in ("train.py", "configs"):  # the job runs where the project is
        (tmp_path / name).symlink_to(ROOT / name)
    job = [override for override in JOB if not override.startswith("run=")]
    with Network() as network:
        hosts = " ".join(str(network.host(name).first_pid) for name in "ab")
        with Batch(tmp_path, slurm(tmp_path, HOSTS=hosts), *job, *WIDTH) as batch:
            batch.wait_for("step 30/")
            batch.process.send_signal(signal.SIGUSR1)
            assert batch.finish() != 0
        stopped = re.search(r"stopped after step (\d+)", batch.output)
        assert stopped, batch.output
        run_dir = tmp_path / "outputs/slurm-4711"
        assert load_last(run_dir)["step"] == int(stopped.group(1)) < STEPS
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
        (tmp_path / "requeued").unlink()
        with Batch(tmp_path, slurm(tmp_path, HOSTS=hosts, SLURM_RESTART_COUNT="1"), *job, *WIDTH) as batch:
            assert batch.finish() == 0, batch.output
        assert f"at step {stopped.group(1)}" in batch.output
    assert not (tmp_path / "requeued").exists()
    check_same_bits(run_dir, undisturbed)


SRUN_ECHO = """#!/bin/sh
while [ "$1" != torchrun ]; do shift; done
shift
echo "$ENDPOINT" "$@"
exit "${SRUN_EXIT:-0}"
"""


def dry(cwd, *overrides, **variables):
    """The batch script with an srun that only says what it was told."""
    environment = slurm(cwd, **variables)
    (cwd / "tools/srun").unlink()
    (cwd / "tools/srun").write_text(SRUN_ECHO)
    (cwd / "tools/srun").chmod(0o755)
    command = ["bash", str(ROOT / "docker/cluster/slurm.sbatch"), *overrides]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_each_task_of_an_array_has_its_line_of_overrides_and_its_run(tmp_path):
    (tmp_path / "sweep.txt").write_text("optimizer.lr=0.1 seed=1\noptimizer.lr=0.2\n")
    array = {"SWEEP": "sweep.txt", "SLURM_ARRAY_JOB_ID": "40"}
    first = dry(tmp_path, "duration=1ep", SLURM_ARRAY_TASK_ID="0", **array)
    assert first.stdout == "a:30111 duration=1ep optimizer.lr=0.1 seed=1 run=slurm-40/0\n"
    second = dry(tmp_path, SLURM_ARRAY_TASK_ID="1", **array)
    assert second.stdout == "a:30111 optimizer.lr=0.2 run=slurm-40/1\n"
    beyond = dry(tmp_path, SLURM_ARRAY_TASK_ID="2", **array)
    assert beyond.returncode == 2
    assert "no line for task 2" in beyond.stderr
    forgotten = dry(tmp_path, SLURM_ARRAY_TASK_ID="0")
    assert forgotten.returncode != 0
    assert "SWEEP=FILE" in forgotten.stderr


def test_a_run_of_its_own_name_keeps_it_and_a_failure_is_not_queued_again(tmp_path):
    done = dry(tmp_path, "run=mine", "freeze.a.match=x y", SRUN_EXIT="3")
    assert done.stdout == "a:30111 run=mine freeze.a.match=x y\n"
    assert done.returncode == 3
    assert not (tmp_path / "requeued").exists()
