"""Data sets, their splits, and augmentation that depends on the sample and not on the rank."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.config.schema import (
    ConfigError,
    DigitsConfig,
    FashionMnistConfig,
    HfConfig,
    ImageFolderConfig,
    MaskFolderConfig,
    OpenData,
    ShapesConfig,
    SyntheticConfig,
)
from syncbn.training.data.randomness import integers, mix_key

IGNORE = 255  # in a mask: left out of loss and metrics
STATS_SAMPLES = 1000  # of images that are decoded when asked for, these many give mean and standard deviation
FASHION_VAL_SAMPLES = 5000
_SHIFT_Y, _SHIFT_X, _FLIP = 2, 3, 4  # purposes of the draws, part of their keys
_SPLIT_SEED = 0  # the split is part of a data set, not of a run


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


@dataclass(frozen=True)
class Data:
    """The three splits, what normalizes their pixels, and how the training ones are augmented."""

    train: Split
    val: Split
    test: Split
    num_classes: int | None
    """None where the targets are no classes."""
    shift: int
    flip: bool
    class_names: tuple[str, ...] = ()
    """Of the labels 0, 1, ..., where the data set has names."""
    trained_stats: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation to normalize with, those of a training that is over; None: of these images."""

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1]

    @property
    def has_masks(self) -> bool:
        """Whether every pixel has a label, and not the image."""
        return len(self.train.labels.shape) > 1

    def train_batch(self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Augmented, normalized images and their labels, (N,) or (N, H, W) int64.

        What is drawn depends on (seed, epoch, sample) alone. A mask moves with its image; what comes in is ignored.
        """
        images, labels = self.train.images[index], self.train.labels[index].to(torch.int64)
        images = augment(images, index, self.shift, self.flip, seed, epoch)
        if self.has_masks:
            labels = augment(labels[:, None], index, self.shift, self.flip, seed, epoch, fill=IGNORE)[:, 0]
        return self._normalize(images, dtype), labels

    def eval_batch(self, split: Split, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Normalized images and their labels, (N,) or (N, H, W) int64."""
        return self._normalize(split.images[index], dtype), split.labels[index].to(torch.int64)

    @cached_property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, C, 1, 1) of the training images, float64; the same on every rank.

        Of images that are decoded when asked for: over STATS_SAMPLES of them, evenly spaced.
        """
        if self.trained_stats is not None:
            return self.trained_stats
        images = self.train.images
        if isinstance(images, Tensor) and images.is_floating_point():
            std, mean = torch.std_mean(images.to(torch.float64), dim=(0, 2, 3), keepdim=True)
        else:
            num = len(images) if isinstance(images, Tensor) else min(len(images), STATS_SAMPLES)
            mean, std = _byte_stats(images, torch.arange(num) * len(images) // num)
        return mean, std.clamp(min=1e-6)

    def _normalize(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        mean, std = self.pixel_stats
        return (_as_floats(images, dtype) - mean.to(dtype)) / std.to(dtype)


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
    return replace(data, trained_stats=(stored["mean"], stored["std"]))


def _byte_stats(images: Rows, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1) of bytes, as numbers between 0 and 1; the sums are exact."""
    sums = torch.zeros(2, images.shape[1], dtype=torch.int64)
    for part in index.split(32):
        values = images[part].to(torch.int64)
        sums += torch.stack([values.sum((0, 2, 3)), (values * values).sum((0, 2, 3))])
    count = len(index) * images.shape[2] * images.shape[3]
    total, squares = sums.to(torch.float64)
    variance = (squares - total * total / count) / max(1, count - 1)
    return (total / count / 255)[None, :, None, None], (variance.sqrt() / 255)[None, :, None, None]


def _as_floats(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers between 0 and 1."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def augment(images: Tensor, index: Tensor, shift: int, flip: bool, seed: int, epoch: int, *, fill: int = 0) -> Tensor:
    """Shifts each image by up to `shift` pixels in both directions and mirrors half of them.

    Args:
        images: (N, C, H, W).
        index: (N,) int64, the samples' positions in the data set, which decide what is drawn for them.
        fill: what comes in at the border.
    """
    num, channels, height, width = images.shape
    if num == 0 or (shift == 0 and not flip):
        return images
    if shift:
        rows = torch.arange(height) + integers(2 * shift + 1, index, seed, epoch, _SHIFT_Y)[:, None]
        columns = torch.arange(width) + integers(2 * shift + 1, index, seed, epoch, _SHIFT_X)[:, None]
    else:
        rows, columns = torch.arange(height).expand(num, -1), torch.arange(width).expand(num, -1)
    if flip:
        mirrored = integers(2, index, seed, epoch, _FLIP).bool()[:, None]
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, [shift] * 4, value=fill)
    sample = torch.arange(num)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def load(config: Any) -> Data:
    """The data set that the configuration names.

    Raises:
        ConfigError: files that are missing or not what they should be; the message names the key and the remedy.
    """
    from syncbn.training.data import custom as own_data
    from syncbn.training.data import folders, hf, shapes  # which build on this module

    loaders: dict[type, Callable[[Any], Data]] = {
        DigitsConfig: _load_digits,
        FashionMnistConfig: _load_fashion_mnist,
        SyntheticConfig: _make_synthetic,
        ShapesConfig: shapes.make,
        ImageFolderConfig: folders.load_classes,
        MaskFolderConfig: folders.load_masks,
        HfConfig: hf.load,
        OpenData: own_data.load,
    }
    data = loaders[type(config)](config)
    classes = getattr(config, "classes", None)
    return data if classes is None else _keep_classes(data, classes)


def _load_digits(config: DigitsConfig) -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16.0
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, val, test = (Split(images[index], labels[index]) for index in stratified_indices(labels))
    return Data(train, val, test, 10, config.shift, config.flip)


def stratified_indices(labels: Tensor) -> list[Tensor]:
    """Indices of train, val and test, 80/10/10 per class, each ascending; the same at every call."""
    from sklearn.model_selection import train_test_split

    index, numpy_labels = torch.arange(len(labels)).numpy(), labels.numpy()
    train, rest = train_test_split(index, test_size=0.2, stratify=numpy_labels, random_state=_SPLIT_SEED)
    val, test = train_test_split(rest, test_size=0.5, stratify=numpy_labels[rest], random_state=_SPLIT_SEED)
    return [torch.from_numpy(part).sort().values for part in (train, val, test)]


def hold_out(labels: Tensor) -> list[Tensor]:
    """Indices of train and val, 90/10 per class, each ascending; the same at every call."""
    from sklearn.model_selection import train_test_split

    index = torch.arange(len(labels)).numpy()
    parts = train_test_split(index, test_size=0.1, stratify=labels.numpy(), random_state=_SPLIT_SEED)
    return [torch.from_numpy(part).sort().values for part in parts]


def _load_fashion_mnist(config: FashionMnistConfig) -> Data:
    directory = Path(config.path)
    images, labels = (_read_idx(directory, f"train-{kind}") for kind in ("images-idx3", "labels-idx1"))
    test = Split(*(_read_idx(directory, f"t10k-{kind}") for kind in ("images-idx3", "labels-idx1")))
    cut = len(labels) - FASHION_VAL_SAMPLES
    if cut < 1:
        raise ConfigError(f"data.path: expected more than {FASHION_VAL_SAMPLES} training images, got {len(labels)}")
    end = min(cut, config.train_samples or cut)
    train, val = Split(images[:end], labels[:end]), Split(images[cut:], labels[cut:])
    return Data(train, val, test, 10, config.shift, config.flip)


def _read_idx(directory: Path, stem: str) -> Tensor:
    """An IDX file (MNIST's format: a big-endian header, then bytes): images as float32 / 255, labels as int64."""
    candidates = [directory / f"{stem}-ubyte", directory / f"{stem}-ubyte.gz"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(
            f"data.path: expected the file {stem}-ubyte or {stem}-ubyte.gz in {str(directory)!r}, found neither;"
            " install Debian's package dataset-fashion-mnist, or point data.path to the directory of the four IDX files"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        num_dims = raw[3]
        shape = [int.from_bytes(raw[4 + 4 * dim : 8 + 4 * dim], "big") for dim in range(num_dims)]
        values = torch.frombuffer(bytearray(raw[4 + 4 * num_dims :]), dtype=torch.uint8).view(shape)
        if raw[:3] != b"\x00\x00\x08" or num_dims not in (1, 3):
            raise ValueError("not a header of unsigned bytes in one or three dimensions")
    except (OSError, EOFError, IndexError, RuntimeError, ValueError) as error:
        raise ConfigError(f"data.path: {str(path)!r} is not a whole IDX file ({error}); fetch it again") from None
    return values.to(torch.int64) if num_dims == 1 else values[:, None].to(torch.float32) / 255.0


def _make_synthetic(config: SyntheticConfig) -> Data:
    generator = torch.Generator().manual_seed(mix_key(_SPLIT_SEED, config.num_samples, config.num_classes))
    shape = (config.channels, config.size, config.size)
    patterns = torch.randn(config.num_classes, *shape, generator=generator)
    labels = torch.arange(config.num_samples) % config.num_classes
    images = patterns[labels] + config.noise * torch.randn(config.num_samples, *shape, generator=generator)
    order = torch.randperm(config.num_samples, generator=generator)
    cuts = [config.num_samples * 8 // 10, config.num_samples * 9 // 10]
    train, val, test = (Split(images[index], labels[index]) for index in order.tensor_split(cuts))
    return Data(train, val, test, config.num_classes, config.shift, config.flip)


def _keep_classes(data: Data, classes: list[int]) -> Data:
    assert data.num_classes is not None
    if unknown := sorted(set(classes) - set(range(data.num_classes))):
        raise ConfigError(f"data.classes: expected labels between 0 and {data.num_classes - 1}, got {unknown}")
    renumbered = torch.full((data.num_classes,), -1)
    renumbered[classes] = torch.arange(len(classes))

    def keep(split: Split) -> Split:
        index = torch.arange(len(split))
        chosen = index[torch.isin(split.labels[index], torch.tensor(classes))]
        return Split(split.images[chosen], renumbered[split.labels[chosen]])

    return replace(data, train=keep(data.train), val=keep(data.val), test=keep(data.test), num_classes=len(classes))
