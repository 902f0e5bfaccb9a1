"""Evaluation of a model on a split: every sample counts once, whatever the number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from syncbn.nn.modes import evaluating
from syncbn.report.metric_names import ACCURACY, LOSS
from syncbn.training.data.by_size import each_size
from syncbn.training.data.dataset import Data
from syncbn.training.data.loader import Loader
from syncbn.training.data.native import NativeData
from syncbn.training.distributed.rank_context import RankContext, in_dtype
from syncbn.training.distributed.stopping import StopAgreed, StopRequest
from syncbn.training.evaluation.metrics import flattened, number_of, update_metric
from syncbn.training.evaluation.mistakes import EvaluatedBatch, Mistakes
from syncbn.training.evaluation.tallies import Accuracy, Tally, Total, add_over_ranks
from syncbn.training.losses.losses import Loss, are_classes, ignored_label, metric_targets

if TYPE_CHECKING:
    from torchmetrics import Metric

NATIVE_EVAL_BATCH_SIZE = 16  # of images as large as their files
EVAL_BATCH_SIZE = 512  # samples over all ranks; with running statistics the results do not depend on it


def evaluate(
    model: nn.Module,
    data: Data,
    split: Any,
    loss: Loss,
    context: RankContext,
    stop: StopRequest | None = None,
    metrics: Mapping[str, Metric | Tally] | None = None,
    loader: Loader | None = None,
    mistakes: Mistakes | None = None,
) -> dict[str, float]:
    """Computes the mean loss, the accuracy (if the data has classes) and `metrics` of a model on a split.

    A collective: every rank has to call it, because the metrics are reduced over the default process group. The model
    runs in evaluation mode; its modes are restored.

    Args:
        stop: checked before every batch, on all ranks together.
        loader: prepares the batches; None prepares each one when it is needed, without workers.
        mistakes: is shown every batch of this rank.

    Returns:
        `loss`, `accuracy` and the values of `metrics` by name, the same on every rank. A metric with several values
        has an entry for each: `name/0`, `name/1`, ...

    Raises:
        StopAgreed: `stop` was requested on any rank meanwhile.
    """
    shown: dict[str, Metric | Tally] = {**_accuracy(data, loss), **(metrics or {})}
    mean = Total()
    tallies = [mean, *(metric for metric in shown.values() if isinstance(metric, Tally))]
    for tally in tallies:
        tally.begin(context.device)
    for metric in shown.values():
        if not isinstance(metric, Tally):
            metric.to(context.device).reset()
    with evaluating(model), torch.no_grad():
        size = NATIVE_EVAL_BATCH_SIZE if isinstance(data, NativeData) else EVAL_BATCH_SIZE
        batches = torch.arange(len(split)).split(size)
        indices = [batch.tensor_split(context.world_size)[context.rank] for batch in batches]
        loaded = (loader or Loader(data, context)).eval_batches(split, indices)
        for whole, batch in zip(indices, loaded, strict=True):
            if stop is not None and stop.agreed():
                raise StopAgreed
            for index, images, targets in each_size(whole, *batch):
                if len(images) == 0:
                    continue
                with context.forward_context():
                    outputs = model(images)
                outputs = in_dtype(outputs, context.dtype)
                total, number = loss(outputs, targets)
                labels = metric_targets(loss, targets)
                for name, metric in shown.items():
                    update_metric(name, metric, outputs, labels)
                if mistakes is not None:
                    mistakes.see(EvaluatedBatch(index, images, outputs, targets))
                mean.update(total, number)
    add_over_ranks(tallies)
    with warnings.catch_warnings():
        # torchmetrics warns on a rank that has had no sample; with a small split that is expected.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values: dict[str, float] = {}
        for name, metric in shown.items():
            values |= flattened(name, metric.compute())
        return {**values, LOSS: number_of(mean.compute())}


def _accuracy(data: Data, loss: Loss) -> dict[str, Metric | Tally]:
    """The built-in accuracy over all labels that the loss does not ignore; empty if the targets are no classes."""
    if data.num_classes is None or not are_classes(loss):
        return {}
    return {ACCURACY: Accuracy(ignored_label(loss))}
