"""Weights of classes: given, or balanced by how often each class occurs in the training data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.losses import BALANCED
from syncbn.training.data.by_size import parts_of
from syncbn.training.data.dataset import Data
from syncbn.training.data.decoding import values_of
from syncbn.training.data.images import ImageData
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together

log = logging.getLogger(__name__)

_CHUNK = 64  # samples that are counted at a time


def class_weights(
    config: str | list[float] | None, data: Data, ignore_index: int | None, stored: Tensor | None = None
) -> Tensor | None:
    """The weight of each class, (num_classes,) float64; None without weights.

    "balanced" is n / (num_classes * n_c), with n_c of the n training labels (or pixels of training masks) of class c
    that are not `ignore_index`; then it is a collective: every rank counts its part.

    Args:
        stored: the numbers that "balanced" has meant since the run began; nothing is counted then.

    Raises:
        ConfigError: on every rank: another number of weights than classes; balanced, and a class does not occur.
    """
    if config is None:
        return None
    num_classes = data.num_classes
    assert num_classes is not None
    if config != BALANCED:
        if len(config) != num_classes:
            raise ConfigError(f"loss.class_weights: expected a number for each of {num_classes} classes, got {config}")
        return torch.tensor(config, dtype=torch.float64)
    if stored is not None:
        if stored.shape != (num_classes,):
            raise ConfigError(f"loss.class_weights: the checkpoint has {stored.numel()}, expected {num_classes}")
        return stored
    with failing_together():
        counts = _count(data, num_classes, ignore_index)
    counts = torch.stack([torch.tensor(part) for part in world.on_all_ranks(counts.tolist())]).sum(0)
    absent = [_name(data, label) for label in range(num_classes) if counts[label] == 0]
    if absent:
        raise ConfigError(
            f"loss.class_weights=balanced: the training data has nothing of class {listed(absent)}; give numbers"
            f" instead, [{','.join('1' for _ in range(min(num_classes, 3)))},...], or leave the class out of the data"
        )
    weights = counts.sum() / (num_classes * counts.to(torch.float64))
    named = [f"{_name(data, label)} {weight:.3g}" for label, weight in enumerate(weights.tolist())]
    log.info("loss.class_weights=balanced: %s", listed(named, 20))
    return weights


def _count(data: Data, num_classes: int, ignore_index: int | None) -> Tensor:
    """How often each class occurs in this rank's part of the training split, (num_classes,) int64."""
    counts = torch.zeros(num_classes, dtype=torch.int64)
    mine = torch.arange(len(data.train)).tensor_split(world.world_size())[world.rank()]
    for index in mine.split(_CHUNK):
        labels = _targets(data, index)
        labels = labels if ignore_index is None else labels[labels != ignore_index]
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ConfigError(
                f"loss.class_weights=balanced: expected labels between 0 and {num_classes - 1}, got {int(wrong[0])}"
            )
        counts += torch.bincount(labels, minlength=num_classes)
    return counts


def _targets(data: Data, index: Tensor) -> Tensor:
    if isinstance(data, ImageData):  # without decoding the images
        return values_of(data.train.labels, index).to(torch.int64)
    targets = data.eval_batch(data.train, index, torch.float32)[1]
    return torch.cat([part.flatten() for part in parts_of(targets)]).to(torch.int64)


def _name(data: Data, label: int) -> str:
    return data.class_names[label] if label < len(data.class_names) else str(label)


class Weights:
    """Weights of classes where the loss needs them: in its type, on its device, moved there once.

    Args:
        values: (num_classes,) float64; None for no weights.
    """

    def __init__(self, values: Tensor | None) -> None:
        self.values = values
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, outputs: Tensor) -> Tensor | None:
        """The weights in type and on the device of the outputs; None without weights."""
        if self.values is None:
            return None
        place = outputs.device, outputs.dtype
        if place not in self._moved:  # the copy waits for the device, which only the first step does
            self._moved[place] = self.values.to(*place)
        return self._moved[place]


def describe(loss: Any) -> dict[str, Any]:
    """The numbers of the loss as an entry of a checkpoint, which `stored` reads; empty without class weights."""
    weights = getattr(loss, "weights", None)
    if not isinstance(weights, Weights) or weights.values is None:
        return {}
    return {"loss": {"class_weights": weights.values}}


def stored(checkpoint: Mapping[str, Any]) -> Tensor | None:
    """The class weights that a checkpoint of a run has; None if it has none."""
    weights = checkpoint.get("loss", {}).get("class_weights")
    return None if weights is None else weights.to(torch.float64)
