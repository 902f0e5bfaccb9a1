"""User-defined data sets: any map-style datasets of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from syncbn.training.config.data import OpenData
from syncbn.training.config.errors import ConfigError, SampleError
from syncbn.training.config.instantiate import build_target
from syncbn.training.data.dataset import Data
from syncbn.training.data.images import ImageData
from syncbn.training.data.randomness import Draw, mix_key, occurrences


@dataclass(frozen=True)
class LabelRange:
    """The labels that a loss over classes can take."""

    num_classes: int
    ignored: int | None = None
    """A further value, which does not count."""

    def first_outside(self, labels: Tensor) -> tuple[int, int] | None:
        """Position along the first dimension, and value, of the first label that is none of them; None for no such."""
        labels = labels.to(torch.int64)  # a type without a sign cannot be compared with -1
        outside = (labels < 0) | (labels >= self.num_classes)
        if self.ignored is not None:
            outside &= labels != self.ignored
        if not outside.any():
            return None
        first = int(outside.flatten().nonzero()[0])
        return first // max(1, labels[0].numel()), int(labels.flatten()[first])

    def remedy(self, label: int) -> str:
        """What to say about a label outside of the range."""
        return (f"the label {label}, expected 0 to {self.num_classes - 1}; correct it, or leave such labels out with"
                f" loss.ignore_index={label}")  # fmt: skip


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
    key: str = "data"
    """What the configuration calls it, for error messages."""
    labels: LabelRange | None = None
    """Targets that are labels have to be among these; None: only the loss interprets them."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty: targets need not be classes; only the loss interprets them."""
        return ()

    @property
    def targets(self) -> str:
        """ "any": only the loss interprets the targets."""
        return "any"

    @property
    def division(self) -> None:
        """None: the user's datasets are divided already."""
        return None

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
        """Images and targets of these training samples, stacked; images are cast to `dtype`.

        Raises:
            SampleError: see `item`; images or targets of different shapes; a label that is not among `labels`.
        """
        return self._batch(self.train, index, (seed, epoch), dtype, repeats)

    def eval_batch(self, split: Any, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Images and targets of these samples of a split, stacked; images are cast to `dtype`."""
        return self._batch(split, index, (0, 0), dtype)

    def item(self, split: Any, sample: int, draw: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Image and target of a sample; `draw` (seed, epoch, `occurrences` of it) seeds torch's generator before.

        Raises:
            SampleError: the dataset raises an exception, or returns anything but an image and a target; it names the
                split and the index.
        """
        torch.manual_seed(mix_key(*draw, Draw.ITEM))
        try:
            item = split[sample]
        except Exception as error:  # of whatever type the user's code raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self.error(split, sample, f"raises {reason}; repair or leave out that sample") from None
        try:
            image, target = (torch.as_tensor(part) for part in item)
            if image.dim() == 0:
                raise ValueError("a number")
            return image, target
        except Exception:
            found = type(item).__name__
            if isinstance(item, tuple | list):
                found += f" of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
            raise self.error(split, sample, f"expected an item (image tensor, target), got a {found}") from None

    def error(self, split: Any, sample: int, text: str) -> SampleError:
        """An error about a sample that names the key, the split and the index."""
        name = next((name for name in ("train", "val", "test") if getattr(self, name) is split), "split")
        return SampleError(f"{self.key}: {name}[{sample}]: {text}")

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
        samples = index.tolist() or [0]  # an empty batch takes its shapes from sample 0
        names = occurrences(index, repeats).tolist() or [0]
        with torch.random.fork_rng(devices=[]):
            items = [self.item(split, sample, (*draw, name)) for sample, name in zip(samples, names, strict=True)]
        stacked = []
        for part, what in enumerate(("an image", "a target")):
            tensors = [item[part] for item in items]
            for sample, tensor in zip(samples, tensors, strict=True):
                if tensor.shape != tensors[0].shape:
                    raise self.error(split, sample, f"{what} of shape {tuple(tensor.shape)}, that of {samples[0]} has"
                                     f" {tuple(tensors[0].shape)}; give all of a batch one shape")  # fmt: skip
            stacked.append(torch.stack(tensors)[: len(index)])
        images, targets = stacked
        if self.labels is not None and not targets.is_floating_point():
            found = self.labels.first_outside(targets)
            if found is not None:
                raise self.error(split, samples[found[0]], self.labels.remedy(found[1]))
        return images.to(dtype), targets


def with_label_range(data: Data, labels: LabelRange, key: str) -> Data:
    """A user's data set that refuses other labels: those in memory at once, others when they are read.

    Raises:
        ConfigError: a label in memory is not among them; the message names the split and the index.
    """
    if isinstance(data, CustomData):
        return replace(data, labels=labels)
    for name in ("train", "val", "test"):
        values = getattr(getattr(data, name), "labels", None)
        if isinstance(values, Tensor) and not values.is_floating_point():
            found = labels.first_outside(values)
            if found is not None:
                raise ConfigError(f"{key}: {name}[{found[0]}]: {labels.remedy(found[1])}")
    return data


def load_custom(config: OpenData) -> Data:
    """Builds `data._target_` (see `build_custom`) and reads the first item of each dataset.

    Raises:
        ConfigError: see `build_custom`.
        SampleError: a first item is not a pair (image tensor, target).
    """
    data = build_custom(config)
    if isinstance(data, CustomData):
        with torch.random.fork_rng(devices=[]):
            for split in (data.train, data.val, data.test):
                if split is not None:
                    data.item(split, 0, (0, 0, 0))
    return data


def build_custom(config: OpenData) -> ImageData | CustomData:
    """Builds `data._target_`: an object with the datasets `train` and `val`, optionally `test` and `num_classes`.

    An `ImageData` or `CustomData` is returned as it is.

    Raises:
        ConfigError: a dataset is missing or empty.
    """
    built, key = build_target("data", config.arguments), f"data._target_={config.name}"
    if isinstance(built, ImageData):
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
        splits.append(split)
    if isinstance(built, CustomData):
        return replace(built, key=key)
    train, val, test = splits
    return CustomData(train, val, test, getattr(built, "num_classes", None), key)
