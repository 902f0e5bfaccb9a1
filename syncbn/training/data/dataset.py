"""Data sets, their splits, and augmentation that depends on the sample and not on the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError

IGNORE = 255  # in a mask: left out of loss and metrics


class Rows(Protocol):
    """What a split holds, by index: a tensor is one, and so is anything that decodes rows when they are asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """As a tensor's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """The rows of int64 positions (N,), a tensor (N, ...)."""


@dataclass(frozen=True)
class Split:
    """Images and what they are labelled with.

    Images are (N, C, H, W): float32 between 0 and 1 (synthetic ones: any range), or uint8 between 0 and 255. Labels are
    (N,) int64, or masks (N, H, W) uint8 in which 255 is to be ignored.
    """

    images: Rows
    labels: Rows

    def __len__(self) -> int:
        return len(self.labels)


class Data(Protocol):
    """A data set for a run: three splits, and batches of them.

    `ImageData` holds images, decoded or not; `CustomData` anything that a user's own datasets give.
    """

    @property
    def train(self) -> Any:
        """What a split is, only the data set itself knows; it has a length."""

    @property
    def val(self) -> Any:
        """See `train`."""

    @property
    def test(self) -> Any:
        """See `train`."""

    @property
    def num_classes(self) -> int | None:
        """None where the targets are no classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, ..., where the data set has names; else empty."""

    @property
    def num_channels(self) -> int:
        """Channels of an image."""

    @property
    def has_masks(self) -> bool:
        """Whether every pixel has a label, and not the image."""

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, C, 1, 1), float64, that normalize the pixels; the same on every rank."""

    def train_batch(self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these training samples; what is drawn depends on (seed, epoch, sample) alone.

        Args:
            index: (N,) int64, positions in the split; N may be 0.
        """

    def eval_batch(self, split: Any, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these samples of a split, without augmentation."""

    def normalized_by(self, mean: Tensor, std: Tensor) -> Data:
        """The same data, its pixels normalized by these numbers instead of its own."""

    def first(self, num_samples: int) -> Data:
        """The first training samples, not augmented, as training, validation and test set."""


def describe_data(data: Data) -> dict[str, Any]:
    """What a checkpoint keeps of the data, for `as_trained`."""
    mean, std = data.pixel_stats
    return {"data": {"classes": list(data.class_names), "mean": mean, "std": std}}


def as_trained(data: Data, checkpoint: Mapping[str, Any]) -> Data:
    """Data for a model that was trained: pixels are normalized as they were then, whatever images there are now.

    Raises:
        ConfigError: its labels have other names.
    """
    stored = checkpoint.get("data")
    if stored is None:  # written before checkpoints kept it
        return data
    if stored["classes"] != list(data.class_names):
        raise ConfigError(
            f"data.path: the model was trained on the classes {', '.join(stored['classes']) or 'without names'}, the"
            f" data has {', '.join(data.class_names) or 'none with names'}"
        )
    return data.normalized_by(stored["mean"], stored["std"])
