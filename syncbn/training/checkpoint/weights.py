"""Weights alone: a model's state dict out of any file, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from syncbn.training.checkpoint import contents
from syncbn.training.checkpoint.files import read_best_or_newest
from syncbn.training.config.errors import ConfigError


def read_model_weights(path: Path, key: str) -> dict[str, Tensor]:
    """Reads a model's state dict from a run directory (its best checkpoint), a checkpoint, or a bare state dict.

    Prefixes of DDP and torch.compile are removed from its keys. Its tensors may be of any kind; see
    `contents.why_unusable`.

    Args:
        key: the configuration key that errors name.

    Raises:
        ConfigError: see `read`; or there is no checkpoint, or it is not a dict of tensors by name.
    """
    stored = read_best_or_newest(path, key)
    path, content = stored.path, stored.content
    weights = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), dict)), content)
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ConfigError(f"{key}: {str(path)!r} is not a state dict, it has the key {contents.shown(repr(name))};"
                              " expected names of tensors")  # fmt: skip
        if not isinstance(value, Tensor):
            if name.endswith("_extra_state"):
                continue
            raise ConfigError(f"{key}: {str(path)!r} is not a state dict of tensors, {contents.shown(name)!r} is a"
                              f" {type(value).__name__}")  # fmt: skip
        short = _without_wrapper(name)
        if short in named:
            raise ConfigError(f"{key}: {str(path)!r} has {contents.shown(short)!r} twice, with and without a prefix")
        named[short] = value
    if not named:
        raise ConfigError(f"{key}: {str(path)!r} is not a state dict, it holds no tensor")
    return named


def _without_wrapper(name: str) -> str:
    """Removes the prefixes of DDP and torch.compile from a key; what is named like one itself keeps its name."""
    *modules, own = name.split(".")
    while modules and modules[0] in ("module", "_orig_mod"):
        modules = modules[1:]
    return ".".join([*(part for part in modules if part != "_orig_mod"), own])
