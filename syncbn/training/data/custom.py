"""Data sets of the user's own: any three map-style datasets of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from syncbn.training.config.data import OpenData
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.instantiate import build_target
from syncbn.training.data.dataset import Data
from syncbn.training.data.images import ImageData
from syncbn.training.data.randomness import Draw, mix_key


@dataclass(frozen=True)
class CustomData:
    """Three map-style datasets of torch's kind: `train`, `val`, `test`.

    Items are (image, target): a float tensor (C, ...), normalized as the user wants it, and a tensor or number. What an
    item draws from torch's random numbers is a function of (seed, epoch, sample), so that own augmentation is the same
    at any world size; other generators are the user's to seed.
    """

    train: Any
    val: Any
    test: Any
    num_classes: int | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """None: what targets are is the loss's business."""
        return ()

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return int(self._batch(self.train, torch.tensor([0]), (0, 0), torch.float32)[0].size(1))

    @property
    def has_masks(self) -> bool:
        """What targets are is the loss's business."""
        return False

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """0 and 1: nothing is normalized here."""
        shape = (1, self.num_channels, 1, 1)
        return torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)

    def train_batch(self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these samples, stacked."""
        return self._batch(self.train, index, (seed, epoch), dtype)

    def eval_batch(self, split: Any, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these samples, stacked."""
        return self._batch(split, index, (0, 0), dtype)

    def normalized_by(self, mean: Tensor, std: Tensor) -> CustomData:
        """The same: nothing is normalized here."""
        return self

    def first(self, num_samples: int) -> CustomData:
        """See `Data`."""
        few = Subset(self.train, range(num_samples))
        return replace(self, train=few, val=few, test=few)

    def _batch(self, split: Any, index: Tensor, draw: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            items = []
            for sample in index.tolist() or [0]:  # of an empty batch too the shape has to be known
                torch.manual_seed(mix_key(*draw, sample, Draw.ITEM))
                items.append(split[sample])
        images = torch.stack([torch.as_tensor(image) for image, *_ in items])[: len(index)]
        targets = torch.stack([torch.as_tensor(target) for _, target in items])[: len(index)]
        return images.to(dtype), targets


def load(config: OpenData) -> Data:
    """What `data._target_` makes: an object with the datasets `train`, `val`, `test`, and with `num_classes` where the
    targets are classes.

    Raises:
        ConfigError: it lacks one of them, one is empty, or its items are not pairs that begin with a tensor.
    """
    built, key = build_target("data", config.arguments), f"data._target_={config.name}"
    if isinstance(built, ImageData | CustomData):
        return built
    splits: list[Any] = []
    for name in ("train", "val", "test"):
        split = getattr(built, name, None)
        if split is None or not hasattr(split, "__getitem__") or not hasattr(split, "__len__"):
            raise ConfigError(
                f"{key}: expected the datasets train, val and test, with len() and indexing; {name} is not"
            )
        if len(split) == 0:
            raise ConfigError(f"{key}: {name} is empty")
        item = split[0]
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor)):
            raise ConfigError(f"{key}: expected items (image tensor, target), {name}[0] is a {type(item).__name__}")
        splits.append(split)
    train, val, test = splits
    return CustomData(train, val, test, getattr(built, "num_classes", None))
