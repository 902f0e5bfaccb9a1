"""Data sets that Hugging Face's `datasets` library saved to disk; imports the library only to load one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from syncbn.training.config.data import HfConfig
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded
from syncbn.training.data.folders import decoded_data, split_labels
from syncbn.training.data.images import ImageData
from syncbn.training.data.preparation import Preparation

_NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Column:
    """A column of images, as a `decoding.Source`."""

    dataset: Any
    column: str
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, position: int) -> Path | bytes:
        """The image as it is stored, encoded; an array of pixels, (H, W) or (H, W, 3), is encoded as PNG.

        Raises:
            ValueError: an array of other values than integers from 0 to 255.
        """
        value = self.dataset[position][self.column]
        if isinstance(value, dict):
            return value["bytes"] if value.get("bytes") is not None else Path(value["path"])
        pixels, encoded = np.asarray(value), io.BytesIO()
        if pixels.dtype.kind not in "ui" or not 0 <= pixels.min() <= pixels.max() <= 255:
            raise ValueError(f"an array of {pixels.dtype}; expected integers from 0 to 255")
        Image.fromarray(pixels.astype(np.uint8)).save(encoded, "PNG")
        return encoded.getvalue()

    def name(self, position: int) -> str:
        """Row and split of the image."""
        return f"row {position} of {self.split}"


def load_hf(config: HfConfig) -> ImageData:
    """Loads `data=hf`: a directory that `save_to_disk` wrote, with the splits train, validation (or val) and test.

    Without a validation split, a tenth of train is held out for it; without test, where there is a validation split,
    there is no test split. A single data set without splits is split 80/10/10 per class.

    Raises:
        ConfigError: the library is not installed; a split or column is missing; labels are not 0, 1, ....
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"data=hf: needs Hugging Face's library ({error}); pip install 'syncbn[hf]'") from None
    try:
        loaded = datasets.load_from_disk(str(Path(config.path).expanduser()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.path: {config.path!r} is not a data set that save_to_disk wrote ({error})") from None
    loaded = loaded.with_format(None)
    if isinstance(loaded, datasets.DatasetDict):
        optional = "test" if _has(loaded, "val") else "val"
        parts = {split: _part(loaded, split) for split in _NAMES if split != optional or _has(loaded, split)}
        if "val" not in parts:
            names, labels = _labels(parts["train"], config)
            train, val = split_labels(labels, names, with_test=False)
            parts |= {"train": parts["train"].select(train.tolist()), "val": parts["train"].select(val.tolist())}
    else:
        names, labels = _labels(loaded, config)
        indices = split_labels(labels, names)
        parts = {split: loaded.select(index.tolist()) for split, index in zip(_NAMES, indices, strict=True)}
    names, _ = _labels(parts["train"], config)
    splits = {}
    for split, part in parts.items():
        found, labels = _labels(part, config)
        if part.features[config.label] != parts["train"].features[config.label] or len(found) > len(names):
            raise ConfigError(f"data.label: {split} has other classes in {config.label!r} than train")
        if isinstance(part.features[config.image], datasets.Image):
            part = part.cast_column(config.image, datasets.Image(decode=False))
        column = Column(part.select_columns(config.image), config.image, split)
        images = Decoded(column, Preparation.of(config))
        splits[split] = Split(images, labels)
    return decoded_data(splits, config, len(names), names)


def _has(loaded: Any, split: str) -> bool:
    return any(name in loaded for name in _NAMES[split])


def _part(loaded: Any, split: str) -> Any:
    for name in _NAMES[split]:
        if name in loaded:
            return loaded[name]
    raise ConfigError(f"data.path: expected a split {' or '.join(_NAMES[split])}, found {', '.join(loaded)}; make one"
                      " with train_test_split, or save a single split, which is then cut 80/10/10")  # fmt: skip


def _labels(part: Any, config: HfConfig) -> tuple[list[str], Tensor]:
    """Names of the classes, and the label of each row, (N,) int64; numbers are names where the column has none."""
    for key, column in (("image", config.image), ("label", config.label)):
        if column not in part.column_names:
            raise ConfigError(f"data.{key}: no column {column!r}; found {', '.join(part.column_names)}")
    values = part[config.label][:]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ConfigError(
            f"data.label: expected labels 0, 1, ... in {config.label!r}; where it holds names, class_encode_column"
            " numbers them"
        )
    names = getattr(part.features[config.label], "names", None)
    return names or [str(label) for label in range(max(values, default=0) + 1)], torch.tensor(values)
