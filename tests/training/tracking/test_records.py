"""What cannot be written to metrics.jsonl is kept until it can, and a log file that fails does not end the job."""

import errno
import logging
import os

import pytest

from syncbn.training.config.errors import RankError
from syncbn.training.tracking.console import LogFile
from syncbn.training.tracking.records import Records
from tests.training.jobs import read_metrics


class Disk:
    """A disk with room for so many bytes more."""

    def __init__(self, monkeypatch, room):
        self.room, self._write = room, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor, content):
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, content[: self.room])
        self.room -= written
        return written


def test_records_that_a_full_disk_refuses_are_written_in_order_once_there_is_space(tmp_path, monkeypatch, caplog):
    disk = Disk(monkeypatch, room=30)  # one record, and a part of the next
    records = Records(tmp_path / "metrics.jsonl")
    for step in range(4):
        records.append({"step": step, "loss": 0.5})
    [warning] = caplog.messages
    assert "metrics.jsonl: cannot be written (No space left on device); free some space there" in warning
    disk.room = 10**6
    records.append({"step": 4, "loss": 0.5})
    records.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_records_that_never_reach_the_disk_are_an_error_at_the_end(tmp_path, monkeypatch):
    Disk(monkeypatch, room=30)
    records = Records(tmp_path / "metrics.jsonl")
    for step in range(4):
        records.append({"step": step, "loss": 0.5})
    with pytest.raises(RankError, match=r"metrics.jsonl: cannot be written \(No space .*; its last 3 records are lost"):
        records.close()


def test_a_file_of_records_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(RankError, match=r"^\S+/metrics.jsonl: cannot be written \(No such file or directory\)"):
        Records(tmp_path / "gone/metrics.jsonl")


@pytest.mark.parametrize("path", ["gone/train.log", "full"])
def test_a_log_that_cannot_be_written_is_one_warning_without_a_traceback(tmp_path, capsys, path):
    (tmp_path / "full").symlink_to("/dev/full")
    handler = LogFile(tmp_path / path, delay=True)
    for number in range(3):
        handler.handle(logging.LogRecord("a", logging.INFO, "here", 1, f"line {number}", (), None))
    handler.close()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert f"{path}: cannot be written (No " in line
