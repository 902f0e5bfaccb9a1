"""What survives a job: registered by name, written atomically, read without running code from the file."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from syncbn.surgery.freeze import apply_switches, frozen_switches
from syncbn.training.config.schema import ConfigError

_NAME = re.compile(r"step_(\d+)\.pt")
BEST = "best.pt"
RECALIBRATED = "recalibrated.pt"
DIGEST = "sha256"

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """The checkpoints of one run directory, written in the background.

    Saving stops the job for as long as it takes to copy the state; a thread hashes and writes it, one at a time. A
    write that fails is reported at once, leaves the last good checkpoint where it was, and fails the job when it
    closes.

    Args:
        directory: where they lie; made when the first is written.
        keep: how many of the newest to keep (the best one is a file of its own).
        facts: what goes into every file, the best one too, and is not put back.
        parts: what is saved, by name.
    """

    def __init__(self, directory: Path, keep: int, facts: dict[str, Any] | None = None, **parts: Stateful) -> None:
        self.directory = directory
        self.keep = keep
        self.facts = facts or {}
        self.parts = parts
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failed: BaseException | None = None

    def begin(self, step: int) -> None:
        """Makes the directory that of a run that has done `step` steps: what is later is set aside, as
        `step_*.pt.abandoned`, and half-written files of a killed job go.
        """
        for rest in self.directory.glob(".*.tmp"):
            rest.unlink()
        for later in by_step(self.directory):
            if step_of(later) > step:
                later.rename(later.with_name(f"{later.name}.abandoned"))

    def save(self, step: int, config: dict[str, Any]) -> None:
        """Saves the state after `step` steps, and removes the oldest checkpoints beyond `keep`."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self._submit(self.directory / f"step_{step:08d}.pt", {"step": step, "config": config, **self.facts, **state})

    def save_best(self, step: int, config: dict[str, Any], model: nn.Module) -> None:
        """Saves a model alone, as the best so far."""
        content = {"step": step, "config": config, **self.facts, "model": model.state_dict()}
        self._submit(self.directory / BEST, content)

    def wait(self) -> None:
        """Until everything that was saved lies on the disk, or has failed."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None

    def close(self) -> None:
        """Waits, and raises what went wrong with any write."""
        self.wait()
        self._writer.shutdown()
        if self._failed is not None:
            raise RuntimeError(f"a checkpoint could not be written: {self._failed}") from self._failed

    def load(self, path: Path, key: str) -> int:
        """Puts the state back into the parts; returns the number of steps done."""
        content = read(path, key)
        for name, part in self.parts.items():
            if name not in content:
                raise ConfigError(f"{key}: {path} is not a training checkpoint, it has no {name!r}")
            load_into(part, content[name], path, key)
        return int(content["step"])

    def _submit(self, path: Path, content: dict[str, Any]) -> None:
        self.wait()  # at most one in flight
        self._pending = self._writer.submit(self._write, path, _copied(content))

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        try:
            write_atomically(path, content)
            # Of the files up to this one: newer ones, damaged or of a future that was left, must not push it out.
            for old in [other for other in by_step(self.directory) if other.name <= path.name][: -self.keep]:
                old.unlink()
        except BaseException as error:
            self._failed = error
            log.error("writing %s failed, the last good checkpoint stays: %s", path, error)


def _copied(value: Any) -> Any:
    """Tensors as copies on the CPU, so that training may go on while they are written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    """SHA-256 over the content: keys, plain values, and the types, shapes and bytes of tensors."""
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
        targets = {name: set(state_dict.get(name, ())) for name in self._modules}
        apply_switches(
            self._modules[""],
            [
                (module, switch, switch in targets[name])
                for name, module in self._modules.items()
                for switch in sorted(targets[name] ^ frozen_switches(module))
            ],
        )


def load_into(part: Stateful, content: dict[str, Any], path: Path, key: str) -> None:
    """`part.load_state_dict`, its complaints as a ConfigError that names the key."""
    try:
        part.load_state_dict(content)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise ConfigError(f"{key}: {path} does not fit this configuration: {reason}") from None


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Writes so that `path` is at every moment the old file, the new file or absent, never a part of one.

    A digest of the content goes in with it, which `read` checks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({**content, DIGEST: digest(content)}, file)
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
    expected = content.pop(DIGEST, None)
    if expected is None and {"step", "config", "model"} <= content.keys():
        raise ConfigError(f"{key}: {str(path)!r} has lost its digest; expected a checkpoint as train.py wrote it")
    if expected is not None and expected != digest(content):
        raise ConfigError(f"{key}: {str(path)!r} has been changed since it was written, its digest does not fit")
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
    parts = name.split(".")
    while parts[0] in ("module", "_orig_mod"):
        parts = parts[1:]
    return ".".join(part for part in parts if part != "_orig_mod")


def newest(run_dir: Path) -> Path | None:
    """The newest training checkpoint of a run directory that is whole; a warning for each that is not."""
    return next((path for path in reversed(by_step(run_dir / "checkpoints")) if whole_step(path) is not None), None)


def whole_step(path: Path) -> int | None:
    """The step of a run's checkpoint that is whole; None, with a warning, for any other file."""
    try:
        content = read(path, "resume")
    except ConfigError as error:
        log.warning("%s; it is passed over", error)
        return None
    if "step" in content and "model" in content:
        return int(content["step"])
    log.warning("%s is not a checkpoint of a run; it is passed over", path)
    return None


def best_or_newest(run_dir: Path, key: str) -> Path:
    """The best checkpoint of a run directory, else its newest, else what task=recalibrate has left there."""
    best, recalibrated = run_dir / "checkpoints" / BEST, run_dir / RECALIBRATED
    found = best if best.is_file() else newest(run_dir)
    if found is None and recalibrated.is_file():
        found = recalibrated
    if found is None:
        raise ConfigError(f"{key}: {str(run_dir)!r} has no checkpoint under checkpoints/")
    return found


def step_of(path: Path) -> int:
    """The number of steps done at a training checkpoint, from its name; 0 for another name."""
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else 0


def by_step(directory: Path) -> list[Path]:
    """The training checkpoints, oldest first (the best one is not among them)."""
    return sorted(path for path in directory.glob("step_*.pt") if _NAME.fullmatch(path.name))
