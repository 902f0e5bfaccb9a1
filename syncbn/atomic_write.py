"""Atomic file writes: a reader finds the old file, the new file or no file, never a partial one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the directory of `path`, and renames it to `path` at the end of the context.

    After an exception in the context the temporary file is deleted and `path` is unchanged. The directory must exist.
    Processes that write the same path at once do not collide: the temporary name contains the process id.

    Args:
        durable: flush file and directory to disk (fsync) before returning, so that the file survives a power failure.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _flush(path.parent)  # makes the rename durable too


def write_text(path: Path, text: str) -> None:
    """Atomic `path.write_text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
