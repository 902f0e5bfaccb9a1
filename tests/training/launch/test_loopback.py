"""On one machine nobody else has to reach a job: what listens does so on the loopback device."""

import signal
import subprocess
import sys

from tests.training.checkpoint.test_kills import listening_addresses
from tests.training.jobs import ROOT

LOOPBACK = {"0100007F"}  # 127.0.0.1, as /proc writes it
RANK = """
import os, signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
print(os.environ["TORCHELASTIC_RUN_ID"], flush=True)
signal.pause()
"""


def test_torchrun_s_store_listens_on_the_loopback_device_alone_and_ctrl_c_is_no_traceback(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "syncbn.training.launch.loopback", "--nproc-per-node", "1", tmp_path / "rank.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as torchrun:
        assert len(torchrun.stdout.readline().strip()) == 32  # names this job alone
        assert listening_addresses(torchrun.pid) == LOOPBACK
        torchrun.send_signal(signal.SIGINT)
        _, told = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 130
    assert "Traceback" not in told


def test_make_train_uses_it():
    done = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "python -m syncbn.training.launch.loopback --nproc-per-node 2 train.py" in done.stdout


def test_a_key_that_make_would_take_for_a_variable_of_its_own_is_refused():
    command = ["make", "-n", "train", "duration=1ep", "ARGS=run=a seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert 'write make train ARGS="duration=1ep".' in done.stderr
