"""A run whose disk is full, or whose directory is deleted, says so in one line and loses nothing that was written."""

import re

import pytest

from syncbn.training.config.errors import TrainingError
from tests.training.jobs import read_metrics, run_rank, start

# In its ninth training forward pass something happens to the disk, if a file asks for it: the checkpoint of step 6 is
# written then, that of step 8 perhaps.
MODULE = """
import os, resource, shutil
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.head = 0, torch.nn.Linear(64, 10)

    def forward(self, x):
        self.calls += self.training
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if self.calls == 9 and is_first:
            if os.path.exists("delete"):  # in one go, as a checkpoint may just be written there
                os.rename("outputs/a", "gone")
                shutil.rmtree("gone", ignore_errors=True)
            if os.path.exists("fill"):  # no file can grow any more
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return self.head(x.flatten(1))
"""
JOB = ("model=custom", "model._target_=mine_of_disk.Net", "tracker=none", "duration=12", "log_every=1", "eval_every=3",
       "save.every=2", "run=a")  # fmt: skip


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_space(tmp_path):
    (tmp_path / "mine_of_disk.py").write_text(MODULE)
    (tmp_path / "fill").touch()
    done = start(tmp_path, *JOB)
    assert done.returncode == 1
    [line] = errors(done)
    assert re.match(
        r"error: a checkpoint could not be written: outputs/a/checkpoints/\S+: cannot be written \(File too large\); .*"
        r"; then the same command, with this run's name, goes on from outputs/a/checkpoints/step_0000000[68].pt, the"
        r" last good checkpoint$",
        line,
    )
    assert "Traceback" not in done.stderr + done.stdout
    (tmp_path / "fill").unlink()
    again = start(tmp_path, *JOB)
    assert again.returncode == 0, again.stderr
    assert re.search(r"resumed from outputs/a/checkpoints/step_0000000[68].pt", again.stdout)
    records = read_metrics(tmp_path / "outputs/a")
    assert [record["step"] for record in records if "train/loss" in record] == [*range(1, 13)]


LOST = (
    r"run: outputs/a has been deleted or moved while the run trained: its metrics up to step \d+ and its checkpoints "
)


def test_a_run_directory_that_is_deleted_is_one_line_and_is_not_made_again(tmp_path):
    (tmp_path / "mine_of_disk.py").write_text(MODULE)
    (tmp_path / "delete").touch()
    done = start(tmp_path, *JOB)
    assert done.returncode == 1
    [line] = errors(done)
    assert re.match(f"error: {LOST}", line)
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "outputs/a").exists()


def check_lost(cwd):
    with pytest.raises(TrainingError, match=LOST):
        run_rank(cwd, JOB)


def test_every_rank_has_that_error(ranks, tmp_path):
    (tmp_path / "mine_of_disk.py").write_text(MODULE)
    (tmp_path / "delete").touch()
    ranks(2, check_lost, tmp_path)
