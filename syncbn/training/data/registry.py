"""Loads the data set that the configuration selects."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import torch

from syncbn.training.config.data import (
    DataConfig,
    DigitsConfig,
    FashionMnistConfig,
    HfConfig,
    ImageFolderConfig,
    MaskFolderConfig,
    OpenData,
    ShapesConfig,
    SyntheticConfig,
    TableConfig,
)
from syncbn.training.config.errors import ConfigError
from syncbn.training.data import builtin, custom, folders, hf, shapes
from syncbn.training.data.augmentation import Augmentation
from syncbn.training.data.dataset import Data, Split
from syncbn.training.data.images import ImageData
from syncbn.training.data.pixel_stats import given_statistic
from syncbn.training.data.tables.load import load_table


def load_data(config: DataConfig) -> Data:
    """Loads the data set of the configuration, restricted to `config.classes` if that is set.

    Raises:
        ConfigError: files are missing or malformed, or labels unknown; the message names the key and the remedy.
    """
    data: Data
    match config:
        case DigitsConfig():
            data = builtin.load_digits(config)
        case FashionMnistConfig():
            data = builtin.load_fashion_mnist(config)
        case SyntheticConfig():
            data = builtin.make_synthetic(config)
        case ShapesConfig():
            data = shapes.make_shapes(config)
        case ImageFolderConfig():
            data = folders.load_classes(config)
        case MaskFolderConfig():
            data = folders.load_masks(config)
        case TableConfig():
            data = load_table(config)
        case HfConfig():
            data = hf.load_hf(config)
        case OpenData():
            data = custom.load_custom(config)
        case _:
            assert_never(config)
    classes = getattr(config, "classes", None)
    data = data if classes is None else _keep_classes(data, classes)
    if isinstance(data, ImageData) and not isinstance(config, OpenData):
        return replace(
            data,
            mean=given_statistic("data.mean", config.mean, data.num_channels),
            std=given_statistic("data.std", config.std, data.num_channels),
            augmentation=Augmentation(config.augment) if config.augment else None,
        )
    return data


def _keep_classes(data: Data, classes: list[int]) -> Data:
    assert isinstance(data, ImageData)  # only schemas of image data sets have `classes`
    assert data.num_classes is not None
    if unknown := sorted(set(classes) - set(range(data.num_classes))):
        raise ConfigError(f"data.classes: expected labels between 0 and {data.num_classes - 1}, got {unknown}")
    renumbered = torch.full((data.num_classes,), -1)
    renumbered[classes] = torch.arange(len(classes))

    def keep(split: Split) -> Split:
        index = torch.arange(len(split))
        chosen = index[torch.isin(split.labels[index], torch.tensor(classes))]
        return Split(split.images[chosen], renumbered[split.labels[chosen]])

    test = None if data.test is None else keep(data.test)
    return replace(data, train=keep(data.train), val=keep(data.val), test=test, num_classes=len(classes))
