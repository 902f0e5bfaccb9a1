"""User-defined data sets: any map-style datasets of torch."""

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
from syncbn.training.data.randomness import Draw, mix_key, occurrences


@dataclass(frozen=True)
class CustomData:
    """Map-style datasets of torch's kind: `train`, `val`, and `test` unless there is no test split.

    Items are (image, target): a float tensor (C, ...), already normalized, and a tensor or number. Before each item is
    read, torch's generator is seeded by (seed, epoch, sample), so that augmentation which draws from it is the same at
    any world size. Other generators, such as NumPy's, are the user's to seed.
    """

    train: Any
    val: Any
    test: Any
    num_classes: int | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty: targets need not be classes; only the loss interprets them."""
        return ()

    @property
    def num_channels(self) -> int:
        """Channels of an image; reads the first training sample."""
        return int(self._batch(self.train, torch.tensor([0]), (0, 0), torch.float32)[0].size(1))

    @property
    def has_masks(self) -> bool:
        """Always False: only the loss interprets the targets."""
        return False

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean 0 and standard deviation 1: items are not normalized here."""
        shape = (1, self.num_channels, 1, 1)
        return torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)

    @property
    def train_labels(self) -> Tensor | None:
        """The attribute `targets` of the training dataset, as torchvision's have it; None without one."""
        targets = getattr(self.train, "targets", None)
        if targets is None or len(targets) != len(self.train):
            return None
        labels = torch.as_tensor(targets)
        return labels.to(torch.int64) if labels.dim() == 1 and not labels.is_floating_point() else None

    @property
    def image_settings(self) -> None:
        """None: the user's datasets prepare their images."""
        return None

    def train_batch(
        self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype, repeats: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images and targets of these training samples, stacked; images are cast to `dtype`."""
        return self._batch(self.train, index, (seed, epoch), dtype, repeats)

    def eval_batch(self, split: Any, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these samples of a split, stacked; images are cast to `dtype`."""
        return self._batch(split, index, (0, 0), dtype)

    def normalized_by(self, mean: Tensor, std: Tensor) -> CustomData:
        """Returns the data unchanged: items are not normalized here."""
        return self

    def first(self, num_samples: int) -> CustomData:
        """See `Data`; augmentation inside the user's datasets stays on."""
        few = Subset(self.train, range(num_samples))
        return replace(self, train=few, val=few, test=few)

    def _batch(
        self, split: Any, index: Tensor, draw: tuple[int, int], dtype: torch.dtype, repeats: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        names = occurrences(index, repeats).tolist()
        with torch.random.fork_rng(devices=[]):
            items = []
            # An empty batch takes its shapes from sample 0.
            for sample, name in zip(index.tolist() or [0], names or [0], strict=True):
                torch.manual_seed(mix_key(*draw, name, Draw.ITEM))
                items.append(split[sample])
        images = torch.stack([torch.as_tensor(image) for image, *_ in items])[: len(index)]
        targets = torch.stack([torch.as_tensor(target) for _, target in items])[: len(index)]
        return images.to(dtype), targets


def load_custom(config: OpenData) -> Data:
    """Builds `data._target_`: an object with the datasets `train` and `val`, optionally `test` and `num_classes`.

    An `ImageData` or `CustomData` is returned as it is.

    Raises:
        ConfigError: a dataset is missing or empty, or its first item is not a pair (image tensor, target).
    """
    built, key = build_target("data", config.arguments), f"data._target_={config.name}"
    if isinstance(built, ImageData | CustomData):
        return built
    splits: list[Any] = []
    for name in ("train", "val", "test"):
        split = getattr(built, name, None)
        if split is None and name == "test":
            splits.append(None)
            continue
        if split is None or not hasattr(split, "__getitem__") or not hasattr(split, "__len__"):
            raise ConfigError(
                f"{key}: expected the datasets train, val and test (or no test), with len() and indexing; {name} is not"
            )
        if len(split) == 0:
            raise ConfigError(f"{key}: {name} is empty")
        item = split[0]
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor)):
            raise ConfigError(f"{key}: expected items (image tensor, target), {name}[0] is a {type(item).__name__}")
        splits.append(split)
    train, val, test = splits
    return CustomData(train, val, test, getattr(built, "num_classes", None))
