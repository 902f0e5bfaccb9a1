"""The jobs of a multirun, found in its directory."""

from __future__ import annotations

from pathlib import Path

from syncbn.report import file_names
from syncbn.training.checkpoint.paths import is_directory
from syncbn.training.config.errors import ConfigError
from syncbn.training.tracking.summary import read_summary


def jobs_of(directory: Path, key: str) -> list[Path]:
    """The run directories of a multirun, in the order of its jobs; empty if the directory is none of a multirun.

    Raises:
        ConfigError: a job has failed, or has saved nothing; the message begins with the key.
    """
    if not is_directory(directory) or _is_run(directory):
        return []
    below = sorted((path for path in directory.iterdir() if path.is_dir()), key=lambda path: path.name.zfill(9))
    jobs = [path for path in below if _is_run(path) or (path / file_names.SUMMARY).is_file()]
    if not any(map(_is_run, jobs)):
        return []
    for job in jobs:
        summary = read_summary(job)
        failed = summary["failed"] if summary is not None else ""
        if failed or not _is_run(job):
            raise ConfigError(f"{key}: job {job.name} of the multirun {str(directory)!r} has failed"
                              f" ({failed or 'it has saved nothing'}); repeat it, or give the jobs one by one"
                              )  # fmt: skip
    return jobs


def _is_run(directory: Path) -> bool:
    return (directory / file_names.CHECKPOINTS).is_dir() or (directory / file_names.RECALIBRATED).is_file()
