"""From the configuration of a data set to its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from syncbn.training.config.data import OpenData
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.schema import (
    DigitsConfig,
    FashionMnistConfig,
    HfConfig,
    ImageFolderConfig,
    MaskFolderConfig,
    ShapesConfig,
    SyntheticConfig,
)
from syncbn.training.data.builtin import load_digits, load_fashion_mnist, make_synthetic
from syncbn.training.data.dataset import Data, Split


def load(config: Any) -> Data:
    """The data set that the configuration names.

    Raises:
        ConfigError: files that are missing or not what they should be; the message names the key and the remedy.
    """
    from syncbn.training.data import custom as own_data
    from syncbn.training.data import folders, hf, shapes  # which build on this module

    loaders: dict[type, Callable[[Any], Data]] = {
        DigitsConfig: load_digits,
        FashionMnistConfig: load_fashion_mnist,
        SyntheticConfig: make_synthetic,
        ShapesConfig: shapes.make,
        ImageFolderConfig: folders.load_classes,
        MaskFolderConfig: folders.load_masks,
        HfConfig: hf.load,
        OpenData: own_data.load,
    }
    data = loaders[type(config)](config)
    classes = getattr(config, "classes", None)
    return data if classes is None else _keep_classes(data, classes)


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
