"""Evaluation: every sample of a split once, however many ranks share it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from syncbn.training.config.instantiate import build_target
from syncbn.training.config.schema import ConfigError, require
from syncbn.training.data.dataset import Data, Split
from syncbn.training.data.loader import Loader
from syncbn.training.distributed.rank_context import Place, in_dtype
from syncbn.training.distributed.stopping import StopAgreed, StopRequest
from syncbn.training.losses.losses import Loss

_ALWAYS = ("loss", "accuracy")
EVAL_BATCH_SIZE = 512  # samples over all ranks; evaluation normalizes with running statistics, so it changes no result


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
        _update(name, metric, outputs, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two samples
            try:
                names += _flat(name, metric.compute())
            except Exception:  # so few samples may be too few for it
                names += [best] if best.partition("/")[0] == name else [name]
        metric.reset()
    best = names[0] if best == "auto" else best
    require(best in names, "best", f"auto or one of {', '.join(names)}", best)
    chosen = metrics.get(best.partition("/")[0])
    return Best(best, best == "loss" or (chosen is not None and chosen.higher_is_better is False))


def evaluate(
    model: nn.Module,
    data: Data,
    split: Split,
    loss: Loss,
    place: Place,
    stop: StopRequest | None = None,
    metrics: Mapping[str, Metric] | None = None,
    loader: Loader | None = None,
) -> dict[str, float]:
    """`loss`, for labels `accuracy`, and `metrics` over a split, the same on every rank; modes are restored.

    Every rank has to call it: the metrics are reduced over the default process group. A metric of several numbers has a
    name for each, `name/0`, `name/1`, ... Without a `loader` batches are prepared where they are needed.

    Raises:
        StopAgreed: `stop` was requested on any rank meanwhile.
    """
    shown: dict[str, Metric] = {**_accuracy(data, loss), **(metrics or {})}
    for metric in shown.values():
        metric.to(place.device).reset()
    # Two plain sums: the loss of a split is a mean over everything that it counts, not over batches or ranks.
    loss_sum, count = (SumMetric(nan_strategy="disable").to(place.device).set_dtype(torch.float64) for _ in range(2))
    with _evaluating(model):
        batches = torch.arange(len(split)).split(EVAL_BATCH_SIZE)
        indices = [batch.tensor_split(place.world_size)[place.rank] for batch in batches]
        for images, targets in (loader or Loader(data, place)).eval_batches(split, indices):
            if stop is not None and stop.agreed():
                raise StopAgreed
            if len(images) == 0:
                continue
            with place.forward_context():
                outputs = model(images)
            outputs = in_dtype(outputs, place.dtype)
            total, number = loss(outputs, targets)
            for name, metric in shown.items():
                _update(name, metric, outputs, targets)
            loss_sum.update(total)
            count.update(number)
    with warnings.catch_warnings():
        # A rank without a sample of a small split has nothing to add, and that is fine.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values: dict[str, float] = {}
        for name, metric in shown.items():
            values |= _flat(name, metric.compute())
        return {**values, "loss": _value(loss_sum.compute() / count.compute())}


def _accuracy(data: Data, loss: Loss) -> dict[str, Metric]:
    """Of labels; there is none where the data has no classes."""
    if data.num_classes is None:
        return {}
    ignore = getattr(loss, "ignore_index", None)
    micro = MulticlassAccuracy(data.num_classes, average="micro", ignore_index=ignore, validate_args=False)
    return {"accuracy": micro}


def _update(name: str, metric: Metric, outputs: Any, targets: Tensor) -> None:
    try:
        metric.update(outputs, targets)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"metrics.{name}: cannot take the model's outputs: {' '.join(str(error).split())}") from None


def _flat(name: str, value: Any) -> dict[str, float]:
    """Numbers by name, of a metric that may have several."""
    if isinstance(value, Mapping):
        return {key: number for part, item in value.items() for key, number in _flat(f"{name}/{part}", item).items()}
    if isinstance(value, tuple | list):
        return _flat(name, dict(enumerate(value)))
    if isinstance(value, Tensor) and value.numel() != 1:
        return {f"{name}/{place}": _value(item) for place, item in enumerate(value.flatten())}
    return {name: _value(value)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored, on every path."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _value(metric: Tensor) -> float:
    return float(metric.item())  # waits for the device; evaluation only
