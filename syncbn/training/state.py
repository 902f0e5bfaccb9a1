"""What survives a job: registered by name, written atomically, read without running code from the file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.training.config import ConfigError

_NAME = re.compile(r"step_(\d+)\.pt")
BEST = "best.pt"


class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: where they lie; made when the first is written.
        keep: how many of the newest to keep (the best one is a file of its own).
        parts: what is saved, by name.
    """

    def __init__(self, directory: Path, keep: int, **parts: Stateful) -> None:
        self.directory = directory
        self.keep = keep
        self.parts = parts

    def save(self, step: int, config: dict[str, Any]) -> Path:
        """Writes the state after `step` steps and removes the oldest beyond `keep`."""
        path = self.directory / f"step_{step:08d}.pt"
        write_atomically(path, {"step": step, "config": config, **{k: p.state_dict() for k, p in self.parts.items()}})
        for old in self.all()[: -self.keep]:
            old.unlink()
        return path

    def all(self) -> list[Path]:
        """The checkpoints by step, oldest first (the best one is not among them)."""
        return sorted(path for path in self.directory.glob("step_*.pt") if _NAME.fullmatch(path.name))

    def load(self, path: Path, key: str) -> int:
        """Puts the state back into the parts; returns the number of steps done."""
        content = read(path, key)
        for name, part in self.parts.items():
            if name not in content:
                raise ConfigError(f"{key}: {path} is not a training checkpoint, it has no {name!r}")
            part.load_state_dict(content[name])
        return int(content["step"])


class FrozenSwitches:
    """The frozen switches of a model's layers, which its state dict does not carry."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)}

    def state_dict(self) -> dict[str, Any]:
        """Per layer: statistics frozen, affine frozen."""
        return {name: [layer.stats_frozen, layer.affine_frozen] for name, layer in self._layers.items()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Freezes and unfreezes accordingly."""
        for name, (stats, affine) in state_dict.items():
            self._layers[name].unfreeze(stats=not stats, affine=not affine).freeze(stats=stats, affine=affine)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Writes so that `path` is at every moment the old file, the new file or absent, never a part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename too must survive a power cut
    finally:
        os.close(descriptor)


def read(path: Path, key: str) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; `key` is the configuration key that errors name."""
    if not path.is_file():
        raise ConfigError(f"{key}: expected a checkpoint, found no file {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{key}: {str(path)!r} is not a readable checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {str(path)!r} holds a {type(content).__name__}, expected a checkpoint or state dict")
    return content


def read_model_weights(path: Path, key: str) -> dict[str, Tensor]:
    """A model's state dict, from a run directory (its best checkpoint), a checkpoint, or a bare state dict."""
    if path.is_dir():
        path = best_or_newest(path, key)
    content = read(path, key)
    weights = content.get("model", content) if "step" in content else content
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"{key}: {str(path)!r} is not a state dict of tensors")
    return weights


def best_or_newest(run_dir: Path, key: str) -> Path:
    """The best checkpoint of a run directory, else its newest."""
    directory = run_dir / "checkpoints"
    candidates = [directory / BEST, *sorted(directory.glob("step_*.pt"), reverse=True)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ConfigError(f"{key}: {str(run_dir)!r} has no checkpoint under checkpoints/")
    return found
