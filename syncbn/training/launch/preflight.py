"""What a job needs of this machine, looked at before torch is imported: directories, checkpoints, modules.

Only whether they are there. What is wrong inside of them is found where they are read, with the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from syncbn.report import file_names
from syncbn.training.checkpoint.paths import by_step, is_directory, size_of_file
from syncbn.training.config.data import (
    DecodedConfig,
    FashionMnistConfig,
    ImageFolderConfig,
    MaskFolderConfig,
    TableConfig,
)
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.keys import readers
from syncbn.training.config.layout import idx_file, root_of, splits_of_classes, splits_of_masks, table_file
from syncbn.training.config.output import output_root, short
from syncbn.training.config.schema import Config
from syncbn.training.config.targets import require_module
from syncbn.training.distributed.world import restarts


def check_machine(config: Config, held_back: Sequence[str] = ()) -> None:
    """Checks that whatever the configuration names is there, as far as the task reads it.

    A run that goes on takes its configuration from its checkpoint, so of that only what is given is looked at.

    Args:
        held_back: overrides for the configuration that `load` holds.

    Raises:
        ConfigError: a directory, checkpoint or module is not there; the message names the key and the path.
    """
    if restarts() != "0":  # all was there when the job began
        return
    root = output_root(config.output_dir)
    if config.load is not None and _reads(config, "load"):
        _require_checkpoint("load", config.load, root)
    if config.task == "train" and config.resume not in ("auto", "none"):
        _require_checkpoint("resume", config.resume, root)
    if config.task == "predict":
        for path in config.predict.paths:
            if not Path(path).expanduser().exists():
                raise ConfigError(f"predict.path: expected a directory or a file, found none at {path!r}")
    if config.eval.path is not None and config.task == "eval" and not _exists(config.eval.path):
        raise ConfigError(f"eval.path: expected a directory or a table, found none at {config.eval.path!r}")
    for override in held_back:
        key, _, path = override.lstrip("+").partition("=")
        if key == "data.path" and path.isprintable() and not set(path) & set("'\"$[{\\,") and not _exists(path):
            raise ConfigError(f"data.path: expected a directory or a table, found none at {path!r}")
    if config.task == "train" and (config.resume not in ("auto", "none") or _goes_on(config, root)):
        return
    for name, init in config.init.items() if _reads(config, "init") else ():
        _require_checkpoint(f"init.{name}.path", init.path, root)
    if config.load is None:
        _check_data(config)
        for key, node in _targets(config):
            if _reads(config, key.partition(".")[0]):
                require_module(key, node["_target_"])


def _reads(config: Config, key: str) -> bool:
    return config.task in (readers(key) or ())


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name that is too long, or the ~ of an unknown user
        return False


def _goes_on(config: Config, root: Path) -> bool:
    """Whether the run directory has a checkpoint, from which the run goes on."""
    try:
        return config.run is not None and any(by_step(root / str(config.run) / file_names.CHECKPOINTS))
    except OSError:  # no name for a directory: told where it is made
        return False


def _check_data(config: Config) -> None:
    data = config.data
    if isinstance(data, FashionMnistConfig):
        idx_file(Path(data.path).expanduser(), "train-images-idx3")
    if isinstance(data, TableConfig):
        table_file(Path(data.path).expanduser(), "data.path")
    elif isinstance(data, DecodedConfig):
        root = root_of(data)
        if config.task == "check":  # which tells all that is wrong below it
            return
        if isinstance(data, ImageFolderConfig):
            splits_of_classes(root)
        elif isinstance(data, MaskFolderConfig):
            splits_of_masks(root)


def _targets(config: Config) -> Iterator[tuple[str, Any]]:
    """The nodes with a `_target_`, by key."""
    nodes = {"model": config.model, "data": config.data, "loss": config.loss, "optimizer": config.optimizer}
    yield from ((key, node) for key, node in nodes.items() if isinstance(node, dict))
    yield from ((f"metrics.{name}", node) for name, node in config.metrics.items())
    yield from ((f"data.augment.{name}", node) for name, node in getattr(config.data, "augment", {}).items())


def _require_checkpoint(key: str, text: str, root: Path) -> None:
    """Raises a ConfigError unless there is a file, or a run directory with a checkpoint."""
    path = Path(text)
    if not is_directory(path):
        try:
            size_of_file(path, key)
        except ConfigError as error:
            raise ConfigError(f"{error}{_instead(text, root)}") from None
        return
    whole = [] if key == "resume" else [path / file_names.CHECKPOINTS / file_names.BEST, path / file_names.RECALIBRATED]
    try:
        if any(by_step(path / file_names.CHECKPOINTS)) or any(file.is_file() for file in whole):
            return
        runs = sorted(below.parent.name for below in path.glob("*/checkpoints"))
    except OSError:  # told where it is read
        return
    hint = f"; the runs in it are {listed(runs)}" if runs else ""
    raise ConfigError(f"{key}: {text!r} has no checkpoint under checkpoints/{hint}")


def _instead(text: str, root: Path) -> str:
    """What to say about a path that is not there: the run that it may mean."""
    runs = sorted(path.name for path in root.iterdir() if path.is_dir()) if is_directory(root) else []
    near = [text] if text in runs else get_close_matches(Path(text).name, runs, n=1)
    return f"; did you mean {short(root / near[0])}?" if near else ""
