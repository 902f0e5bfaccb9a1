"""Interfaces of data sets and their splits, and the description of the data in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError
from syncbn.training.data.by_size import Pixels

log = logging.getLogger(__name__)

IGNORE = 255  # mask value of pixels that loss and metrics exclude


class Rows(Protocol):
    """Images or labels of a split, by index: a tensor, or an object that decodes rows when they are indexed."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, ...), the shape of a tensor of all rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """The rows at the positions `index`, (B,) int64, as a tensor (B, ...)."""


@dataclass(frozen=True)
class Split:
    """Images of a split and their labels or masks.

    Images are (N, C, H, W): float32 between 0 and 1 (synthetic ones: any range), or uint8 between 0 and 255. Labels are
    (N,) int64, or masks (N, H, W) uint8 in which IGNORE (255) marks pixels that do not count, or several labels or
    numbers of each image, (N, K) float32.
    """

    images: Rows
    labels: Rows

    def __len__(self) -> int:
        return len(self.labels)


class ModelShape(Protocol):
    """Protocol of what a model is built for."""

    @property
    def num_channels(self) -> int:
        """Channels of an image."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if the targets are not classes."""


class Data(Protocol):
    """Protocol of a data set for a run: its splits, and batches of them.

    `ImageData` implements it for images, decoded or encoded; `CustomData` for a user's map-style datasets.
    """

    @property
    def train(self) -> Any:
        """Training split. It has a length; otherwise its type is private to the data set."""

    @property
    def val(self) -> Any:
        """Validation split, of the same type as `train`."""

    @property
    def test(self) -> Any:
        """Test split, of the same type as `train`; None if the data set has none."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or of the labels or numbers of an image; None if the targets are none of these."""

    @property
    def targets(self) -> str:
        """What the targets are: "classes", "labels" (a 0 or 1 each), "numbers"; "any" if only the loss knows."""

    @property
    def division(self) -> str | None:
        """Digest of which sample is in which split, where it is not the files that say so; None otherwise."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ..., or of what each label or number is; empty if the data set has none."""

    @property
    def num_channels(self) -> int:
        """Channels of an image."""

    @property
    def has_masks(self) -> bool:
        """Whether labels are per pixel (masks) instead of per image."""

    @property
    def train_labels(self) -> Tensor | None:
        """Classes of the training samples, (N,) int64; None for masks, for other targets, and if only items tell."""

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which pixels are normalized, (1, C, 1, 1) float64; the same on every rank."""

    @property
    def image_settings(self) -> dict[str, Any] | None:
        """How an image file becomes an image of the splits (see `Preparation`); None if only the data set knows."""

    def train_batch(
        self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype, repeats: Tensor | None = None
    ) -> tuple[Pixels, Pixels]:
        """Images and targets of these training samples; `BySize` where images have different sizes.

        Random augmentation depends only on (seed, epoch, sample, how often the sample was drawn in this epoch before).

        Args:
            index: (N,) int64, positions in the split; N may be 0.
            dtype: of the images.
            repeats: (N,) int64, how often each sample was drawn in this epoch before; None for never.
        """

    def eval_batch(self, split: Any, index: Tensor, dtype: torch.dtype) -> tuple[Pixels, Pixels]:
        """Images and targets of these samples of a split, without augmentation."""

    def normalized_by(self, mean: Tensor, std: Tensor) -> Data:
        """The same data, its pixels normalized by this mean and standard deviation instead of its own."""

    def first(self, num_samples: int) -> Data:
        """The first training samples as training, validation and test set, without random shifts and mirroring."""


def describe_data(data: Data) -> dict[str, Any]:
    """What a checkpoint says of its data, which `as_trained` and `TrainedInput` read: classes, pixels, preparation."""
    mean, std = data.pixel_stats
    names, image = list(data.class_names), data.image_settings
    division = {} if data.division is None else {"division": data.division}
    return {"data": {"classes": names, "mean": mean, "std": std, "image": image, **division}}


def as_trained(data: Data, checkpoint: Mapping[str, Any]) -> Data:
    """The data, normalized by the pixel statistics that the checkpoint stores, for use with its trained model.

    Raises:
        ConfigError: the class names differ from those in the checkpoint, or its statistics are none of such images.
    """
    stored = checkpoint.get("data")
    if stored is None:  # a checkpoint without a description of its data
        return data
    if stored["classes"] != list(data.class_names):
        raise ConfigError(
            f"data.path: the model was trained on the classes {', '.join(stored['classes']) or 'without names'}, the"
            f" data has {', '.join(data.class_names) or 'none with names'}"
        )
    if _is_divided_otherwise(data, stored):
        log.warning("data.path: the table is divided otherwise than it was in training (it has other rows, or data.fold"
                    " or another key has changed); val and test may hold images that were trained on")  # fmt: skip
    return _normalized_as_trained(data, stored)


def normalized_as_trained(data: Data, checkpoint: Mapping[str, Any]) -> Data:
    """The data, normalized by the pixel statistics that the checkpoint stores, for a run that goes on.

    Raises:
        ConfigError: its statistics are none of such images; a table is divided otherwise than when the run began.
    """
    stored = checkpoint.get("data")
    if stored is None:
        return data
    if _is_divided_otherwise(data, stored):
        raise ConfigError("data.path: the table has other rows than when this run began, which divides it otherwise:"
                          " what was trained on could be tested on; go on with the table as it was, or begin another"
                          " run with run=...")  # fmt: skip
    return _normalized_as_trained(data, stored)


def _is_divided_otherwise(data: Data, stored: Mapping[str, Any]) -> bool:
    return None not in (data.division, stored.get("division")) and data.division != stored["division"]


def _normalized_as_trained(data: Data, stored: Mapping[str, Any]) -> Data:
    shape = (1, data.num_channels, 1, 1)
    if not all(stored[name].shape == shape and stored[name].is_floating_point() for name in ("mean", "std")):
        raise ConfigError(f"data: the model was trained on images of other channels, the data has {data.num_channels}")
    return data.normalized_by(stored["mean"], stored["std"])
