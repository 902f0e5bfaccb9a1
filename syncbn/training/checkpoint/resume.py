"""Resuming a run: choice of the checkpoint, and merging of its configuration with the command line.

A resumed run uses the configuration in its checkpoint. Keys given on the command line are compared with it: those in
MAY_CHANGE may differ; for any other key a difference is an error, because it would silently make it another run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from syncbn.atomic_write import write_text
from syncbn.training.checkpoint.files import Stored, newest
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.parsing import flatten, of_command, parse, to_dict
from syncbn.training.config.redaction import is_redacted, redacted
from syncbn.training.config.schema import SCHEMAS, Config
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext

log = logging.getLogger(__name__)

# Keys that may differ between attempts: where and how long the run goes, and how it is evaluated, logged and saved.
MAY_CHANGE = ("task", "run", "resume", "load", "device", "duration", "eval_every", "log_every", "profile", "save",
              "tracker", "on_nonfinite", "collective_timeout", "bn.debug", "audit", "data.path", "data.workers",
              "data.prefetch", "data.cache", "eval", "recalibrate", "export")  # fmt: skip
# Groups that a resumed run does not read: the checkpoint has the weights, so the file they came from may be gone.
_UNUSED = ("init",)
_GROUPS = (*SCHEMAS, "freeze", "tracker")
_ANYTHING = ("experiment", "debug")  # config groups that may set any key


def checkpoint_to_resume(config: Config, run_dir: Path) -> Stored | None:
    """Reads the checkpoint that this run resumes from; None for a new run.

    With `resume=PATH` a run starts from that path. Once it has checkpoints of its own, it resumes from the newest of
    those, unless the path is in its own directory.

    Raises:
        ConfigError: `resume=none` in a directory that already holds a run, or no checkpoint at the given path.
    """
    present = newest(run_dir)
    if config.resume == "auto" or (present is not None and world.attempt() != "0"):
        return present  # after a restart by torchrun, whatever `resume` says
    if present is not None and config.resume == "none":
        raise ConfigError(f"resume: {run_dir} holds a run already; choose another name with run=..., or resume=auto")
    if config.resume == "none":
        return None
    path = Path(config.resume)
    if present is not None and run_dir.resolve() not in path.resolve().parents:
        log.info("%s holds checkpoints of its own and goes on from them; resume=%s was its beginning", run_dir, path)
        return present
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise ConfigError(f"resume: {config.resume!r} has no checkpoint under checkpoints/")
        return found
    return Stored.read(path, "resume")


def merge_with_stored(config: Config, checkpoint: Stored, overrides: Sequence[str]) -> Config:
    """The configuration stored in the checkpoint, with the MAY_CHANGE keys that the command line sets.

    Args:
        config: the configuration composed from the command line, from which changed values are taken.
        checkpoint: its entry "config" is the stored configuration.
        overrides: the command line's overrides, which tell the keys that it sets.

    Raises:
        ConfigError: another key on the command line differs from the stored value, or a redacted secret is not given.
    """
    path, stored, current = checkpoint.path, checkpoint.content["config"], to_dict(config)
    before, now = ({k: v for k, v in flatten(node) if v != {}} for node in (stored, current))
    merged = OmegaConf.create(stored)
    for key, value in before.items():
        if is_redacted(value) and redacted(now.get(key), key.split(".")[-1]) == value:
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
        ConfigError: on every rank, the file has other classes: the resumed run began with them.
    """
    path = run_dir / "classes.json"
    here = json.loads(path.read_text(encoding="utf-8")) if context.is_first and path.exists() else None
    stored = world.on_all_ranks(here)[0]
    if stored not in (None, list(names)):
        raise ConfigError(f"data.path: this run began with the classes {listed(stored)}, the data has"
                          f" {listed(names)}; start another run with run=...")  # fmt: skip
    if stored is None and names and context.is_first:
        write_text(path, json.dumps(list(names)) + "\n")
