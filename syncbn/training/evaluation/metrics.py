"""The metrics of the configuration: how they are built and updated, and which one selects the best weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from syncbn.report.metric_names import ACCURACY, LOSS
from syncbn.training.config.errors import ConfigError, one_line, require
from syncbn.training.config.instantiate import build_target
from syncbn.training.evaluation.tallies import Tally

if TYPE_CHECKING:
    from torchmetrics import Metric

_ALWAYS = (LOSS, ACCURACY)  # reserved: the names that evaluation itself reports


def build_metrics(config: Mapping[str, Mapping[str, Any]], num_classes: int | None) -> dict[str, Metric]:
    """Builds the torchmetrics metrics of the configuration, by name.

    Args:
        num_classes: passed, as `num_classes` or `num_labels`, to the metrics that accept it and whose configuration
            does not set it.

    Raises:
        ConfigError: a metric cannot be built or is no torchmetrics metric; a name is reserved or contains a slash.
    """
    if not config:
        return {}
    from torchmetrics import Metric  # here, because its import takes as long as torch's

    for name in config:
        require(name not in _ALWAYS and "/" not in name, f"metrics.{name}", "a name that is not taken", name)
    return {
        name: build_target(f"metrics.{name}", node, Metric, num_classes=num_classes, num_labels=num_classes)
        for name, node in config.items()
    }


class Best(NamedTuple):
    """The validation metric that chooses the best weights."""

    by: str
    """Name of the metric, without the prefix of the split."""
    lowest: bool
    """Whether lower is better: always for the loss, else as the metric's `higher_is_better` says."""


def choose_best(best: str, metrics: Mapping[str, Metric], outputs: Any, targets: Tensor, *, has_accuracy: bool) -> Best:
    """Finds the metric that `best` of the configuration names, and tries all metrics on some outputs of the model.

    A collective: every rank has to call it, because the values of the metrics are reduced over all ranks.

    Args:
        best: a metric's name, `name/0` for one of several values, or "auto": the accuracy, or the loss without it.
        has_accuracy: the targets are classes.

    Raises:
        ConfigError: a metric cannot take the outputs; no metric has this name.
    """
    names = [*([ACCURACY] if has_accuracy else []), LOSS]
    for name, metric in metrics.items():
        metric.to(targets.device).reset()
        update_metric(name, metric, outputs, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # metrics may warn of so few samples
            try:
                names += flattened(name, metric.compute())
            except Exception:  # some metrics need more samples: the name is taken on trust
                names += [best] if best.partition("/")[0] == name else [name]
        metric.reset()
    best = names[0] if best == "auto" else best
    require(best in names, "best", f"auto or one of {', '.join(names)}", best)
    chosen = metrics.get(best.partition("/")[0])
    return Best(best, best == LOSS or (chosen is not None and chosen.higher_is_better is False))


def update_metric(name: str, metric: Metric | Tally, outputs: Any, targets: Tensor) -> None:
    """Updates a metric with a batch; an error of the metric becomes a ConfigError that names it."""
    try:
        metric.update(outputs, targets)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"metrics.{name}: cannot take the model's outputs: {one_line(error)}") from None


def flattened(name: str, value: Any) -> dict[str, float]:
    """The value of a metric as numbers by name: `name`, or `name/<key>` for each of several values."""
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
    return float(metric.item())  # synchronizes with the device; called in evaluation only
