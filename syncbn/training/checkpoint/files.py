"""Checkpoint files: atomic writes, reading without executing code from the file, and lookup in a run directory."""

from __future__ import annotations

import hashlib
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.atomic_write import replacing
from syncbn.report import file_names
from syncbn.training.checkpoint import contents
from syncbn.training.checkpoint.contents import MalformedError
from syncbn.training.checkpoint.paths import by_step, is_directory, size_of_file
from syncbn.training.config.errors import ConfigError

log = logging.getLogger(__name__)

DIGEST = "sha256"


def digest(value: Any) -> str:
    """SHA-256 digest, in hex, of nested containers: keys, plain values, and dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            total.update(f"tensor {item.dtype} {tuple(item.shape)} ".encode())
            values = item.detach().cpu().resolve_conj().resolve_neg().contiguous()
            total.update(values.view(-1).view(torch.uint8).numpy().data)
        elif isinstance(item, dict):
            total.update(f"dict {len(item)} ".encode())
            for key, below in item.items():
                total.update(repr(key).encode())
                add(below)
        elif isinstance(item, list | tuple):
            total.update(f"list {len(item)} ".encode())
            for below in item:
                add(below)
        else:
            total.update(repr(item).encode())

    add(value)
    return total.hexdigest()


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Atomically writes a checkpoint together with a digest of its content, which `read` checks."""
    path.parent.mkdir(exist_ok=True)  # a run directory that has been deleted is not made again
    with replacing(path, durable=True) as temporary:
        _save({**content, DIGEST: digest(content)}, temporary)


def _save(content: dict[str, Any], path: Path) -> None:
    # Into a file of Python's own: torch's writer does not say why the disk refuses.
    with path.open("wb") as file:
        torch.save(content, file)


def read(path: Path, key: str) -> dict[str, Any]:
    """Reads a checkpoint or a safetensors file; its tensors are on the CPU, its containers dicts, lists and tuples.

    What a checkpoint of a run holds has been checked then (see `contents.check_parts`).

    Args:
        key: the configuration key that errors name.

    Raises:
        ConfigError: no such file, an unreadable or malformed one, other content than a dict, or a missing or wrong
            digest.
    """
    size = size_of_file(path, key)
    try:
        content = contents.plain(_load(path, size), size)
        if not isinstance(content, dict):
            raise MalformedError(f"holds a {type(content).__name__}, expected a checkpoint or state dict")
        _check_digest(content)
    except MalformedError as error:
        raise ConfigError(f"{key}: {str(path)!r} {error}") from None
    return content


def _load(path: Path, size: int) -> Any:
    """What torch or safetensors finds in the file; a MalformedError if they find nothing."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _unpacked_size(path) > contents.MAX_EXPANSION * size:
            raise MalformedError("is a compressed archive that would take far more memory than its size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of kinds of tensors and pickles; what is no use is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except MalformedError:
        raise
    except Exception as error:
        # Without torch's message, which suggests loading the file with weights_only=False.
        raise MalformedError(f"is not a readable checkpoint ({type(error).__name__})") from None


def _unpacked_size(path: Path) -> int:
    """Number of bytes in the records of a zip archive, which torch's format is; torch compresses none. 0 for others."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist())


def _check_digest(content: dict[str, Any]) -> None:
    """Removes the digest and compares it; checks the parts of a checkpoint of a run; raises MalformedError."""
    expected = content.pop(DIGEST, None)
    if expected is None:
        if contents.is_of_run(content):
            raise MalformedError("has lost its digest; expected a checkpoint as train.py wrote it")
        return
    contents.check_values(content)
    if not isinstance(expected, str) or expected != digest(content):
        raise MalformedError("has been changed since it was written, its digest does not fit")
    contents.check_parts(content)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint file that has been read and whose digest has been checked, so that neither is done again."""

    path: Path
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path, key: str) -> StoredCheckpoint:
        """Reads the file; see the function `read`."""
        return cls(path, read(path, key))

    def require_run(self, key: str) -> None:
        """Raises a ConfigError unless it is a checkpoint of a run."""
        if not contents.is_of_run(self.content):
            raise ConfigError(f"{key}: {str(self.path)!r} is not a checkpoint of a run; expected one that train.py"
                              " wrote (init.<sub-network>.path takes a state dict)")  # fmt: skip

    @property
    def step(self) -> int:
        """The number of steps done when it was written; of a checkpoint of a run."""
        return int(self.content["step"])


def newest(run_dir: Path, key: str = "resume") -> StoredCheckpoint | None:
    """Reads the newest intact training checkpoint of a run directory; warns of each newer one that is damaged."""
    with _permitted(key):
        whole = (read_whole(path, key) for path in reversed(by_step(run_dir / file_names.CHECKPOINTS)))
        return next((stored for stored in whole if stored is not None), None)


def read_whole(path: Path, key: str = "resume") -> StoredCheckpoint | None:
    """Reads an intact checkpoint of a run; for any other file logs a warning, which names the key, and returns None."""
    try:
        stored = StoredCheckpoint.read(path, key)
        stored.require_run(key)
    except ConfigError as error:
        log.warning("%s; it is passed over", error)
        return None
    return stored


def read_best_or_newest(path: Path, key: str) -> StoredCheckpoint:
    """Reads a file, or of a run directory its best checkpoint, else the newest, else the one of task=recalibrate.

    Args:
        key: the configuration key that errors name.

    Raises:
        ConfigError: see `read`; or the directory has no checkpoint.
    """
    if not is_directory(path):
        return StoredCheckpoint.read(path, key)
    best, recalibrated = path / file_names.CHECKPOINTS / file_names.BEST, path / file_names.RECALIBRATED
    with _permitted(key):
        if best.is_file():
            return StoredCheckpoint.read(best, key)
        stored = newest(path, key)
        if stored is None and recalibrated.is_file():
            stored = StoredCheckpoint.read(recalibrated, key)
    if stored is None:
        raise ConfigError(f"{key}: {str(path)!r} has no checkpoint under checkpoints/")
    return stored


@contextmanager
def _permitted(key: str) -> Iterator[None]:
    """Context that turns a refusal of the file system into a ConfigError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f"{key}: {error.filename}: permission denied; who owns that run can share it (chmod, or share=group for a"
            " new one)"
        ) from None
