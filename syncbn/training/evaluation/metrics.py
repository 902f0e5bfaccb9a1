"""Evaluation: every sample of a split once, however many ranks share it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torchmetrics import Metric

from syncbn.training.config.errors import ConfigError, require
from syncbn.training.config.instantiate import build_target

_ALWAYS = ("loss", "accuracy")


def build_metrics(config: Mapping[str, Mapping[str, Any]], num_classes: int | None) -> dict[str, Metric]:
    """The metrics of the configuration, by name; `num_classes` is handed to those that take it and have not got it.

    Raises:
        ConfigError: one cannot be built, or is no torchmetrics metric, or takes the name of one that is always there.
    """
    for name in config:
        require(name not in _ALWAYS and "/" not in name, f"metrics.{name}", "a name that is not taken", name)
    return {
        name: build_target(f"metrics.{name}", node, Metric, num_classes=num_classes) for name, node in config.items()
    }


class Best(NamedTuple):
    """The validation metric that chooses the best weights."""

    by: str
    lowest: bool
    """The lower the better, as of an error; the loss always."""


def choose_best(
    best: str, metrics: Mapping[str, Metric], num_classes: int | None, outputs: Any, targets: Tensor
) -> Best:
    """What `best` of the configuration names; tries the metrics on a model's outputs. Every rank calls it.

    Raises:
        ConfigError: a metric cannot take the outputs; there is none of that name.
    """
    names = [*(["accuracy"] if num_classes is not None else []), "loss"]
    for name, metric in metrics.items():
        metric.to(targets.device).reset()
        update_metric(name, metric, outputs, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two samples
            try:
                names += flattened(name, metric.compute())
            except Exception:  # so few samples may be too few for it
                names += [best] if best.partition("/")[0] == name else [name]
        metric.reset()
    best = names[0] if best == "auto" else best
    require(best in names, "best", f"auto or one of {', '.join(names)}", best)
    chosen = metrics.get(best.partition("/")[0])
    return Best(best, best == "loss" or (chosen is not None and chosen.higher_is_better is False))


def update_metric(name: str, metric: Metric, outputs: Any, targets: Tensor) -> None:
    try:
        metric.update(outputs, targets)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"metrics.{name}: cannot take the model's outputs: {' '.join(str(error).split())}") from None


def flattened(name: str, value: Any) -> dict[str, float]:
    """Numbers by name, of a metric that may have several."""
    if isinstance(value, Mapping):
        return {
            key: number for part, item in value.items() for key, number in flattened(f"{name}/{part}", item).items()
        }
    if isinstance(value, tuple | list):
        return flattened(name, dict(enumerate(value)))
    if isinstance(value, Tensor) and value.numel() != 1:
        return {f"{name}/{position}": number_of(item) for position, item in enumerate(value.flatten())}
    return {name: number_of(value)}


def number_of(metric: Tensor) -> float:
    return float(metric.item())  # waits for the device; evaluation only
