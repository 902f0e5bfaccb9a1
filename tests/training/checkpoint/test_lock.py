"""One job per run directory: who comes second is told who holds it, and changes nothing there."""

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from syncbn.report.file_names import LOCK
from syncbn.training.checkpoint import lock
from syncbn.training.checkpoint.lock import Holder, lock_directory, unlock_directory
from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed import world
from tests.training.jobs import ROOT, start

HOLD = """
import os, signal, subprocess, sys
from pathlib import Path
from syncbn.training.checkpoint.lock import lock_directory

lock_directory(Path(sys.argv[1]), "run", multirun=sys.argv[2] == "multirun")
"""
UNTIL_TOLD = "print('locked', flush=True)\nsys.stdin.read()\n"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """This process as a job without torchrun that has agreed on nothing yet."""
    monkeypatch.setattr(world, "agreed", {})
    monkeypatch.setattr(lock, "_held", {})
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@contextmanager
def held(directory, kind="run", then=UNTIL_TOLD, run_id=None):
    """A process that has locked the directory and printed a line; it ends when its input does."""
    ids = {} if run_id is None else {"TORCHELASTIC_RUN_ID": run_id}
    command = [sys.executable, "-c", HOLD + then, str(directory), kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ids}, **pipes) as process:
        assert process.stdout.readline()
        yield process
        process.stdin.close()


def content_of(directory):
    """Bytes and times of all files."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_directory_that_another_job_holds_is_an_error_that_names_the_holder_and_changes_nothing(tmp_path):
    with held(tmp_path / "first") as process:
        before = content_of(tmp_path)
        holder = f"{tmp_path / 'first'} is in use by a job (process {process.pid} on {socket.gethostname()})"
        with pytest.raises(ConfigError) as error:
            lock_directory(tmp_path / "first", "run")
        assert str(error.value) == f"run: {holder}; wait until that has ended, or choose another name with run=..."
        assert content_of(tmp_path) == before


def test_the_lock_of_a_job_that_has_ended_is_free(tmp_path):
    with held(tmp_path):
        pass
    lock_directory(tmp_path, "run")
    assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()


def test_a_restart_waits_for_the_ranks_that_it_replaces(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    waited = []
    with held(tmp_path, run_id="a") as process:

        def end_holder(_):
            waited.append(process.pid)
            process.stdin.close()
            process.wait(60)

        monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=end_holder, monotonic=lambda: 0.0))
        lock_directory(tmp_path, "run")
        assert waited == [process.pid]


def test_a_job_waits_for_ranks_whose_torchrun_has_been_killed(tmp_path, monkeypatch):
    command = [sys.executable, "-c", ORPHAN, sys.executable, HOLD + UNTIL_TOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TORCHELASTIC_RUN_ID": "a"}, **pipes) as torchrun:
        assert torchrun.stdout.readline()  # of the rank
        torchrun.kill()
        torchrun.wait(60)

        def end_rank(_):
            torchrun.stdin.close()
            assert torchrun.stdout.read() == ""

        monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=end_rank, monotonic=lambda: 0.0))
        lock_directory(tmp_path, "run")


# Starts a rank, and waits for it as torchrun does.
ORPHAN = """
import subprocess, sys
subprocess.run([sys.argv[1], "-c", sys.argv[2], sys.argv[3], "run"])
"""


def test_a_restart_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    times = iter([0.0, 59.0, 61.0])
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: next(times)))
    with held(tmp_path, run_id="a"), pytest.raises(ConfigError, match=r"in use by .*, torchrun's run id a\)"):
        lock_directory(tmp_path, "run")


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        (("a", 1, "x"), ("a", 1, "x"), True),
        (("a", 1, "x"), ("b", 2, "x"), True),  # rank 0 has moved to another machine
        (("a", 1, "x"), ("a", 1, "y"), False),
        (("a", 1, None), ("a", 1, None), False),  # no torchrun, no restarts
        (("a", 1, "none"), ("a", 1, "none"), True),  # torchrun's default with --master-port
        (("a", 1, "none"), ("a", 2, "none"), False),
        (("a", 1, "none"), ("b", 1, "none"), False),
    ],
)
def test_a_restart_is_known_by_torchrun_s_run_id_where_that_names_a_job(ours, theirs, same):
    one, other = (Holder(host, 7, agent, run_id) for host, agent, run_id in (ours, theirs))
    assert one.is_same_job(other) == same


FORK = """
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""
START = """
subprocess.Popen([sys.executable, "-c", "print('started', flush=True); input()"], close_fds=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("then", [FORK, START], ids=["forked", "started"])
def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path, then):
    with held(tmp_path, then=then) as process:
        assert process.wait(60) == -signal.SIGKILL
        lock_directory(tmp_path, "run")


def test_a_running_multirun_holds_the_directories_of_its_jobs(tmp_path):
    with held(tmp_path / "sweep", "multirun"):
        with pytest.raises(ConfigError, match=r"run: \S+/sweep is in use by a multirun \("):
            lock_directory(tmp_path / "sweep/3", "run")
        assert not (tmp_path / "sweep/3").exists()


def test_a_job_inside_of_a_run_s_directory_is_no_business_of_that_run(tmp_path):
    with held(tmp_path / "first"):
        lock_directory(tmp_path / "first/eval", "run")


def test_a_multirun_does_not_start_over_a_running_job_in_its_directory(tmp_path):
    with held(tmp_path / "sweep/3"):
        with pytest.raises(ConfigError, match=r"run: \S+/sweep/3 is in use by a job \("):
            lock_directory(tmp_path / "sweep", "sweep", multirun=True)
        assert not (tmp_path / "sweep" / LOCK).exists()


def test_the_jobs_of_a_multirun_lock_their_directories_one_after_the_other(tmp_path):
    lock_directory(tmp_path, "sweep", multirun=True)
    for number in range(2):
        lock_directory(tmp_path / str(number), f"job {number}")
        assert list(lock._held) == [tmp_path, tmp_path / str(number)]
        unlock_directory(tmp_path / str(number))


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    lock_directory(tmp_path, "run")
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} is on a file system without locks (No locks available); see to it that no other job"
        " writes there\n"
    )


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(ConfigError, match=r"^run: \S+/outputs/a: cannot be written \(.*\); a file has the name"):
        lock_directory(tmp_path / "outputs/a", "run")


@pytest.mark.parametrize(
    ("num_ranks", "command"),
    [(0, ["task=eval", f"load={ROOT}/tests/data/v0.1.0/best.pt"]), (0, ["seed=0,1", "-m"]), (2, [])],
    ids=["a task", "a multirun", "two ranks"],
)
def test_a_second_job_leaves_on_every_rank_with_one_line_before_anything_is_written(tmp_path, num_ranks, command):
    run_dir = tmp_path / "outputs/held"
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra/config.yaml").write_text("the first job's")
    with held(run_dir) as process:
        before = content_of(tmp_path)
        done = start(tmp_path, "run=held", *command, num_ranks=num_ranks)
        assert content_of(tmp_path) == before
    assert done.stderr.count(f"error: run: outputs/held is in use by a job (process {process.pid} on") == 1
    assert done.stderr.count("error: ") == 1
    if num_ranks == 0:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    else:
        assert done.returncode == 1  # torchrun's own; its table has the ranks'
        assert "exitcode  : 2" in done.stderr


def test_a_lock_file_that_is_a_link_is_refused_and_what_it_leads_to_is_untouched(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=rf"^run: \S+{LOCK}: cannot be written"):
        lock_directory(tmp_path / "run", "run")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("content", ["{}", "[]", '{"host": 1}', '{"host": "h", "pid": 1, "agent": "x", "run_id": "r"}',
                                     '{"host": "h", "pid": 1, "agent": 99999999999, "run_id": "r"}'])  # fmt: skip
def test_a_holder_is_unknown_if_the_lock_file_does_not_name_one(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    descriptor = os.open(tmp_path / LOCK, os.O_RDONLY)
    assert lock._read(descriptor).host == "an unknown host"
    os.close(descriptor)
