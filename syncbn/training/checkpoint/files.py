"""Checkpoint files: atomic writes, reading without executing code from the file, and lookup in a run directory."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.atomic_write import replacing
from syncbn.training.config.errors import ConfigError

log = logging.getLogger(__name__)


_NAME = re.compile(r"step_(\d+)\.pt")
BEST = "best.pt"
RECALIBRATED = "recalibrated.pt"
DIGEST = "sha256"


def digest(value: Any) -> str:
    """SHA-256 digest, in hex, of nested containers: keys, plain values, and dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            total.update(f"tensor {item.dtype} {tuple(item.shape)} ".encode())
            total.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
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
    """Reads a checkpoint or a safetensors file; its tensors are on the CPU.

    Args:
        key: the configuration key that errors name.

    Raises:
        ConfigError: no such file, an unreadable one, other content than a dict, or a missing or wrong digest.
    """
    if not path.is_file():
        raise ConfigError(f"{key}: expected a checkpoint, found no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Without torch's message, which suggests loading the file with weights_only=False.
        raise ConfigError(f"{key}: {str(path)!r} is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {str(path)!r} holds a {type(content).__name__}, expected a checkpoint or state dict")
    expected = content.pop(DIGEST, None)
    if expected is None and {"step", "config", "model"} <= content.keys():
        raise ConfigError(f"{key}: {str(path)!r} has lost its digest; expected a checkpoint as train.py wrote it")
    if expected is not None and expected != digest(content):
        raise ConfigError(f"{key}: {str(path)!r} has been changed since it was written, its digest does not fit")
    return content


def read_model_weights(path: Path, key: str) -> dict[str, Tensor]:
    """Reads a model's state dict from a run directory (its best checkpoint), a checkpoint, or a bare state dict.

    Prefixes of DDP and torch.compile are removed from its keys.

    Args:
        key: the configuration key that errors name.

    Raises:
        ConfigError: see `read`; or there is no checkpoint, or values that are not tensors.
    """
    stored = read_best_or_newest(path, key)
    path, content = stored.path, stored.content
    weights = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), dict)), content)
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"{key}: {str(path)!r} is not a state dict of tensors")
    return {_without_wrapper(name): value for name, value in weights.items()}


def _without_wrapper(name: str) -> str:
    """Removes the prefixes of DDP and torch.compile from a key."""
    parts = name.split(".")
    while parts[0] in ("module", "_orig_mod"):
        parts = parts[1:]
    return ".".join(part for part in parts if part != "_orig_mod")


@dataclass(frozen=True)
class Stored:
    """A checkpoint file that has been read and whose digest has been checked, so that neither is done again."""

    path: Path
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path, key: str) -> Stored:
        """Reads the file; see the function `read`."""
        return cls(path, read(path, key))

    @property
    def step(self) -> int:
        """The number of steps done when it was written."""
        return int(self.content["step"])


def newest(run_dir: Path) -> Stored | None:
    """Reads the newest intact training checkpoint of a run directory; warns of each newer one that is damaged."""
    whole = (read_whole(path) for path in reversed(by_step(run_dir / "checkpoints")))
    return next((stored for stored in whole if stored is not None), None)


def read_whole(path: Path) -> Stored | None:
    """Reads an intact checkpoint of a run; for any other file logs a warning and returns None."""
    try:
        stored = Stored.read(path, "resume")
    except ConfigError as error:
        log.warning("%s; it is passed over", error)
        return None
    if "step" in stored.content and "model" in stored.content:
        return stored
    log.warning("%s is not a checkpoint of a run; it is passed over", path)
    return None


def read_best_or_newest(path: Path, key: str) -> Stored:
    """Reads a file, or of a run directory its best checkpoint, else the newest, else the one of task=recalibrate.

    Args:
        key: the configuration key that errors name.

    Raises:
        ConfigError: see `read`; or the directory has no checkpoint.
    """
    if not path.is_dir():
        return Stored.read(path, key)
    best, recalibrated = path / "checkpoints" / BEST, path / RECALIBRATED
    if best.is_file():
        return Stored.read(best, key)
    stored = newest(path)
    if stored is None and recalibrated.is_file():
        stored = Stored.read(recalibrated, key)
    if stored is None:
        raise ConfigError(f"{key}: {str(path)!r} has no checkpoint under checkpoints/")
    return stored


def step_of(path: Path) -> int:
    """The number of steps done, from the name of a training checkpoint; 0 for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else 0


def by_step(directory: Path) -> list[Path]:
    """Paths of the training checkpoints step_*.pt, oldest first; the best one is a separate file and not included."""
    return sorted(path for path in directory.glob("step_*.pt") if _NAME.fullmatch(path.name))
