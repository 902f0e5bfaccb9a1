"""Atomic file writes: a reader finds the old file, the new file or no file, never a partial one. Directories alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class WriteError(OSError):
    """An error of the disk while a file was written; `filename` is the file's own name, not that of a temporary one."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the directory of `path`, and renames it to `path` at the end of the context.

    After an exception in the context the temporary file is deleted and `path` is unchanged. The directory must exist.
    Processes that write the same path at once do not collide: the temporary name contains the process id.

    Args:
        durable: flush file and directory to disk (fsync) before returning, so that the file survives a power failure.

    Raises:
        WriteError: an OSError in the context, or behind an exception that a library raised in its place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        temporary.replace(path)
    except Exception as error:
        failure = _os_error(error)
        if failure is None:
            raise
        raise WriteError(failure.errno, failure.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    if durable:
        _flush(path.parent)  # makes the rename durable too


def write_text(path: Path, text: str) -> None:
    """Atomic `path.write_text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`, and puts it in the place of `path` at the end of the context.

    After an exception in the context it is removed, and `path` is unchanged. One process at a time may do this.
    """
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "old"))
    if old.exists() and not path.exists():  # a process was killed between the two renames below
        old.rename(path)
    for rest in (temporary, old):  # of a process that was killed
        shutil.rmtree(rest, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)


def _os_error(error: BaseException | None) -> OSError | None:
    """The exception itself, or the first of those behind it, that is an OSError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
