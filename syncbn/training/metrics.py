"""Evaluation: every sample of a split once, however many ranks share it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from syncbn.training.data import Data, Split
from syncbn.training.loading import Loader
from syncbn.training.losses import Loss
from syncbn.training.place import Place
from syncbn.training.stopping import StopAgreed, StopRequest

EVAL_BATCH_SIZE = 512  # samples over all ranks; evaluation normalizes with running statistics, so it changes no result


def evaluate(
    model: nn.Module,
    data: Data,
    split: Split,
    loss: Loss,
    place: Place,
    stop: StopRequest | None = None,
    loader: Loader | None = None,
) -> dict[str, float]:
    """`accuracy` and `loss` over a split, the same on every rank; the model's modes are restored.

    Every rank has to call it: the metrics are reduced over the default process group. Without a `loader` batches are
    prepared where they are needed.

    Raises:
        StopAgreed: `stop` was requested on any rank meanwhile.
    """
    accuracy = MulticlassAccuracy(data.num_classes, average="micro", validate_args=False).to(place.device)
    # Two plain sums: the loss of a split is a mean over everything that it counts, not over batches or ranks.
    loss_sum, count = (SumMetric(nan_strategy="disable").to(place.device).set_dtype(torch.float64) for _ in range(2))
    with _evaluating(model):
        batches = torch.arange(len(split)).split(EVAL_BATCH_SIZE)
        indices = [batch.tensor_split(place.world_size)[place.rank] for batch in batches]
        for images, labels in (loader or Loader(data, place)).eval_batches(split, indices):
            if stop is not None and stop.agreed():
                raise StopAgreed
            if len(images) == 0:
                continue
            with place.forward_context():
                outputs = model(images)
            outputs = outputs.to(place.dtype)
            total, number = loss(outputs, labels)
            accuracy.update(outputs, labels)
            loss_sum.update(total)
            count.update(number)
    with warnings.catch_warnings():
        # A rank without a sample of a small split has nothing to add, and that is fine.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        return {"accuracy": _value(accuracy.compute()), "loss": _value(loss_sum.compute() / count.compute())}


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
