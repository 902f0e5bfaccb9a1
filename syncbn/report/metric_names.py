"""The names under which a run records its numbers: flat keys with `/`, a contract with whoever reads metrics.jsonl.

What writes them (the trainer, its tasks) and what reads them (the report, the table of a sweep) have them from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

EPOCH = "epoch"
TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/lr"
THROUGHPUT = "train/samples_per_second"
GRADIENT_NORM = "train/grad_norm"
STEPS_LEFT_OUT = "train/steps_left_out"
VAL_LOSS = "val/loss"
VAL_ACCURACY = "val/accuracy"
LAYER_TABLE = "bn/layers"

# What stands in front of the names of a group.
TRAIN, VAL, TEST, PRECISE, DRIFT, BN, FREEZE = "train", "val", "test", "precise", "drift", "bn", "freeze"


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """`accuracy` as `val/accuracy`, and so on."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def below(prefix: str, names: Iterable[str]) -> list[str]:
    """The names of one group."""
    return [name for name in names if name.startswith(f"{prefix}/")]


def of_layer(layer: str, kind: str) -> str:
    """The name of a number of a batch normalization layer, such as `bn/backbone.stem.bn/drift`."""
    return f"{BN}/{layer}/{kind}"


def layer_and_kind(name: str) -> tuple[str, str] | None:
    """The two parts of `of_layer`; None for another name (`bn/max_drift` is of the whole model)."""
    if not name.startswith(f"{BN}/") or name.count("/") < 2:
        return None
    layer, _, kind = name.removeprefix(f"{BN}/").rpartition("/")
    return layer, kind


def of_switch(module: str, switch: str) -> str:
    """The name under which freezing (1) and unfreezing (0) of a module's "stats", "affine" or "weights" is recorded."""
    return f"{FREEZE}/{module}/{switch}"


def module_and_switch(name: str) -> tuple[str, str] | None:
    """The two parts of `of_switch`; None for another name."""
    if not name.startswith(f"{FREEZE}/"):
        return None
    module, _, switch = name.removeprefix(f"{FREEZE}/").rpartition("/")
    return module, switch
