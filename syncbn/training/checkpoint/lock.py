"""The lock of a run directory: one job at a time writes there. The kernel releases it when its holder dies.

Never imports torch: `python train.py` locks its directory before Hydra writes to it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from syncbn.report import file_names
from syncbn.training.config.errors import ConfigError, printable
from syncbn.training.config.output import unwritable
from syncbn.training.distributed import world

_PATIENCE = 60.0  # seconds that a job waits for ranks that are leaving
_SECOND_LOOK = 0.3  # seconds in which a holder writes its name, or a process that only looks lets go
_PAUSE = 0.05  # seconds between two tries
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[Path, int] = {}  # file descriptors by directory


@dataclass(frozen=True)
class Holder:
    """The job that holds a lock, as its lock file describes it."""

    host: str
    pid: int
    agent: int
    """The process that started rank 0: torchrun's agent, if it was torchrun."""
    run_id: str | None
    multirun: bool = False
    """Whether the directory is that of a multirun, so that the lock holds for the directories of all its jobs."""

    def is_same_job(self, other: Holder) -> bool:
        """Whether both are attempts of one job of torchrun."""
        if self.run_id is None or self.run_id != other.run_id:
            return False
        # torchrun's default with --master-port is "none", which names no job.
        return self.run_id != "none" or (self.host, self.agent) == (other.host, other.agent)

    def has_lost_torchrun(self) -> bool:
        """Whether it is on this machine and its torchrun has died: then its ranks are about to leave."""
        if self.run_id is None or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.agent, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's process
            pass
        return False

    def describe(self) -> str:
        """The job in words, for an error message."""
        kind = "a multirun" if self.multirun else "a job"
        launched = "" if self.run_id is None else f", torchrun's run id {self.run_id}"
        return printable(f"{kind} (process {self.pid} on {self.host}{launched})")


def lock_directory(directory: Path, what: str, *, multirun: bool = False) -> None:
    """Locks a run directory for this job, until `unlock_directory` or the end of rank 0; makes it if there is none.

    Every rank calls it, and waits until rank 0 has the lock. A job waits up to 60 s for ranks that are leaving: those
    that it replaces after a restart by torchrun, and those whose torchrun has died. On a file system without locks
    there is a warning, and no lock.

    Args:
        what: a name that differs between the directories that this process locks.
        multirun: the directory is that of a multirun: no job in it may be running, and none may start.

    Raises:
        ConfigError: on every rank: another job holds the lock, or the directory cannot be written to.
    """
    patience = timedelta(seconds=2 * _PATIENCE)
    key = f"lock/{world.attempt()}/{what}"
    if problem := world.agree(key, lambda: _lock(directory, multirun) or "", patience=patience):
        raise ConfigError(problem)


def unlock_directory(directory: Path) -> None:
    """Releases the lock of a directory, if this process holds it."""
    descriptor = _held.pop(directory.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _lock(directory: Path, multirun: bool) -> str | None:
    """Takes the lock; returns the message of the error if that is impossible."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    us = Holder(socket.gethostname(), os.getpid(), os.getppid(), run_id, multirun)
    try:
        if found := _held_around(directory, us):
            return _in_use(*found)
        directory.mkdir(parents=True, exist_ok=True)
        holder = _take(directory, us)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return f"run: {unwritable(error)}"
        print(
            f"warning: {directory} is on a file system without locks ({error.strerror}); see to it that no other job"
            " writes there",
            file=sys.stderr,
        )
        return None
    return None if holder is None else _in_use(directory, holder)


def _in_use(directory: Path, holder: Holder) -> str:
    return (
        f"run: {directory} is in use by {holder.describe()}; wait until that has ended, or choose another name with"
        " run=..."
    )


def _take(directory: Path, us: Holder) -> Holder | None:
    """Locks the directory and writes our name into the lock file; returns the holder if there is another one.

    Raises:
        OSError: no file can be opened there, or the file system has no locks.
    """
    descriptor = os.open(directory / file_names.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        start = time.monotonic()
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            holder = _read(descriptor)
            is_leaving = us.is_same_job(holder) or holder.has_lost_torchrun()
            patience = _PATIENCE if is_leaving else _SECOND_LOOK
            if time.monotonic() - start > patience:
                os.close(descriptor)
                return holder
            time.sleep(_PAUSE)
        content = json.dumps(asdict(us)).encode() + b"\n"
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    except OSError as error:
        os.close(descriptor)
        error.filename = str(directory / file_names.LOCK)
        raise
    _held[directory.resolve()] = descriptor
    return None


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> Holder:
    """The holder as the lock file names it; an unnamed one if it has not written its name (yet)."""
    try:
        holder = Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, RecursionError):
        holder = None
    if holder is None or not _is_valid(holder):
        return Holder("an unknown host", 0, 0, None)
    return holder


def _is_valid(holder: Holder) -> bool:
    """Whether the parts of a holder, which come from a file, are of their types and a process id is one."""
    return (
        isinstance(holder.host, str)
        and (holder.run_id is None or isinstance(holder.run_id, str))
        and all(type(pid) is int and 0 < pid < 2**31 for pid in (holder.pid, holder.agent))
    )


def _held_around(directory: Path, us: Holder) -> tuple[Path, Holder] | None:
    """A running multirun that the directory belongs to, or (for a multirun) a running job in one of its directories.

    Those of ourselves, and of the attempt that we replace, do not count.
    """
    parent = directory.parent
    if parent.resolve() not in _held and (holder := _holder(parent)) is not None and holder.multirun:
        return parent, holder
    for path in sorted(directory.glob(f"*/{file_names.LOCK}")) if us.multirun else ():
        if (holder := _holder(path.parent)) is not None and not us.is_same_job(holder):
            return path.parent, holder
    return None


def _holder(directory: Path) -> Holder | None:
    """The job that holds the lock of a directory; None if nobody does, or if there is no lock file."""
    try:
        descriptor = os.open(directory / file_names.LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _read(descriptor)
    finally:
        os.close(descriptor)


def _let_go_in_child() -> None:
    """Closes the descriptors in a forked process, which would keep the locks after this process has died."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
