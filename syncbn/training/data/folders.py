"""Data sets read from directories: images in one directory per class, or images and masks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from syncbn.training.config.data import ImageFolderConfig, MaskFolderConfig
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.layout import (
    EXTENSIONS,
    SPLITS,
    image_files,
    image_mask_pairs,
    root_of,
    splits_of_classes,
    splits_of_masks,
)
from syncbn.training.config.loading import DecodedConfig
from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded, Files, keep_decoded, warn_of_lost_bits
from syncbn.training.data.images import ImageData
from syncbn.training.data.masks import MaskValues
from syncbn.training.data.native import NativeData
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.splits import hold_out, stratified_indices

log = logging.getLogger(__name__)


def load_classes(config: ImageFolderConfig) -> ImageData:
    """Loads `data=image_folder`: one directory per class, in each of `train/`, `val/` and `test/` or in `data.path`.

    Without `val/`, a tenth of `train/` is held out for validation. Without `test/`, as in ImageNet's layout, there is
    no test split. Without any of the three, the images are split 80/10/10 per class.

    Raises:
        ConfigError: a directory is missing, classes differ between splits, or a class has too few images to split.
    """
    root, others = root_of(config), Counter[str]()
    splits, names = splits_of_classes(root)
    parts = {split: labelled(root / split, names, others) for split in splits}
    whole = {} if splits else {"": labelled(root, names, others)}
    if not any(paths for paths, _ in (*parts.values(), *whole.values())):
        extensions = ", ".join(sorted(EXTENSIONS))
        raise ConfigError(f"data.path: no image in the directories {listed(names)} of {str(root)!r}; files are taken"
                          f" for images by their extension ({extensions})")  # fmt: skip
    if "val" not in parts:
        paths, labels = parts["train"] if splits else whole[""]
        cut = split_labels(labels, names, with_test=not splits)
        held_out = [([paths[i] for i in index.tolist()], labels[index]) for index in cut]
        parts |= zip(SPLITS, held_out, strict=False)  # without a test split the two first
    _show_others(root, others)
    data = {
        split: Split(Decoded(Files(paths), Preparation.of(config)), labels) for split, (paths, labels) in parts.items()
    }
    return decoded_data(data, config, len(names), names)


def load_masks(config: MaskFolderConfig) -> ImageData:
    """Loads `data=mask_folder`: `train/`, `val/` and `test/`, each with `images/` and `masks/` of equal file names.

    Without `test/` there is no test split.

    Raises:
        ConfigError: a directory is missing, an image has no mask, or a mask no image.
    """
    root, others = root_of(config), Counter[str]()
    values, splits = MaskValues.of(config), {}
    for split in splits_of_masks(root):
        sources = [Files(paths) for paths in image_mask_pairs(root / split, others)]
        prepared = Preparation.of(config)
        splits[split] = Split(Decoded(sources[0], prepared), Decoded(sources[1], prepared, values, of=sources[0]))
    _show_others(root, others)
    return decoded_data(splits, config, config.num_classes, ())


def decoded_data(
    splits: Mapping[str, Split], config: DecodedConfig, num_classes: int, names: Sequence[str]
) -> ImageData:
    """Makes `ImageData` of the splits, train, val and perhaps test, with a cache of decoded images if they fit.

    Raises:
        ConfigError: a split is empty.
    """
    for name, split in splits.items():
        if len(split) == 0:
            raise ConfigError(f"data.path: no image for {name} in {config.path!r}; expected at least one")
    # Transforms take training images that are neither fitted nor cached.
    kept = [split for name, split in splits.items() if name != "train" or not config.augment]
    rows = [rows for split in kept for rows in (split.images, split.labels) if isinstance(rows, Decoded)]
    keep_decoded(rows, config)
    if config.range is None and isinstance(splits["train"].images, Decoded):
        warn_of_lost_bits(splits["train"].images)
    sizes = ", ".join(f"{len(splits[name])} {name}" if name in splits else f"no {name}" for name in SPLITS)
    log.info("%s: %s, %d %s", config.path, sizes, num_classes, getattr(config, "kind", "classes"))
    train, val, test = (splits.get(name) for name in SPLITS)
    assert train is not None
    assert val is not None
    return class_for(config)(
        train, val, test, num_classes, config.shift, config.flip, tuple(names), preparation=Preparation.of(config)
    )


def class_for(config: DecodedConfig) -> type[ImageData]:
    """The class of a data set whose images are all of `data.size`, or of one whose images have their own."""
    return ImageData if config.height_and_width is not None else NativeData


def split_labels(labels: Tensor, names: Sequence[str], *, with_test: bool = True) -> list[Tensor]:
    """Indices of train, val and test, 80/10/10 per class; without `with_test` of train and val, 90/10.

    Raises:
        ConfigError: a class with fewer than ten images.
    """
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    few = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < 10]
    if few:
        shares = "80/10/10" if with_test else "train 90/10"
        raise ConfigError(f"data.path: splitting {shares} needs 10 images of every class, got fewer of {listed(few)};"
                          " or divide them yourself into train, val and test")  # fmt: skip
    return stratified_indices(labels) if with_test else hold_out(labels)


def labelled(root: Path, names: Sequence[str], others: Counter[str]) -> tuple[list[str], Tensor]:
    """Paths of the images below the class directories, class by class, and their labels, (N,) int64."""
    found = [image_files(root / name, others) for name in names]
    sizes = torch.tensor([len(paths) for paths in found])
    return [str(path) for paths in found for path in paths], torch.arange(len(names)).repeat_interleave(sizes)


def _show_others(root: Path, others: Counter[str]) -> None:
    if others:
        kinds = listed([f"{count} {kind}" for kind, count in sorted(others.items())])
        log.info("%s: %d files that are no images are left out (%s)", root, sum(others.values()), kinds)
