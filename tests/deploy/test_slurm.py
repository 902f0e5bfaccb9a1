"""docker/cluster/slurm.sbatch: what it tells srun, and what a Slurm of two nodes makes of it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.hosts import Network
from tests.deploy.test_nodes import JOB, check_same_bits
from tests.training.jobs import ROOT, LiveJob, read_metrics, run_rank

SHORT = [*(override for override in JOB if not override.startswith("run=")),
         "model.width=4", "data.size=8", "duration=60"]  # fmt: skip
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
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a,b", "NPROC": "1",
            "REQUEUED": str(cwd / "requeued"), "OMP_NUM_THREADS": "1", **variables}  # fmt: skip


SRUN_ECHO = """#!/bin/sh
while [ "$1" != torchrun ]; do shift; done
shift
echo "$ENDPOINT" "$@"
exit "${SRUN_EXIT:-0}"
"""


def dry(cwd, *overrides, **variables):
    """The batch script with an srun that only says what it was told."""
    environment = slurm(cwd, **variables)
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


# Two of Slurm's commands for nodes that are hosts of ours, whose first processes $HOSTS names: srun starts the task on
# each of them, and scancel's signal reaches all that the tasks have started.
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
node=0
for host in $HOSTS; do
  SLURM_NODEID=$node SLURM_NNODES=2 nsenter --target "$host" --net --uts --pid --mount --wd="$PWD" "$@" &
  node=$((node + 1))
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit $code
"""
SCANCEL = """#!/bin/bash
for host in $HOSTS; do nsenter --target "$host" --net --uts --pid --mount pkill "-${1#--signal=}" --full train.py; done
"""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_whose_time_is_over_saves_is_queued_again_and_goes_on(ranks, tmp_path):
    for name in ("train.py", "configs"):  # the job runs where the project is
        (tmp_path / name).symlink_to(ROOT / name)
    environment = slurm(tmp_path)
    for name, script in (("srun", SRUN), ("scancel", SCANCEL)):
        (tmp_path / "tools" / name).write_text(script)
        (tmp_path / "tools" / name).chmod(0o755)
    expected = ranks(2, run_rank, tmp_path, (*SHORT, "run=expected"), timeout=200)[0]
    launcher = ["bash", str(ROOT / "docker/cluster/slurm.sbatch")]
    with Network() as network:
        environment["HOSTS"] = " ".join(str(network.host(name).first_pid) for name in "ab")
        with LiveJob(tmp_path, *SHORT, num_ranks=1, launcher=launcher, timeout=150, **environment) as batch:
            batch.wait_for("step 30/")
            batch.process.send_signal(signal.SIGUSR1)  # as Slurm does when the time is over
            assert batch.finish() != 0
        stopped = re.search(r"stopped after step (\d+)", batch.output)
        assert stopped, batch.output
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
        environment["SLURM_RESTART_COUNT"] = "1"
        with LiveJob(tmp_path, *SHORT, num_ranks=1, launcher=launcher, timeout=150, **environment) as batch:
            assert batch.finish() == 0, batch.output
        assert f"at step {stopped.group(1)}" in batch.output
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"  # once
    check_same_bits(tmp_path / "outputs/slurm-4711", expected)


# A cluster as small as can be: nobody has to prove who he is, which is for hosts that this test alone can reach.
SLURM_CONF = """ClusterName=test
SlurmctldHost=c
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=6
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
NodeName=a,b CPUs=4 State=UNKNOWN
PartitionName=all Nodes=a,b Default=YES MaxTime=INFINITE
"""


class Cluster:
    """A Slurm: its controller on host c, nodes on a and b. What is submitted runs in `cwd`."""

    def __init__(self, network, cwd):
        self.cwd, self.controller = cwd, network.host("c")
        directory = cwd / "slurm"
        (directory / "state").mkdir(parents=True)
        (directory / "slurm.conf").write_text(SLURM_CONF.format(directory=directory))
        self.variables = {"SLURM_CONF": str(directory / "slurm.conf")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables |= {"PATH": path, "NPROC": "1", "OMP_NUM_THREADS": "1"}
        hosts = [(self.controller, "slurmctld", ()), *((network.host(n), "slurmd", ("-N", n)) for n in "ab")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.daemons = [self.start([daemon, "-D", *options], host, **quiet) for host, daemon, options in hosts]

    def close(self):
        """The daemons themselves end with their hosts."""
        for process in self.daemons:
            process.kill()
            process.wait()

    def start(self, command, host=None, **options):
        prefix = (host or self.controller).prefix(self.cwd)
        return subprocess.Popen([*prefix, *command], env={**os.environ, **self.variables}, **options)

    def ask(self, *command):
        """What a command of Slurm's prints, on the controller."""
        with self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output

    def follow(self, *command, **variables):
        """A command whose output a test waits for."""
        prefix = self.controller.prefix(self.cwd)
        return LiveJob(
            self.cwd, num_ranks=1, launcher=command, prefix=prefix, timeout=400, **self.variables, **variables
        )

    def submit(self, *options, **variables):
        """sbatch of the script; it ends when the job has."""
        return self.follow("sbatch", "--wait", *options, **variables)


@pytest.fixture
def cluster(tmp_path):
    for name in ("train.py", "configs", "docker"):  # the job runs where the project is
        (tmp_path / name).symlink_to(ROOT / name)
    with Network() as network:
        made = Cluster(network, tmp_path)
        yield made
        made.close()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    shutil.which("slurmctld") is None, reason="Slurm (slurmctld, slurmd, slurm-client) is not installed"
)
def test_a_slurm_of_two_nodes_runs_it_queues_it_again_and_runs_a_sweep(cluster, ranks, tmp_path):
    script = "docker/cluster/slurm.sbatch"
    expected = ranks(2, run_rank, tmp_path, (*SHORT, "run=expected"), timeout=200)[0]
    with cluster.submit(script, *SHORT) as batch:
        batch.wait_for("Submitted batch job")
        number = batch.output.split()[-1]
        with cluster.follow("tail", "--follow=name", "--retry", "--lines=+1", f"slurm-{number}.out") as output:
            output.wait_for("step 30/")
            cluster.ask("scancel", "--batch", "--signal=USR1", number)  # as Slurm does when the time is over
            assert batch.finish() == 0, output.output
    output = (tmp_path / f"slurm-{number}.out").read_text()
    stopped = re.search(r"stopped after step (\d+)", output)
    assert stopped, output
    assert re.search(rf"resumed from \S+ at step {stopped.group(1)}\b", output)
    assert "2 rank(s) on cpu" in output
    assert "Restarts=1 " in cluster.ask("scontrol", "show", "job", number)
    check_same_bits(tmp_path / f"outputs/slurm-{number}", expected)

    (tmp_path / "sweep.txt").write_text("optimizer.lr=0.1 seed=1\noptimizer.lr=0.2\n")
    with cluster.submit("--array=0-1", script, *SHORT, "duration=2", SWEEP="sweep.txt") as sweep:
        assert sweep.finish() == 0, sweep.output
    number = sweep.output.split()[-1]
    rates = [read_metrics(tmp_path / f"outputs/slurm-{number}/{task}")[0]["train/lr"] for task in (0, 1)]
    assert rates[1] == pytest.approx(2 * rates[0])
