"""What survives a job: registered by name, written atomically, read without running code from the file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from syncbn.surgery.freezing import frozen_switches, set_switch
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
        for old in _by_step(self.directory)[: -self.keep]:
            old.unlink()
        return path

    def load(self, path: Path, key: str) -> int:
        """Puts the state back into the parts; returns the number of steps done."""
        content = read(path, key)
        for name, part in self.parts.items():
            if name not in content:
                raise ConfigError(f"{key}: {path} is not a training checkpoint, it has no {name!r}")
            load_into(part, content[name], path, key)
        return int(content["step"])


class FrozenSwitches:
    """The frozen switches of a model's modules, which its state dict does not carry."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())

    def state_dict(self) -> dict[str, Any]:
        """The frozen ones of "stats", "affine" and "weights" of every module that has one."""
        switches = {name: sorted(frozen_switches(module)) for name, module in self._modules.items()}
        return {name: frozen for name, frozen in switches.items() if frozen}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Freezes and unfreezes accordingly."""
        for name, module in self._modules.items():
            target = set(state_dict.get(name, ()))
            for switch in sorted(target ^ frozen_switches(module)):
                set_switch(module, switch, switch in target)


def load_into(part: Stateful, content: dict[str, Any], path: Path, key: str) -> None:
    """`part.load_state_dict`, its complaints as a ConfigError that names the key."""
    try:
        part.load_state_dict(content)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise ConfigError(f"{key}: {path} does not fit this configuration: {reason}") from None


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
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not torch's message: it suggests to load the file with code execution switched on.
        raise ConfigError(f"{key}: {str(path)!r} is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {str(path)!r} holds a {type(content).__name__}, expected a checkpoint or state dict")
    return content


def read_model_weights(path: Path, key: str) -> dict[str, Tensor]:
    """A model's state dict, from a run directory (its best checkpoint), a checkpoint, or a bare state dict."""
    if path.is_dir():
        path = best_or_newest(path, key)
    content = read(path, key)
    weights = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), dict)), content)
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"{key}: {str(path)!r} is not a state dict of tensors")
    return {_without_wrapper(name): value for name, value in weights.items()}


def _without_wrapper(name: str) -> str:
    """A key as it is without DDP's and torch.compile's prefixes."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def newest(run_dir: Path) -> Path | None:
    """The newest training checkpoint of a run directory."""
    return next(reversed(_by_step(run_dir / "checkpoints")), None)


def best_or_newest(run_dir: Path, key: str) -> Path:
    """The best checkpoint of a run directory, else its newest."""
    best = run_dir / "checkpoints" / BEST
    found = best if best.is_file() else newest(run_dir)
    if found is None:
        raise ConfigError(f"{key}: {str(run_dir)!r} has no checkpoint under checkpoints/")
    return found


def step_of(path: Path) -> int:
    """The number of steps done at a training checkpoint, from its name; 0 for another name."""
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else 0


def _by_step(directory: Path) -> list[Path]:
    """The training checkpoints, oldest first (the best one is not among them)."""
    return sorted(path for path in directory.glob("step_*.pt") if _NAME.fullmatch(path.name))
