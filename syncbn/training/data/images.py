"""Data sets of images of one size, normalized by their pixel statistics and augmented by shifts and mirroring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError
from syncbn.training.data.augment import augment
from syncbn.training.data.augmentation import Augmentation
from syncbn.training.data.dataset import IGNORE, Rows, Split
from syncbn.training.data.decoding import Decoded
from syncbn.training.data.preparation import Preparation, normalized
from syncbn.training.data.randomness import Draw, mix_key, occurrences

STATS_SAMPLES = 1000  # for images decoded on access: number of samples that give mean and std


@dataclass(frozen=True)
class ImageData:
    """The splits of images of one size (see `Split`), their normalization, and the augmentation in training."""

    train: Split
    val: Split
    test: Split | None
    """None if the data set has no test split."""
    num_classes: int | None
    """None if the targets are not classes."""
    shift: int
    flip: bool
    """Shift and flip are without effect where there is an `augmentation`."""
    class_names: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty if the data set has none."""
    mean: Tensor | str | None = None
    """Mean by which pixels are normalized, (1, C, 1, 1) float64; None: that of the training images; "init.<name>": of
    a pretrained sub-network, which has to be looked up before batches are made.
    """
    std: Tensor | str | None = None
    """Standard deviation by which they are normalized; as `mean`."""
    augmentation: Augmentation | None = None
    """The user's transforms of whole training images, which take the place of shift and flip."""
    preparation: Preparation | None = None
    """How images in files become those of the splits; None for images that are no files, whose size is theirs."""
    targets: str = "classes"
    """See `Data`."""
    division: str | None = None
    """See `Data`."""

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1]

    @property
    def has_masks(self) -> bool:
        """Whether labels are per pixel (masks) instead of per image."""
        return self.targets == "classes" and len(self.train.labels.shape) > 1

    def train_batch(
        self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype, repeats: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augmented, normalized images (N, C, H, W) and their targets; see `Data`.

        Targets are classes, (N,) or (N, H, W) int64, or several labels or numbers, (N, K) float32.

        A mask moves with its image; mask pixels that a shift brings in are IGNORE.
        """
        names = occurrences(index, repeats)
        if self.augmentation is not None:
            images, labels = self._transformed(index, names, seed, epoch)
            return normalized(images, *self.pixel_stats, dtype), _as_targets(labels)
        images, labels = self.train.images[index], _as_targets(self.train.labels[index])
        images = augment(images, names, self.shift, self.flip, seed, epoch)
        if self.has_masks:
            labels = augment(labels[:, None], names, self.shift, self.flip, seed, epoch, fill=IGNORE)[:, 0]
        return normalized(images, *self.pixel_stats, dtype), labels

    def eval_batch(self, split: Split, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Normalized images (N, C, H, W) and their targets, as in `train_batch`."""
        return normalized(split.images[index], *self.pixel_stats, dtype), _as_targets(split.labels[index])

    @cached_property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """`mean` and `std`, or in the place of None those of the training images, (1, C, 1, 1) float64.

        They are the same on every rank. If images are decoded on access, they are those of at most STATS_SAMPLES evenly
        spaced ones.

        Raises:
            ConfigError: the statistics of a pretrained sub-network have not been looked up.
        """
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, str):
                raise ConfigError(f"data.{name}={value}: expected {value}.path beside it; or give numbers")
        mean, std = self.mean, self.std
        if mean is None or std is None:
            own_mean, own_std = self._stats_of_images()
            mean, std = own_mean if mean is None else mean, own_std if std is None else std
        assert isinstance(mean, Tensor)
        assert isinstance(std, Tensor)
        return mean, std

    def normalized_by(self, mean: Tensor, std: Tensor) -> ImageData:
        """See `Data`."""
        return replace(self, mean=mean, std=std)

    @property
    def train_labels(self) -> Tensor | None:
        """See `Data`."""
        return None if self.has_masks or self.targets != "classes" else self.train.labels[torch.arange(len(self.train))]

    @property
    def image_settings(self) -> dict[str, Any]:
        """See `Data`."""
        return self._prepared.description()

    @property
    def _prepared(self) -> Preparation:
        height, width = self.train.images.shape[2:]
        return self.preparation or Preparation((height, width), self.num_channels)

    def _stats_of_images(self) -> tuple[Tensor, Tensor]:
        images = self.train.images
        if isinstance(images, Tensor) and images.is_floating_point():
            std, mean = torch.std_mean(images.to(torch.float64), dim=(0, 2, 3), keepdim=True)
        else:
            mean, std = _byte_stats(images, chosen_for_stats(images))
        return mean, std.clamp(min=1e-6)

    def first(self, num_samples: int) -> ImageData:
        """See `Data`."""
        index = torch.arange(num_samples)
        few = Split(self.train.images[index], self.train.labels[index])
        return replace(self, train=few, val=few, test=few, shift=0, flip=False, augmentation=None)

    def check_augmentation(self, seed: int) -> None:
        """Tries the user's transforms on the first training sample; see `Augmentation.require_repeatable`."""
        if self.augmentation is not None:
            self.augmentation.require_repeatable(*self._whole(0), seed, self._name(0))

    def _transformed(self, index: Tensor, names: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels or masks of these training samples, transformed and then fitted."""
        assert self.augmentation is not None
        images, masks = self.train.images[index[:0]], []
        drawn = []
        for sample, name in zip(index.tolist(), names.tolist(), strict=True):
            key = mix_key(seed, epoch, name, Draw.AUGMENT)
            image, mask = self.augmentation(*self._whole(sample), key, self._name(sample))
            drawn.append(self._prepared.fitted_pixels(image))
            masks += [] if mask is None else [self._prepared.fitted_classes(mask)]
        images = torch.stack(drawn) if drawn else images
        return images, torch.stack(masks) if masks else self.train.labels[index]

    def _whole(self, sample: int) -> tuple[Tensor, Tensor | None]:
        """A training image in its own size, and its mask; not those of the data set, so that they may be changed."""
        rows = (self.train.images, self.train.labels)[: 2 if self.has_masks else 1]
        image, *masks = (
            part.whole(sample) if isinstance(part, Decoded) else part[torch.tensor([sample])][0] for part in rows
        )
        return image, masks[0] if masks else None

    def _name(self, sample: int) -> str:
        images = self.train.images
        return repr(images.source.name(sample)) if isinstance(images, Decoded) else f"training sample {sample}"


def _as_targets(labels: Tensor) -> Tensor:
    """Class numbers as int64; labels and numbers as they are."""
    return labels if labels.is_floating_point() else labels.to(torch.int64)


def chosen_for_stats(images: Rows) -> Tensor:
    """Positions of the images that give mean and standard deviation: all, or evenly spaced ones."""
    num = len(images) if isinstance(images, Tensor) else min(len(images), STATS_SAMPLES)
    return torch.arange(num) * len(images) // num


def _byte_stats(images: Rows, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of uint8 images scaled to [0, 1], (1, C, 1, 1) float64, from exact integer sums."""
    sums = torch.zeros(2, images.shape[1], dtype=torch.int64)
    for part in index.split(32):
        values = images[part].to(torch.int64)
        sums += torch.stack([values.sum((0, 2, 3)), (values * values).sum((0, 2, 3))])
    return stats_of_sums(sums, len(index) * images.shape[2] * images.shape[3])


def stats_of_sums(sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, C, 1, 1) float64, of `count` bytes a channel, scaled to [0, 1].

    Args:
        sums: of the bytes and of their squares, (2, C) int64.
    """
    total, squares = sums.to(torch.float64)
    variance = (squares - total * total / count) / max(1, count - 1)
    return (total / count / 255)[None, :, None, None], (variance.sqrt() / 255)[None, :, None, None]
