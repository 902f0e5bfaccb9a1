"""What survives a job: registered by name, written atomically, read without running code from the file."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from syncbn.atomic_write import replacing
from syncbn.training.checkpoint.files import BEST, Stored, by_step, read_whole, step_of, write_atomically
from syncbn.training.config.errors import ConfigError

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

    def find_best(self, resumed_from: Path, step: int) -> Path | None:
        """The best model so far, of `step`: this run's own, or the one beside the checkpoint that it resumes from."""
        candidates = dict.fromkeys([self.directory / BEST, resumed_from.with_name(BEST)])
        for path in candidates:
            stored = read_whole(path) if path.exists() else None
            if stored is not None and stored.step == step:
                return path
        return None

    def begin(self, step: int, best: Path | None = None) -> None:
        """Makes the directory that of a run that has done `step` steps: what is later is set aside, as
        `step_*.pt.abandoned`, and half-written files of a killed job go.

        Args:
            best: the best model so far, which may be another run's; it is copied here.
        """
        for rest in self.directory.glob(".*.tmp"):
            rest.unlink()
        for later in by_step(self.directory):
            if step_of(later) > step:
                later.rename(later.with_name(f"{later.name}.abandoned"))
        own = self.directory / BEST
        if best is not None and best != own:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(own) as temporary:
                shutil.copyfile(best, temporary)

    def save(self, step: int) -> None:
        """Saves the state after `step` steps, and removes the oldest checkpoints beyond `keep`."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self._submit(self.directory / f"step_{step:08d}.pt", {"step": step, **self.facts, **state})

    def save_best(self, step: int, model: nn.Module) -> None:
        """Saves a model alone, as the best so far."""
        content = {"step": step, **self.facts, "model": model.state_dict()}
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

    def load(self, stored: Stored, key: str) -> int:
        """Puts the state back into the parts; returns the number of steps done."""
        for name, part in self.parts.items():
            if name not in stored.content:
                raise ConfigError(f"{key}: {stored.path} is not a training checkpoint, it has no {name!r}")
            load_into(part, stored.content[name], stored.path, key)
        return stored.step

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


def load_into(part: Stateful, content: dict[str, Any], path: Path, key: str) -> None:
    """`part.load_state_dict`, its complaints as a ConfigError that names the key."""
    try:
        part.load_state_dict(content)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise ConfigError(f"{key}: {path} does not fit this configuration: {reason}") from None
