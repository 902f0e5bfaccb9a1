"""Interfaces of data sets and their splits, and the description of the data in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError

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
    (N,) int64, or masks (N, H, W) uint8 in which IGNORE (255) marks pixels that do not count.
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
        """Number of classes; None if the targets are not classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty if the data set has none."""

    @property
    def num_channels(self) -> int:
        """Channels of an image."""

    @property
    def has_masks(self) -> bool:
        """Whether labels are per pixel (masks) instead of per image."""

    @property
    def train_labels(self) -> Tensor | None:
        """Labels of the training samples, (N,) int64; None for masks, and where only an item tells its target."""

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which pixels are normalized, (1, C, 1, 1) float64; the same on every rank."""

    @property
    def image_settings(self) -> dict[str, Any] | None:
        """How an image file becomes an image of the splits (see `Preparation`); None if only the data set knows."""

    def train_batch(
        self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype, repeats: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images and targets of these training samples.

        Random augmentation depends only on (seed, epoch, sample, how often the sample was drawn in this epoch before).

        Args:
            index: (N,) int64, positions in the split; N may be 0.
            dtype: of the images.
            repeats: (N,) int64, how often each sample was drawn in this epoch before; None for never.
        """

    def eval_batch(self, split: Any, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these samples of a split, without augmentation."""

    def normalized_by(self, mean: Tensor, std: Tensor) -> Data:
        """The same data, its pixels normalized by this mean and standard deviation instead of its own."""

    def first(self, num_samples: int) -> Data:
        """The first training samples as training, validation and test set, without random shifts and mirroring."""


def describe_data(data: Data) -> dict[str, Any]:
    """What a checkpoint says of its data, which `as_trained` and `TrainedInput` read: classes, pixels, preparation."""
    mean, std = data.pixel_stats
    names, image = list(data.class_names), data.image_settings
    return {"data": {"classes": names, "mean": mean, "std": std, "image": image}}


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
    return normalized_as_trained(data, checkpoint)


def normalized_as_trained(data: Data, checkpoint: Mapping[str, Any]) -> Data:
    """The data, normalized by the pixel statistics that the checkpoint stores, for a run that goes on.

    Raises:
        ConfigError: its statistics are none of such images.
    """
    stored = checkpoint.get("data")
    if stored is None:
        return data
    shape = (1, data.num_channels, 1, 1)
    if not all(stored[name].shape == shape and stored[name].is_floating_point() for name in ("mean", "std")):
        raise ConfigError(f"data: the model was trained on images of other channels, the data has {data.num_channels}")
    return data.normalized_by(stored["mean"], stored["std"])
