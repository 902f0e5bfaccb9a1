"""Names of checkpoint files, and what lies under a path; looked at before torch is imported, so never imports it."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from syncbn.training.config.errors import ConfigError

_NAME = re.compile(r"step_(\d+)\.pt")


def size_of_file(path: Path, key: str) -> int:
    """Number of bytes of a file, which is not opened.

    Raises:
        ConfigError: no such file, one that cannot be reached, or anything that is no regular file, such as a pipe,
            which would block whoever opens it.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{key}: expected a checkpoint, found no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{key}: expected a checkpoint, {str(path)!r} cannot be reached ({reason})") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "directory" if stat.S_ISDIR(found.st_mode) else "pipe, socket or device"
        raise ConfigError(f"{key}: expected a checkpoint, {str(path)!r} is a {kind}")
    return found.st_size


def is_directory(path: Path) -> bool:
    """Whether the path leads to a directory; False where it cannot be followed."""
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, or a directory on the way that may not be searched
        return False


def step_of(path: Path) -> int:
    """The number of steps done, from the name of a training checkpoint; 0 for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else 0


def by_step(directory: Path) -> list[Path]:
    """Paths of the training checkpoints step_*.pt, oldest first; the best one is a separate file and not included."""
    return sorted(path for path in directory.glob("step_*.pt") if _NAME.fullmatch(path.name))
