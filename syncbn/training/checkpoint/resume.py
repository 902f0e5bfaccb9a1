"""Resuming a run: choice of the checkpoint, and merging of its configuration with the command line.

A resumed run uses the configuration in its checkpoint. Keys given on the command line are compared with it: those in
MAY_CHANGE may differ; for any other key a difference is an error, because it would silently make it another run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from syncbn.atomic_write import write_text
from syncbn.report import file_names
from syncbn.training.checkpoint.files import StoredCheckpoint, newest
from syncbn.training.checkpoint.paths import by_step, is_directory
from syncbn.training.config.errors import ConfigError, configured_by, listed
from syncbn.training.config.output import OF_COMMAND
from syncbn.training.config.parsing import flatten, of_command, parse, to_dict
from syncbn.training.config.redaction import is_redacted, redacted
from syncbn.training.config.run_files import read_json
from syncbn.training.config.schema import SCHEMAS, Config
from syncbn.training.config.trust import Command, check_stored
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext

log = logging.getLogger(__name__)

# Keys that may differ between attempts: where and how long the run goes, and how it is evaluated, logged and saved.
MAY_CHANGE = ("task", "run", "resume", "load", "device", "duration", "eval_every", "early_stop", "log_every",
              "profile", "save", "tracker", "on_nonfinite", "collective_timeout", "bn.debug", "audit", "data.path",
              "bn.averaged", "data.workers", "data.prefetch", "data.cache", "eval", "recalibrate", "export", "predict",
              "graph")  # fmt: skip
# Groups that a resumed run does not read: the checkpoint has the weights, so the file they came from may be gone.
_UNUSED = ("init",)
_GROUPS = (*SCHEMAS, "freeze", "tracker")
_ANYTHING = ("experiment", "debug")  # config groups that may set any key


def checkpoint_to_resume(config: Config, run_dir: Path) -> StoredCheckpoint | None:
    """Reads the checkpoint that this run resumes from; None for a new run.

    With `resume=PATH` a run starts from that path. Once it has checkpoints of its own, it resumes from the newest of
    those, unless the path is in its own directory.

    Raises:
        ConfigError: `resume=none` in a directory that already holds a run, no checkpoint of a run at the given path, or
            a run none of whose checkpoints is intact: to begin it anew would overwrite its records.
    """
    present, directory = newest(run_dir), run_dir / file_names.CHECKPOINTS
    if present is None and (damaged := by_step(directory)):
        raise ConfigError(f"run: none of the {len(damaged)} checkpoints in {directory} is intact; choose another name"
                          " with run=..., or remove them to begin anew")  # fmt: skip
    if config.resume == "auto" or (present is not None and world.attempt() != "0"):
        return present  # after a restart by torchrun, whatever `resume` says
    if present is not None and config.resume == "none":
        raise ConfigError(f"resume: {run_dir} holds a run already; choose another name with run=..., or resume=auto")
    if config.resume == "none":
        return None
    path = Path(config.resume)
    if present is not None and not is_below(path, run_dir):
        log.info("%s holds checkpoints of its own and goes on from them; resume=%s was its beginning", run_dir, path)
        return present
    if is_directory(path):
        found = newest(path)
        if found is None:
            raise ConfigError(f"resume: {config.resume!r} has no checkpoint under checkpoints/")
        return found
    stored = StoredCheckpoint.read(path, "resume")
    stored.require_run("resume")
    return stored


def is_below(path: Path, directory: Path) -> bool:
    """Whether the path, with symbolic links followed as far as they lead, is below the directory."""
    return Path(os.path.realpath(directory)) in Path(os.path.realpath(path)).parents


def merge_with_stored(config: Config, checkpoint: StoredCheckpoint, overrides: Sequence[str]) -> Config:
    """The configuration stored in the checkpoint, with the MAY_CHANGE keys that the command line sets.

    Args:
        config: the configuration composed from the command line, from which changed values are taken.
        checkpoint: its entry "config" is the stored configuration.
        overrides: the command line's overrides, which tell the keys that it sets.

    Raises:
        ConfigError: another key on the command line differs from the stored value, a redacted secret is not given, or
            the stored configuration is none, or names code that this command does not trust.
    """
    path, current = checkpoint.path, to_dict(config)
    stored = {key: value for key, value in checkpoint.content["config"].items() if key not in OF_COMMAND}
    check_stored(stored, "resume", path, Command(current, config.trust))
    with configured_by(path):
        parse(stored)
    before, now = ({k: v for k, v in flatten(node) if v != {}} for node in (stored, current))
    merged = OmegaConf.create(stored)
    for key, value in before.items():
        if is_redacted(value) and redacted(now.get(key), key) == value:
            OmegaConf.update(merged, key, now[key])  # checkpoints hold no secrets; take the one given now
            before[key] = now[key]
    for key in sorted(_given_keys(overrides, before.keys() | now.keys())):
        if key.split(".")[0] in _UNUSED:
            continue
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in MAY_CHANGE):
            OmegaConf.update(merged, key, now.get(key), force_add=True)
        elif before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: the run that {path} belongs to has {before.get(key)!r}, got {now.get(key)!r}; leave it as it"
                " was, or start another run with run=..."
            )
    container = OmegaConf.to_container(merged)
    assert isinstance(container, dict)
    require_secrets(container, path)
    return parse({str(key): value for key, value in container.items()} | of_command(config))


def require_secrets(config: Mapping[Any, Any], path: Path, unused: tuple[str, ...] = _UNUSED) -> None:
    """Raises a ConfigError if a secret that the checkpoint does not hold is not given on the command line.

    Args:
        config: the configuration, in which such a secret is still redacted.
        path: the checkpoint, for the message.
        unused: top-level keys that are not read, and so may stay redacted.
    """
    for key, value in flatten(config):
        if is_redacted(value) and key.split(".")[0] not in unused:
            raise ConfigError(f"{key}: is a secret, which {path} does not hold; give it on the command line")


def _given_keys(overrides: Sequence[str], keys: set[str]) -> set[str]:
    """The dotted keys, among `keys`, that overrides set, singly or by choosing a config group."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given: set[str] = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        if name in _ANYTHING:
            return keys
        below = {key for key in keys if key.startswith(f"{name}.")}
        given |= below | ({name} if name in keys or (not below and name not in _GROUPS) else set())
    return given & keys


def record_classes(run_dir: Path, names: Sequence[str], context: RankContext) -> None:
    """Writes the class names, in the order of their labels, to `classes.json` of the run, or compares with that file.

    Rank 0 reads and writes the file; a collective over all ranks.

    Raises:
        ConfigError: on every rank, the file has other classes: the resumed run began with them; or it is damaged.
    """
    path = run_dir / file_names.CLASSES
    with failing_together():
        here = _read_classes(path) if context.is_first else None
    stored = world.on_all_ranks(here)[0]
    if stored not in (None, list(names)):
        raise ConfigError(f"data.path: this run began with the classes {listed(stored)}, the data has"
                          f" {listed(names)}; start another run with run=...")  # fmt: skip
    if stored is None and names and context.is_first:
        write_text(path, json.dumps(list(names)) + "\n")


def _read_classes(path: Path) -> list[str] | None:
    """The class names in the file; None if there is no such file."""
    try:
        names = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"run: {path} {error}; remove it, if the data are those that the run began with") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"run: {path} is no list of class names; remove it, if the data are those that the run began"
                          " with")  # fmt: skip
    return names
