"""Directories of images as data sets are laid out in them; looked at before torch is imported, so never imports it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from syncbn.training.config.data import DecodedConfig
from syncbn.training.config.errors import ConfigError, listed

SPLITS = ("train", "val", "test")
EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def root_of(config: DecodedConfig) -> Path:
    """The directory `data.path`; a ConfigError if there is none."""
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data.path: expected a directory, found none at {config.path!r}")
    return root


def splits_of_classes(root: Path) -> tuple[list[str], list[str]]:
    """Splits (none: the images are split) and classes of a data set with one directory per class.

    Raises:
        ConfigError: there are fewer than two classes, or splits have different ones.
    """
    splits = split_directories(root, optional=("val", "test"))
    names = _class_names(root / splits[0] if splits else root)
    for split in splits[1:]:
        _require_same(f"classes as in {root / 'train'}", names, _class_names(root / split), root / split)
    return splits, names


def splits_of_masks(root: Path) -> list[str]:
    """Splits of a data set of images and masks.

    Raises:
        ConfigError: train or val is missing.
    """
    found = split_directories(root, optional=("test",))
    if not found:
        raise ConfigError(f"data.path: expected the directories {', '.join(SPLITS)} in {str(root)!r}, found"
                          f" {listed(directories(root)) or 'none'}; each holds images/ and masks/")  # fmt: skip
    return found


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
    """Names of the directories in it, sorted, without hidden ones."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_names(root: Path) -> list[str]:
    names = directories(root)
    if len(names) < 2:
        raise ConfigError(f"data.path: expected a directory per class in {str(root)!r}, two or more, found"
                          f" {listed(names) or 'none'}")  # fmt: skip
    return names


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


def idx_file(directory: Path, stem: str) -> Path:
    """The file of this name in the format IDX, plain or gzipped.

    Raises:
        ConfigError: there is none.
    """
    candidates = [directory / f"{stem}-ubyte", directory / f"{stem}-ubyte.gz"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(
            f"data.path: expected the file {stem}-ubyte or {stem}-ubyte.gz in {str(directory)!r}, found neither;"
            " install Debian's package dataset-fashion-mnist, or point data.path to the directory of the four IDX files"
        )
    return path


def table_file(path: Path, key: str) -> Path:
    """The path of a table, if it is a file; else a ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{key}: expected a table, a CSV or Parquet file, found no file {str(path)!r}")
    return path
