"""Ctrl-C at any moment, and ranks that torchrun has left behind."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from syncbn.training.distributed import interrupts
from syncbn.training.distributed.stopping import Stopped, StopRequest
from tests.training.jobs import ROOT

# Interrupts this process as often as told when it is about to import a module. Python imports it by itself.
SITE = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            for _ in range(int(os.environ["INTERRUPT_TIMES"])):
                signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
LEFT = "interrupted (Ctrl-C); no training was going on, so there was nothing to save\n"


@pytest.mark.parametrize(
    ("module", "times", "arguments"),
    [
        ("hydra", 1, []),
        ("omegaconf", 2, []),
        ("syncbn.training.launch.callbacks", 1, []),  # imported by Hydra, after composing
        ("torch", 1, []),
        ("torch.distributed", 2, ["-m", "seed=0,1"]),
        ("syncbn.training.tasks.run", 1, ["task=eval", f"load={ROOT}/tests/data/v0.1.0/best.pt"]),
    ],
)
def test_ctrl_c_at_start_up_is_one_line(tmp_path, module, times, arguments):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "INTERRUPT_AT": module,
        "INTERRUPT_TIMES": str(times),
    }
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (130, LEFT)


# A thread that waits for a mutex that it holds itself runs no handler of Python's, like one that waits for other ranks.
BLOCKED = """
import ctypes, signal, sys
from syncbn.training.distributed import interrupts

interrupts.begin()
signal.signal(signal.SIGTERM, lambda *_: None)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("blocked", flush=True)
lock(mutex)
"""
WAITING = """
import signal, sys, time
from syncbn.training.distributed import interrupts

interrupts.begin()
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))
print("waiting", flush=True)
while True:  # signal.pause() would miss a signal that comes just before it
    time.sleep(0.05)
"""


def pipes(**variables):
    return {
        "cwd": ROOT,
        "env": {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", **variables},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


@contextmanager
def started(*code, **variables):
    """A process that runs Python code, and is gone with all that it has started when the context ends, however."""
    with subprocess.Popen([sys.executable, "-c", *code], **pipes(**variables), start_new_session=True) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_ends_a_process_whose_main_thread_is_blocked():
    with started(BLOCKED) as process:
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.wait(60)) == (LEFT, 130)


@pytest.mark.parametrize(("rank", "prints"), [("0", LEFT), ("1", "")])
def test_of_several_ranks_one_says_so(rank, prints):
    with started(BLOCKED, RANK=rank, LOCAL_RANK=rank) as process:
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.wait(60)) == (prints, 130)


FORKING = """
import os, signal
from syncbn.training.distributed import interrupts

interrupts.begin()
child = os.fork()
if child == 0:
    signal.raise_signal(signal.SIGINT)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_ctrl_c_of_a_fork_is_not_that_of_the_rank():
    done = subprocess.run([sys.executable, "-c", FORKING], **pipes(), timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("130\n", 0)


def test_a_job_in_the_background_ignores_ctrl_c_as_the_shell_has_asked():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits
    try:
        with started(WAITING) as process:
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
            process.terminate()
            assert process.stdout.read() == "asked to stop\n"
    finally:
        signal.signal(signal.SIGINT, before)


# Starts a process, and dies as soon as that has printed a line.
AGENT = """
import os, signal, subprocess, sys

rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
rank.stdout.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [
        (WAITING, 60, "asked to stop\n"),
        (BLOCKED, 1, "rank 3: not done 1 s after torchrun has died, left without\n"),
    ],
    ids=["waiting", "blocked"],
)
def test_a_rank_whose_torchrun_has_died_is_asked_to_stop_and_leaves_for_good(code, seconds, outcome):
    variables = {"TORCHELASTIC_RUN_ID": "a", "RANK": "3", "LOCAL_RANK": "0"}
    variables |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds)}
    with started(AGENT, code, **variables) as agent:
        said = agent.stdout.read()  # until the rank, which has it open too, is gone
        told = f"torchrun (process {agent.pid}) has died: this job saves and leaves, within {seconds} s\n"
        assert said == told + outcome


@pytest.fixture
def left(monkeypatch):
    """The exit codes with which this process would have left."""
    codes = []
    monkeypatch.setattr(interrupts, "leave", lambda code, *_, **__: codes.append(code))
    return codes


@pytest.mark.parametrize(
    ("numbers", "exit_code", "leaves"),
    [
        ([signal.SIGTERM], 143, []),
        ([signal.SIGTERM, signal.SIGTERM], 143, []),
        ([signal.SIGINT], 130, []),
        ([signal.SIGINT, signal.SIGTERM], 130, []),
        ([signal.SIGINT, signal.SIGINT], 130, [130]),
    ],
)
def test_training_saves_at_the_first_signal_and_leaves_at_the_second_ctrl_c(
    numbers, exit_code, leaves, left, monkeypatch
):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = StopRequest()
    with stop.listen():
        for number in numbers:
            signal.raise_signal(number)
    assert stop.requested
    assert left == leaves
    assert Stopped(3, stop.exit_code).code == exit_code


def test_under_torchrun_ctrl_c_may_come_twice_because_that_hands_it_on(left, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    with StopRequest().listen():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert left == []
