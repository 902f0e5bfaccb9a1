"""Data sets that other packages install (digits, Fashion-MNIST), and a synthetic one."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from syncbn.training.config.data import DigitsConfig, FashionMnistConfig, SyntheticConfig
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.layout import idx_file
from syncbn.training.data.dataset import Split
from syncbn.training.data.images import ImageData
from syncbn.training.data.randomness import mix_key
from syncbn.training.data.splits import SPLIT_SEED, stratified_indices

FASHION_VAL_SAMPLES = 5000


def load_digits(config: DigitsConfig) -> ImageData:
    """Loads `data=digits`: the table in scikit-learn, whose rows are 64 pixels and the label.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    table = torch.from_numpy(_table_of_digits())
    images = table[:, :-1].to(torch.float32).view(-1, 1, 8, 8) / 16.0
    labels = table[:, -1].to(torch.int64)
    train, val, test = (Split(images[index], labels[index]) for index in stratified_indices(labels))
    return ImageData(train, val, test, 10, config.shift, config.flip)


def _table_of_digits() -> np.ndarray:
    """(1797, 65) float64; read from the package's file, because importing scikit-learn takes half as long as torch."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ConfigError("data=digits: the images are part of scikit-learn, which is not installed;"
                          " pip install 'syncbn[train]'")  # fmt: skip
    path = Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # another version may keep them elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def load_fashion_mnist(config: FashionMnistConfig) -> ImageData:
    directory = Path(config.path).expanduser()
    images, labels = (_read_idx(directory, f"train-{kind}") for kind in ("images-idx3", "labels-idx1"))
    test = Split(*(_read_idx(directory, f"t10k-{kind}") for kind in ("images-idx3", "labels-idx1")))
    cut = len(labels) - FASHION_VAL_SAMPLES
    if cut < 1:
        raise ConfigError(f"data.path: expected more than {FASHION_VAL_SAMPLES} training images, got {len(labels)}")
    end = min(cut, config.train_samples or cut)
    train, val = Split(images[:end], labels[:end]), Split(images[cut:], labels[cut:])
    return ImageData(train, val, test, 10, config.shift, config.flip)


def _read_idx(directory: Path, stem: str) -> Tensor:
    """Reads an IDX file (MNIST's format: a big-endian header, then unsigned bytes), plain or gzipped.

    Returns:
        Images (N, 1, H, W) float32 between 0 and 1, or labels (N,) int64.

    Raises:
        ConfigError: the file is missing, or is not a complete IDX file of one or three dimensions.
    """
    path = idx_file(directory, stem)
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


def make_synthetic(config: SyntheticConfig) -> ImageData:
    generator = torch.Generator().manual_seed(mix_key(SPLIT_SEED, config.num_samples, config.num_classes))
    shape = (config.channels, config.size, config.size)
    patterns = torch.randn(config.num_classes, *shape, generator=generator)
    labels = torch.arange(config.num_samples) % config.num_classes
    images = patterns[labels] + config.noise * torch.randn(config.num_samples, *shape, generator=generator)
    order = torch.randperm(config.num_samples, generator=generator)
    cuts = [config.num_samples * 8 // 10, config.num_samples * 9 // 10]
    train, val, test = (Split(images[index], labels[index]) for index in order.tensor_split(cuts))
    return ImageData(train, val, test, config.num_classes, config.shift, config.flip)
