"""Where runs are made, who can read them, and what to say if a file or directory cannot be made there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from syncbn.training.config.errors import ConfigError, printable, require, require_choice

# Root keys that say where and for whom a command writes, what it trusts, and how task=parity compares: they are the
# command's, a run stores none.
OF_COMMAND = ("output_dir", "share", "trust", "parity")

# The bits that files and directories of a run lack.
_MASKS = {"private": 0o077, "group": 0o027, "all": 0o022}

# Errors of a disk, whichever file they come from.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_ELSEWHERE = "choose another place with output_dir=..."
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: f"you need the right to write there; get it, or {_ELSEWHERE}",
    errno.EPERM: f"you need the right to write there; get it, or {_ELSEWHERE}",
    errno.ENAMETOOLONG: "choose a shorter name with run=...",
    errno.ENOENT: "the directory that it lies in is missing; look whether it has been deleted or moved",
    errno.ENOTDIR: "a file has the name of a directory on the way; choose another name",
    errno.EEXIST: "a file has this name; choose another name",
    errno.ELOOP: "its links lead in a circle; choose another name",
}


def output_root(value: object) -> Path:
    """The directory of all runs, from the key `output_dir`; `~` is expanded.

    Raises:
        ConfigError: no text, an empty one or one with unprintable characters, or the `~` of an unknown user.
    """
    valid = isinstance(value, str) and value.strip() != "" and printable(value) == value
    require(valid, "output_dir", "a directory for runs, such as outputs or ~/runs", value)
    try:
        return Path(str(value)).expanduser()
    except RuntimeError:
        raise ConfigError(f"output_dir: expected a directory for runs, got {value!r}, of an unknown user") from None


def mask_of(share: object) -> int:
    """The umask for what a run writes, from the key `share`; raises a ConfigError for any other value."""
    require_choice("share", share, tuple(_MASKS))
    return _MASKS[str(share)]


def make_directory(key: str, path: Path) -> None:
    """Makes a directory, and those above it, unless it exists.

    Raises:
        ConfigError: it cannot be made, or nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise ConfigError(f"{key}: {unwritable(error)}") from None


def unwritable(error: OSError) -> str:
    """One line about a file or directory that cannot be made or written: its path, the reason, the remedy."""
    place = "" if error.filename is None else f"{printable(short(error.filename))}: "
    remedy = _REMEDIES.get(error.errno or 0, _ELSEWHERE)
    return f"{place}cannot be written ({error.strerror or type(error).__name__}); {remedy}"


def short(path: str | Path) -> str:
    """The path, relative to the working directory if it lies there."""
    absolute, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(absolute) if os.path.commonpath([absolute, here]) == here else str(path)
