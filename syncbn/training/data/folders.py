"""Data sets read from directories: images in one directory per class, or images and masks."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from syncbn.training.config.data import ImageFolderConfig, MaskFolderConfig
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.loading import DecodedConfig
from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded, Files, keep_decoded, warn_of_lost_bits
from syncbn.training.data.images import ImageData
from syncbn.training.data.masks import MaskValues
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.splits import hold_out, stratified_indices

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load_classes(config: ImageFolderConfig) -> ImageData:
    """Loads `data=image_folder`: one directory per class, in each of `train/`, `val/` and `test/` or in `data.path`.

    Without `val/`, a tenth of `train/` is held out for validation. Without `test/`, as in ImageNet's layout, there is
    no test split. Without any of the three, the images are split 80/10/10 per class.

    Raises:
        ConfigError: a directory is missing, classes differ between splits, or a class has too few images to split.
    """
    root, others = root_of(config), Counter[str]()
    splits = split_directories(root, optional=("val", "test"))
    names = _class_names(root / splits[0] if splits else root)
    for split in splits[1:]:
        _require_same(f"classes as in {root / 'train'}", names, _class_names(root / split), root / split)
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
    found = split_directories(root, optional=("test",))
    if not found:
        raise ConfigError(f"data.path: expected the directories {', '.join(SPLITS)} in {str(root)!r}, found"
                          f" {listed(directories(root)) or 'none'}; each holds images/ and masks/")  # fmt: skip
    values, splits = MaskValues.of(config), {}
    for split in found:
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
    log.info("%s: %s, %d classes", config.path, sizes, num_classes)
    train, val, test = (splits.get(name) for name in SPLITS)
    assert train is not None
    assert val is not None
    return ImageData(
        train, val, test, num_classes, config.shift, config.flip, tuple(names), preparation=Preparation.of(config)
    )


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


def root_of(config: DecodedConfig) -> Path:
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data.path: expected a directory, found none at {config.path!r}")
    return root


def split_directories(root: Path, optional: Sequence[str]) -> list[str]:
    """The directories among train, val and test that the data set has; empty if it is not divided into splits.

    Without `train`, or with `train` alone, these directories count as classes.

    Args:
        optional: splits that may be missing, though not both val and test.

    Raises:
        ConfigError: train and one of val and test are there, and the other is missing and not optional.
    """
    found = [split for split in SPLITS if split in directories(root)]
    if "train" not in found or len(found) == 1:
        return []
    missing = [split for split in SPLITS if split not in found and split not in optional]
    if missing:
        raise ConfigError(f"data.path: expected the directories {', '.join(SPLITS)} in {str(root)!r}, found no"
                          f" {missing[0]}")  # fmt: skip
    return found


def directories(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_names(root: Path) -> list[str]:
    names = directories(root)
    if len(names) < 2:
        raise ConfigError(f"data.path: expected a directory per class in {str(root)!r}, two or more, found"
                          f" {listed(names) or 'none'}")  # fmt: skip
    return names


def labelled(root: Path, names: Sequence[str], others: Counter[str]) -> tuple[list[str], Tensor]:
    """Paths of the images below the class directories, class by class, and their labels, (N,) int64."""
    found = [image_files(root / name, others) for name in names]
    sizes = torch.tensor([len(paths) for paths in found])
    return [str(path) for paths in found for path in paths], torch.arange(len(names)).repeat_interleave(sizes)


def image_files(directory: Path, others: Counter[str]) -> list[Path]:
    """Image files at any depth, sorted; follows links, each directory once. Counts other files in `others`."""
    paths, seen = [], set()
    for parent, below, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(parent)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        for name in () if real in seen else files:
            if is_image(name):
                paths.append(Path(parent, name))
            else:
                others[os.path.splitext(name)[1].lower() or name] += 1
        seen.add(real)
    return sorted(paths)


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def image_mask_pairs(directory: Path, others: Counter[str], key: str = "data.path") -> tuple[list[str], list[str]]:
    """Paths of the files in `images/`, sorted, and in `masks/` of the same names; counts other files in `others`.

    Raises:
        ConfigError: an image without a mask, or a mask without an image; the message begins with `key`.
    """
    images, masks = (_by_stem(directory / kind, others, key) for kind in ("images", "masks"))
    _require_same(f"masks for the images of {directory}", sorted(images), sorted(masks), directory / "masks", key)
    return [str(images[stem]) for stem in sorted(images)], [str(masks[stem]) for stem in sorted(images)]


def _by_stem(directory: Path, others: Counter[str], key: str) -> dict[str, Path]:
    """Image files by their path relative to `directory`, without the extension."""
    if not directory.is_dir():
        raise ConfigError(f"{key}: expected the directory {str(directory)!r}, found none")
    paths: dict[str, Path] = {}
    for path in image_files(directory, others):
        stem = str(path.relative_to(directory).with_suffix(""))
        if stem in paths:
            raise ConfigError(f"{key}: {str(paths[stem])!r} and {str(path)!r} have the same name; keep one of them")
        paths[stem] = path
    return paths


def _require_same(
    what: str, expected: Sequence[str], found: Sequence[str], where: Path, key: str = "data.path"
) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        differences = [f"{word} {listed(names)}" for word, names in (("no", missing), ("also", unknown)) if names]
        raise ConfigError(f"{key}: expected in {str(where)!r} the same {what}, found {' and '.join(differences)}")


def _show_others(root: Path, others: Counter[str]) -> None:
    if others:
        kinds = listed([f"{count} {kind}" for kind, count in sorted(others.items())])
        log.info("%s: %d files that are no images are left out (%s)", root, sum(others.values()), kinds)
