"""Evaluation: every sample of a split once, however many ranks share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from syncbn.training.data import Data, Split
from syncbn.training.losses import Loss
from syncbn.training.place import Place

EVAL_BATCH_SIZE = 512  # samples over all ranks; evaluation normalizes with running statistics, so it changes no result


def evaluate(model: nn.Module, data: Data, split: Split, loss: Loss, place: Place) -> dict[str, float]:
    """`accuracy` and `loss` over a split, the same on every rank; the model's modes are restored.

    Every rank has to call it: the metrics are reduced over the default process group.
    """
    accuracy = MulticlassAccuracy(data.num_classes, average="micro", validate_args=False).to(place.device)
    mean_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(place.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        for batch in torch.arange(len(split)).split(EVAL_BATCH_SIZE):
            index = batch.tensor_split(place.world_size)[place.rank]
            if len(index) == 0:
                continue
            images, labels = (tensor.to(place.device) for tensor in data.eval_batch(split, index, place.dtype))
            outputs = model(images)
            total, count = loss(outputs, labels)
            accuracy.update(outputs, labels)
            mean_loss.update(total.to(torch.float64) / count, weight=count)
    for module, mode in modes.items():
        module.training = mode
    return {"accuracy": _value(accuracy.compute()), "loss": _value(mean_loss.compute())}


def _value(metric: Tensor) -> float:
    return float(metric.item())  # waits for the device; evaluation only
