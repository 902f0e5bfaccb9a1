"""Which task reads which key. A key on the command line that the chosen task does not read is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from syncbn.training.config.errors import ConfigError

TASKS = ("train", "eval", "audit", "recalibrate", "export", "predict", "check", "data", "parity")

# What other trainers call them.
OTHER_TASKS = {**dict.fromkeys(("test", "evaluate", "validate", "val"), "eval"), "inference": "predict",
               "infer": "predict", "fit": "train", "resume": "train"}  # fmt: skip

_EVERY = TASKS
_WITH_LOAD = ("eval", "audit", "recalibrate", "export", "predict")
_WITH_DATA = tuple(task for task in TASKS if task != "predict")  # predict prepares images as the checkpoint says
_WITH_MODEL = ("train", *_WITH_LOAD)
_TRAIN = ("train",)
_WITH_COMPUTATION = ("train", *_WITH_LOAD, "data")  # parity has its own ranks and types

# The tasks that read a key, for every root key. A key below it has an entry where fewer tasks read it.
READERS: dict[str, tuple[str, ...]] = {
    "task": _EVERY,
    "run": _EVERY,
    "output_dir": _EVERY,
    "share": _EVERY,
    "resume": _TRAIN,
    "load": _WITH_LOAD,
    "trust": _WITH_MODEL,
    "seed": _EVERY,
    "device": ("train", "eval", "audit", "recalibrate", "predict", "data"),  # an export is made on the CPU
    "precision": _WITH_COMPUTATION,
    "compile": _TRAIN,
    "graph": _TRAIN,
    "channels_last": _WITH_COMPUTATION,
    "tf32": _TRAIN,
    "deterministic": _TRAIN,
    "batch_size": ("train", "eval", "audit", "recalibrate", "data", "parity"),  # eval: of eval.precise_bn
    "accumulate": ("train", "eval", "audit", "recalibrate", "data"),
    "clip_norm": _TRAIN,
    "ema": _TRAIN,
    "swa": _TRAIN,
    "on_nonfinite": _TRAIN,
    "collective_timeout": (*_WITH_COMPUTATION, "check"),
    "best": _TRAIN,
    "duration": ("train", "data"),
    "eval_every": _TRAIN,
    "early_stop": _TRAIN,
    "log_every": _TRAIN,
    "overfit": _TRAIN,
    "profile": _TRAIN,
    "save": _TRAIN,
    "bn": (*_WITH_MODEL, "parity"),
    "bn.group": ("train", "audit", "parity"),
    "bn.own_group": _TRAIN,
    "bn.averaged": _TRAIN,
    "bn.buffers": _TRAIN,
    "bn.virtual_ranks": _TRAIN,
    "bn.momentum": ("train", "audit", "parity"),
    "bn.debug": _TRAIN,
    "bn.skip_nonfinite": _TRAIN,
    "audit": ("train", "audit"),
    "eval": _WITH_LOAD,
    "eval.precise_bn": ("eval",),
    "eval.path": ("eval",),
    "recalibrate": ("recalibrate",),
    "export": ("export",),
    "parity": ("parity",),
    "predict": ("predict",),
    "tracker": _TRAIN,
    "data": _EVERY,
    **dict.fromkeys(
        ("data.path", "data.size", "data.channels", "data.fit", "data.decode", "data.range", "data.cache"), _WITH_DATA
    ),
    **dict.fromkeys(("data.split", "data.group", "data.fold", "data.folds", "data.split_seed"), _WITH_DATA),
    "data.mean": ("train", "data", "parity"),  # tasks with load take the numbers of the checkpoint
    "data.std": ("train", "data", "parity"),
    "data.sampler": ("train", "eval", "audit", "recalibrate", "parity"),  # eval: of eval.precise_bn
    "data.augment": ("train", "audit", "data", "parity"),
    "data.shift": ("train", "audit", "data", "parity"),
    "data.flip": ("train", "audit", "data", "parity"),
    "data.workers": ("train", "eval", "recalibrate", "predict", "check", "data"),
    "data.prefetch": ("train", "eval", "recalibrate", "data"),
    "model": (*_WITH_MODEL, "parity"),
    "loss": ("train", "eval", "recalibrate", "parity"),
    "metrics": ("train", "eval", "recalibrate"),
    "optimizer": _TRAIN,
    "schedule": _TRAIN,
    "freeze": ("train", "audit", "recalibrate", "parity"),
    "init": (*_WITH_MODEL, "parity"),
}

# What a task without a tracker does anyway may stand on every command line.
_HARMLESS = ("tracker=none", "tracker.mode=disabled")
_REMEDIES = {"load": "to go on with a run use resume=..., to begin with its weights init.<subnet>.path=..."}


def readers(key: str) -> tuple[str, ...] | None:
    """The tasks that read a dotted key; None for a key that no root key of the configuration begins."""
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((READERS[prefix] for prefix in prefixes if prefix in READERS), None)


def require_readers(task: str, overrides: Sequence[str]) -> None:
    """Checks that the task reads every key that the command line gives.

    Keys that a choice of `experiment` or `debug` sets are not given, and Hydra's own keys are not looked at.

    Args:
        task: the chosen task; of an unknown one nothing is checked.
        overrides: those of the command line, also those for a stored configuration.

    Raises:
        ConfigError: a key that the task does not read; the message names the tasks that do.
    """
    for key in _given(overrides) if task in TASKS else ():
        tasks = readers(key)
        if tasks is not None and task not in tasks:
            remedy = _REMEDIES.get(key, "leave it out")
            raise ConfigError(f"{key}: task={task} does not read it, only task={', '.join(tasks)}; {remedy}")


def require_no_sweep(overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Raises a ConfigError if an override of one of these keys has several values, one for each job of a multirun."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group in keys and override.is_sweep_override():
            raise ConfigError(
                f"{override.key_or_group}: is the same for all jobs of a multirun, got several values; start a multirun"
                " for each"
            )


def _given(overrides: Sequence[str]) -> Iterator[str]:
    """The dotted keys that overrides give; those of a dictionary one by one, without those that ask for nothing."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    asking = [override for override in overrides if override.lstrip("+") not in _HARMLESS]
    for override in OverridesParser.create().parse_overrides(asking):
        yield override.key_or_group
        value = None if override.is_delete() or override.is_sweep_override() else override.value()
        if isinstance(value, Mapping):
            yield from _below(override.key_or_group, value)


def _below(prefix: str, node: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _below(f"{prefix}.{key}", value)
