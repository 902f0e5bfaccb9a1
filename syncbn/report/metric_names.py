"""Names of the metrics that a run records: flat keys with `/`, which are part of the format of metrics.jsonl.

The code that writes them (the trainer, its tasks) and the code that reads them (the report, the table of a sweep) both
import them from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

STEP = "step"  # every record has it
EPOCH = "epoch"
LOSS, ACCURACY = "loss", "accuracy"  # of one split, without its prefix
TRAIN_LOSS = f"train/{LOSS}"
LEARNING_RATE = "train/lr"
THROUGHPUT = "train/samples_per_second"
WAITED = "train/waited_for_data"
GRADIENT_NORM = "train/grad_norm"
STEPS_LEFT_OUT = "train/steps_left_out"
VAL_LOSS = f"val/{LOSS}"
VAL_ACCURACY = f"val/{ACCURACY}"
LOADER_THROUGHPUT = "data/samples_per_second"  # without training, task=data
LAYER_TABLE = "bn/layers"

# Prefixes of groups of names, without the `/`.
TRAIN, VAL, TEST, EVAL, PRECISE = "train", "val", "test", "eval", "precise"
DRIFT, BN, FREEZE, EXPORT = "drift", "bn", "freeze", "export"

# Kinds of metrics of a layer that code chooses by name; `LayerSnapshot.scalars` has all of them.
LAYER_DRIFT = "drift"
BETWEEN_RANK_SHARE = "between_rank_share"
WEIGHT_ABS = "weight_abs"
DEAD_CHANNELS = "dead_channels"
VALUES_PER_CHANNEL = "values_per_channel"


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values under prefixed names: `accuracy` becomes `val/accuracy`."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def below(prefix: str, names: Iterable[str]) -> list[str]:
    """Those of the names that have this prefix."""
    return [name for name in names if name.startswith(f"{prefix}/")]


def of_layer(layer: str, kind: str) -> str:
    """The name of a metric of one batch normalization layer, such as `bn/backbone.stem.bn/drift`."""
    return f"{BN}/{layer}/{kind}"


def layer_and_kind(name: str) -> tuple[str, str] | None:
    """Splits a name made by `of_layer` into its parts; None for any other name (`bn/max_drift` is of the model)."""
    if not name.startswith(f"{BN}/") or name.count("/") < 2:
        return None
    layer, _, kind = name.removeprefix(f"{BN}/").rpartition("/")
    return layer, kind


def of_switch(module: str, switch: str) -> str:
    """The name of the metric that records freezing (1) and unfreezing (0) of "stats", "affine" or "weights"."""
    return f"{FREEZE}/{module}/{switch}"


def module_and_switch(name: str) -> tuple[str, str] | None:
    """Splits a name made by `of_switch` into its parts; None for any other name."""
    if not name.startswith(f"{FREEZE}/"):
        return None
    module, _, switch = name.removeprefix(f"{FREEZE}/").rpartition("/")
    return module, switch
