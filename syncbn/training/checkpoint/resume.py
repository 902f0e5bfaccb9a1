"""Going on with a run: which checkpoint, and which configuration.

The stored configuration is the run's. What the command line says again is compared with it: a few keys may change
between attempts, for any other a difference is an error, because the run would silently be another one from there on.
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
from syncbn.training.config.parsing import flatten, parse, to_dict
from syncbn.training.config.redaction import is_redacted, redacted
from syncbn.training.config.schema import SCHEMAS, Config
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext

log = logging.getLogger(__name__)

# What may differ from one attempt to the next: where and how long it runs, and how it is watched.
MAY_CHANGE = ("task", "run", "resume", "load", "device", "duration", "eval_every", "log_every", "profile", "save",
              "tracker", "on_nonfinite", "collective_timeout", "bn.debug", "audit", "data.path", "data.workers",
              "data.prefetch", "data.cache", "eval", "recalibrate", "export")  # fmt: skip
# What a resumed run does not use: the checkpoint has the weights, so the file that they once came from may be gone.
_UNUSED = ("init",)
_GROUPS = (*SCHEMAS, "freeze", "tracker")
_ANYTHING = ("experiment", "debug")  # choices that may set any key


def checkpoint_to_resume(config: Config, run_dir: Path) -> Stored | None:
    """The checkpoint that this run goes on from; None for a new run.

    A path is where a run begins. Once the run has checkpoints of its own it goes on from those, unless the path is one
    of them.

    Raises:
        ConfigError: `resume=none` in a directory that holds a run already; no checkpoint where one was named.
    """
    present = newest(run_dir)
    if config.resume == "auto" or (present is not None and world.attempt() != "0"):
        return present  # whatever the first attempt started from, after a restart the run goes on
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
    """The configuration of the run that the checkpoint belongs to, with what the command line may change.

    Raises:
        ConfigError: a key given on the command line differs from the stored one and may not change.
    """
    path, stored, current = checkpoint.path, checkpoint.content["config"], to_dict(config)
    before, now = ({k: v for k, v in flatten(node) if v != {}} for node in (stored, current))
    merged = OmegaConf.create(stored)
    for key, value in before.items():
        if is_redacted(value) and redacted(now.get(key), key.split(".")[-1]) == value:
            OmegaConf.update(merged, key, now[key])  # a secret is not stored: it has been given anew
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
    return parse({str(key): value for key, value in container.items()})


def require_secrets(config: Mapping[Any, Any], path: Path, unused: tuple[str, ...] = _UNUSED) -> None:
    """Raises a ConfigError for a value that a checkpoint does not store and nobody has given.

    Args:
        unused: groups that nothing will read.
    """
    for key, value in flatten(config):
        if is_redacted(value) and key.split(".")[0] not in unused:
            raise ConfigError(f"{key}: is a secret, which {path} does not hold; give it on the command line")


def _given_keys(overrides: Sequence[str], keys: set[str]) -> set[str]:
    """The keys that the command line sets, one by one or by choosing a group."""
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
    """Keeps which class has which number in `classes.json` of the run.

    Raises:
        ConfigError: the run that goes on began with other classes.
    """
    path = run_dir / "classes.json"
    here = json.loads(path.read_text(encoding="utf-8")) if context.is_first and path.exists() else None
    stored = world.on_all_ranks(here)[0]
    if stored not in (None, list(names)):
        raise ConfigError(f"data.path: this run began with the classes {listed(stored)}, the data has"
                          f" {listed(names)}; start another run with run=...")  # fmt: skip
    if stored is None and names and context.is_first:
        write_text(path, json.dumps(list(names)) + "\n")
