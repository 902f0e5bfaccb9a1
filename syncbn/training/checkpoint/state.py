"""Saving and restoring the state of a job: parts registered by name, in checkpoint files that a thread writes."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from syncbn.atomic_write import replacing
from syncbn.report import file_names
from syncbn.training.checkpoint.files import StoredCheckpoint, read_whole, write_atomically
from syncbn.training.checkpoint.fit import fitted, of_same_form
from syncbn.training.checkpoint.paths import by_step, step_of
from syncbn.training.config.errors import ConfigError, RankError, one_line, printable
from syncbn.training.config.output import short, unwritable

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Protocol of an object with a state dict."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """The checkpoints of one run directory, written by a background thread.

    Saving blocks the job only while the state is copied to the CPU (and an earlier write is unfinished); the thread
    computes the digest and writes, one file at a time. A write that fails is logged at once, leaves the last good
    checkpoint in place, and makes `close` raise.

    Args:
        directory: directory of the files; created with the first one.
        keep: number of newest checkpoints to keep, in addition to the best one, which is a separate file.
        facts: entries that every file gets, also the best one, and that `load` does not restore.
        parts: the objects whose state is saved and restored, by name.
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
        """Path of the best model if it is of `step`: this run's own, or the one beside the checkpoint resumed from.

        One that does not fit the model is passed over, like one that is damaged.
        """
        candidates = dict.fromkeys([self.directory / file_names.BEST, resumed_from.with_name(file_names.BEST)])
        for path in candidates:
            stored = read_whole(path) if path.exists() else None
            if stored is None or stored.step != step:
                continue
            if of_same_form(stored.content["model"], self.parts["model"].state_dict()):
                return path
            log.warning("%s does not fit the model; it is passed over", path)
        return None

    def begin(self, step: int, best: Path | None = None) -> None:
        """Prepares the directory for a run that resumes at `step`.

        Checkpoints of later steps are renamed to `step_*.pt.abandoned`, temporary files of a killed job are deleted,
        and `best` is copied here.

        Args:
            best: file of the best model so far, possibly of another run; None for none.
        """
        for rest in self.directory.glob(".*.tmp"):
            if not rest.is_dir():
                rest.unlink()
        for later in by_step(self.directory):
            if step_of(later) > step:
                later.rename(later.with_name(f"{later.name}.abandoned"))
        own = self.directory / file_names.BEST
        if best is not None and best != own:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(own) as temporary:
                shutil.copyfile(best, temporary)

    def path_of(self, step: int) -> Path:
        """The file of the checkpoint after `step` steps."""
        return self.directory / f"step_{step:08d}.pt"

    def save(self, step: int) -> None:
        """Copies the state after `step` steps and hands it to the background thread to write.

        After the write the thread deletes the oldest training checkpoints beyond `keep`.
        """
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self._submit(self.path_of(step), {"step": step, **self.facts, **state})

    def save_best(self, step: int, model: nn.Module) -> None:
        """Copies the model's state dict and hands it to the background thread, as the best model so far."""
        content = {"step": step, **self.facts, "model": model.state_dict()}
        self._submit(self.directory / file_names.BEST, content)

    def wait(self) -> None:
        """Blocks until the pending write is on disk or has failed; does not raise its error."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None

    def close(self) -> None:
        """Waits for the pending write and ends the thread.

        Raises:
            RankError: a write has failed.
        """
        self.wait()
        self._writer.shutdown()
        if self._failed is None or not self.directory.parent.is_dir():  # the trainer tells all ranks that it is gone
            return
        reason = unwritable(self._failed) if isinstance(self._failed, OSError) else repr(self._failed)
        good = by_step(self.directory)
        begins = f"{short(good[-1])}, the last good checkpoint" if good else "the beginning, as there is no checkpoint"
        raise RankError(
            f"a checkpoint could not be written: {reason}; then the same command, with this run's name, goes on from"
            f" {begins}"
        ) from None

    def load(self, stored: StoredCheckpoint, key: str) -> int:
        """Loads the state of a checkpoint into the parts; returns the number of steps done.

        Args:
            key: the configuration key that errors name.

        Raises:
            ConfigError: a part is missing in the checkpoint or does not accept its state.
        """
        for name, part in self.parts.items():
            if name not in stored.content:
                raise ConfigError(f"{key}: {stored.path} is not a training checkpoint, it has no {name!r}")
            load_into(part, stored.content[name], stored.path, key)
        return stored.step

    def _submit(self, path: Path, content: dict[str, Any]) -> None:
        self.wait()  # at most one write is pending
        self._pending = self._writer.submit(self._write, path, copied(content))

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        try:
            write_atomically(path, content)
            # Count files up to this one only: later ones, damaged or of an abandoned attempt, must not displace it.
            files = [other for other in by_step(self.directory) if other.name <= path.name and not other.is_dir()]
            for old in files[: -self.keep]:
                old.unlink()
        except BaseException as error:
            self._failed = error
            log.error("writing %s failed, the last good checkpoint stays: %s", path, error)


def copied(value: Any) -> Any:
    """Copies the tensors in nested dicts and lists to the CPU, each in full and apart from the others.

    So training can continue while they are written.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def load_into(part: Stateful, content: dict[str, Any], path: Path, key: str) -> None:
    """Calls `part.load_state_dict`; raises as a ConfigError that names key and file what it cannot take.

    After an error the part may be loaded in part: whoever catches it must not go on with it.
    """
    try:
        part.load_state_dict(fitted(part, content))
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = printable(one_line(error))[:240]
        raise ConfigError(f"{key}: {path} does not fit this configuration: {reason}") from None
