"""Weights alone: a model's state dict out of any file, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.training.checkpoint import contents
from syncbn.training.checkpoint.files import read_best_or_newest
from syncbn.training.config.errors import ConfigError, listed


def read_model_weights(path: Path, key: str, entry: str | None = None) -> dict[str, Tensor]:
    """Reads a model's state dict from a run directory (its best checkpoint), a checkpoint, or a bare state dict.

    Prefixes of DDP and torch.compile are removed from its keys. Its tensors may be of any kind; see
    `contents.why_unusable`.

    Args:
        key: the configuration key that errors name, such as `init.backbone.path`.
        entry: name of the state dict in the file (`init.backbone.key`), dotted if it is nested; None: `model` or
            `state_dict` if the file has one of them, else the file's content itself.

    Raises:
        ConfigError: see `read`; or there is no checkpoint, no such entry, or it is not a dict of tensors by name.
    """
    stored = read_best_or_newest(path, key)
    path, content = stored.path, stored.content
    if entry is None:
        inside = (content[name] for name in ("model", "state_dict") if isinstance(content.get(name), dict))
        weights = next(inside, content)
    else:
        weights = _entry(content, entry, path, key)
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            got = contents.clipped(repr(name))
            raise ConfigError(
                f"{key}: {str(path)!r} is not a state dict, it has the key {got}; expected names of tensors"
            )
        if not isinstance(value, Tensor):
            if name.endswith("_extra_state"):
                continue
            takes = f"; {_key_of_entry(key)}={contents.clipped(name)} takes that one" if isinstance(value, dict) else ""
            raise ConfigError(f"{key}: {str(path)!r} is not a state dict of tensors, {contents.clipped(name)!r} is a"
                              f" {type(value).__name__}{takes if key.endswith('.path') else ''}")  # fmt: skip
        short = _without_wrapper(name)
        if short in named:
            raise ConfigError(f"{key}: {str(path)!r} has {contents.clipped(short)!r} twice, with and without a prefix")
        named[short] = value
    if not named:
        raise ConfigError(f"{key}: {str(path)!r} is not a state dict, it holds no tensor")
    return named


def _entry(content: dict[Any, Any], entry: str, path: Path, key: str) -> dict[Any, Any]:
    """The dict of that name in the content of a file; a ConfigError if there is none."""
    found: Any = content
    for part in [entry] if entry in content else entry.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        names = [contents.clipped(name) for name, value in content.items() if isinstance(value, dict)]
        has = f"it has {listed(names)}" if names else "it is a state dict itself, leave the key out"
        raise ConfigError(f"{_key_of_entry(key)}: {str(path)!r} has no state dict {entry!r}; {has}")
    return found


def _key_of_entry(key: str) -> str:
    """`init.backbone.key`, of `init.backbone.path`."""
    return f"{key.removesuffix('.path')}.key"


def _without_wrapper(name: str) -> str:
    """Removes the prefixes of DDP and torch.compile from a key; what is named like one itself keeps its name."""
    *modules, own = name.split(".")
    while modules and modules[0] in ("module", "_orig_mod"):
        modules = modules[1:]
    return ".".join([*(part for part in modules if part != "_orig_mod"), own])
