"""`debug=overfit`: trains on a few samples, the same at every step, until the model fits them.

A model that cannot fit them points to a mistake somewhere between the images and the optimizer.
"""

from __future__ import annotations

import logging

from torch import nn

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data.dataset import Data

log = logging.getLogger(__name__)

FITTED = 0.99  # required accuracy on the samples, in evaluation mode


def only_a_few(data: Data, num_samples: int) -> Data:
    """The first training samples, without augmentation, as training, validation and test set.

    Raises:
        ConfigError: there are fewer training samples, or the data has no classes.
    """
    if num_samples > len(data.train):
        raise ConfigError(f"overfit: expected at most the {len(data.train)} training samples, got {num_samples}")
    if data.num_classes is None:
        raise ConfigError("overfit: goes by accuracy, and this data has no classes; give it num_classes")
    if data.targets in ("labels", "numbers"):
        raise ConfigError(f"overfit: goes by accuracy, and this data has {data.targets}; use a small table")
    return data.first(num_samples)


def judge(num_samples: int, accuracy: float, loss: float, step: int, model: nn.Module) -> None:
    """Logs that the model fits the samples.

    Args:
        accuracy: of the best validation, as is `loss`.
        step: the number of steps done.

    Raises:
        TrainingError: the accuracy is below FITTED.
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
