"""`debug=overfit`: a few training samples, the same at every step, until the model knows them by heart.

What cannot do that has a mistake somewhere between the images and the optimizer.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data.custom import OwnData
from syncbn.training.data.dataset import Data, Split

log = logging.getLogger(__name__)

FITTED = 0.99  # share of the samples that has to be right, in evaluation


def only_a_few(data: Data, num_samples: int) -> Data:
    """The first training samples, not augmented, as training, validation and test set."""
    if num_samples > len(data.train):
        raise ConfigError(f"overfit: expected at most the {len(data.train)} training samples, got {num_samples}")
    if data.num_classes is None:
        raise ConfigError("overfit: goes by accuracy, and this data has no classes; give it num_classes")
    if isinstance(data, OwnData):
        train: Any = data.train  # a data set of the user's
        own: Any = Subset(train, range(num_samples))
        return replace(data, train=own, val=own, test=own)
    index = torch.arange(num_samples)
    few = Split(data.train.images[index], data.train.labels[index])
    return replace(data, train=few, val=few, test=few, shift=0, flip=False)


def judge(num_samples: int, accuracy: float, loss: float, step: int, model: nn.Module) -> None:
    """Says that the samples are fitted.

    Args:
        accuracy: the best so far, in evaluation, as is `loss`.
        step: the number of steps done.

    Raises:
        TrainingError: they are not.
    """
    if accuracy >= FITTED:
        log.info(
            "overfit: accuracy %.4f on the %d samples after %d steps, as it should be", accuracy, num_samples, step
        )
        return
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    raise TrainingError(
        f"overfit: after {step} steps the accuracy on {num_samples} samples is {accuracy:.4f} and the loss {loss:.4f},"
        f" expected an accuracy of {FITTED} or more; frozen are {frozen} of {total} parameters. If train/loss in"
        " metrics.jsonl has fallen, evaluation differs from training: look at bn.momentum, frozen statistics and"
        " dropout; if not, look at optimizer.lr, freeze, the model and the loss"
    )
