"""Schemas of the data sets. Like all of `config`, never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.config.errors import require, require_choice
from syncbn.training.config.loading import SAMPLERS, DecodedConfig, LoadingConfig

# What the targets of images are; docs/data.md explains them.
TARGETS = ("classes", "labels", "numbers")


@dataclass
class DigitsConfig(LoadingConfig):
    """scikit-learn's digits: gray images of 8x8."""

    name: str
    classes: list[int] | None
    """Labels to keep, renumbered from 0 in this order; None for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_classes(self.classes)


@dataclass
class FashionMnistConfig(LoadingConfig):
    """Fashion-MNIST from IDX files."""

    name: str
    path: str
    """Directory of the four IDX files, plain or gzipped."""
    classes: list[int] | None
    train_samples: int | None
    """Number of training samples to use, from the first; None for all 55,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train_samples is None or self.train_samples > 0, "data.train_samples", "null or 1 or more",
                self.train_samples)  # fmt: skip
        _check_classes(self.classes)


@dataclass
class SyntheticConfig(LoadingConfig):
    """Synthetic images: a random pattern per class plus Gaussian noise of standard deviation `noise`."""

    name: str
    num_samples: int
    num_classes: int
    channels: int
    size: int
    noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_samples >= 10, "data.num_samples", "10 or more", self.num_samples)
        for key in ("num_classes", "channels", "size"):
            require(getattr(self, key) >= 1, f"data.{key}", "1 or more", getattr(self, key))
        require(self.noise >= 0, "data.noise", "0 or more", self.noise)


@dataclass(kw_only=True)
class ImageFolderConfig(DecodedConfig):
    """Classification images, in one directory per class."""

    name: str


@dataclass(kw_only=True)
class HfConfig(DecodedConfig):
    """A data set that Hugging Face's `datasets` library saved to disk."""

    name: str
    image: str
    """Column of the images."""
    label: str
    """Column of the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image != self.label, "data.label", "another column than data.image", self.label)


@dataclass(kw_only=True)
class MaskFolderConfig(DecodedConfig):
    """Segmentation images, and masks of the same file names."""

    name: str
    num_classes: int
    ignore: int | None
    """Mask value of pixels that loss and metrics exclude; None: every pixel counts."""
    values: Any = None
    """A dictionary: the class of each value in masks, None for one that does not count. None: values are classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_masks(self.num_classes, self.ignore, self.values)

    @property
    def has_masks(self) -> bool:
        """See `DecodedConfig`."""
        return True


@dataclass(kw_only=True)
class TableConfig(DecodedConfig):
    """Images that a table lists, with their labels, numbers or masks; `path` is a CSV or Parquet file."""

    name: str
    image: str
    """Column of the image files, relative to the table."""
    label: str | list[str] | None = None
    """Column of the labels, or several; None: the column "label", unless there is `mask`."""
    target: str | None = None
    """What the labels are: "classes", "labels" (a 0 or 1 in each column) or "numbers"; None: classes in one column,
    labels in several.
    """
    mask: str | None = None
    """Column of mask files, for segmentation."""
    num_classes: int | None = None
    """Of masks; otherwise the table tells them."""
    ignore: int | None = 255
    """See `MaskFolderConfig`, as for `values`."""
    values: Any = None
    split: str | None = None
    """Column with train, val or test for each row; None: the table is divided by `group`, `fold` and `split_seed`."""
    group: str | None = None
    """Column of what must not be in two splits, such as the patient; None: the image file itself."""
    fold: Any = None
    """The fold that is tested, a tenth of the others validates; None: no folds."""
    folds: Any = 5
    """Number of folds, or the column that holds the fold of each row."""
    split_seed: int = 0
    """Seed of the division, apart from the run's own seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target in (None, *TARGETS), "data.target", f"null or one of {', '.join(TARGETS)}", self.target)
        names = self.label if isinstance(self.label, list) else [self.label]
        valid = bool(names) and all(name is None or _is_name(name) for name in names) and len({*names}) == len(names)
        require(valid, "data.label", "a column or a list of columns, each once", self.label)
        self._check_target()
        require(self.fold is None or _is_fold(self.fold), "data.fold", "null or a fold, by number or name", self.fold)
        require(_is_name(self.folds) or (_is_fold(self.folds) and self.folds >= 2), "data.folds",
                "2 or more folds, or the column that holds the fold of each row", self.folds)  # fmt: skip
        require(self.fold is None or self.split is None, "data.split",
                "null with data.fold, which divides the whole table", self.split)  # fmt: skip
        if self.fold is not None and isinstance(self.folds, int):
            require(self.fold in range(self.folds), "data.fold",
                    f"0 to {self.folds - 1} with data.folds={self.folds}", self.fold)  # fmt: skip

    @property
    def has_masks(self) -> bool:
        """See `DecodedConfig`."""
        return self.mask is not None

    @property
    def labels(self) -> list[str]:
        """The columns of the labels; none with masks."""
        if self.mask is not None:
            return []
        return self.label if isinstance(self.label, list) else [self.label or "label"]

    @property
    def kind(self) -> str:
        """One of TARGETS; masks are classes."""
        return self.target or ("labels" if len(self.labels) > 1 else "classes")

    def _check_target(self) -> None:
        if self.mask is not None:
            require(self.label is None, "data.label", "null with data.mask", self.label)
            require(self.target in (None, "classes"), "data.target", "null with data.mask", self.target)
            require(self.num_classes is not None, "data.num_classes", "2 to 255 with data.mask", None)
            _check_masks(self.num_classes or 0, self.ignore, self.values)
        else:
            require(self.kind != "classes" or len(self.labels) == 1, "data.label", "one column for data.target=classes",
                    self.label)  # fmt: skip
            for key in ("num_classes", "values"):
                value = getattr(self, key)
                require(value is None, f"data.{key}", "null without data.mask", value)


@dataclass(kw_only=True)
class ShapesConfig(LoadingConfig):
    """Generated images of colored shapes, and their masks."""

    name: str
    num_samples: int
    num_classes: int
    """Number of classes: the background and `num_classes - 1` kinds of shapes."""
    size: int
    noise: float
    ragged: float
    """Largest share of a mask's rows that is ignored, 0 to 1."""
    seed: int
    """Seed of the images, apart from the run's own seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_samples >= 10, "data.num_samples", "10 or more", self.num_samples)
        require(2 <= self.num_classes <= 4, "data.num_classes", "2 to 4: background, squares, disks, triangles",
                self.num_classes)  # fmt: skip
        require(self.size >= 8, "data.size", "8 pixels or more", self.size)
        require(self.noise >= 0, "data.noise", "0 or more", self.noise)
        require(0 <= self.ragged <= 1, "data.ragged", "a share between 0 and 1", self.ragged)


class OpenData(dict[str, Any]):
    """A user-defined data set: `_target_` and its arguments, and the settings `workers`, `prefetch` and `sampler`."""

    def __init__(self, node: dict[str, Any]) -> None:
        super().__init__(node)
        require_choice("data.sampler", self.sampler, SAMPLERS)
        for key, least in (("workers", 0), ("prefetch", 1)):
            value = getattr(self, key)
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(is_number, f"data.{key}", f"a number, {least} or more", value)

    @property
    def name(self) -> str:
        """The `_target_`: import path of the class or function that builds the data set."""
        return str(self["_target_"])

    @property
    def workers(self) -> int:
        """See `LoadingConfig`."""
        return self.get("workers", 0)

    @property
    def prefetch(self) -> int:
        """See `LoadingConfig`."""
        return self.get("prefetch", 2)

    @property
    def sampler(self) -> str:
        """See `LoadingConfig`."""
        return self.get("sampler", "shuffled")

    @property
    def arguments(self) -> dict[str, Any]:
        """`_target_` and its arguments, without the settings of the loader and the sampler."""
        return {key: value for key, value in self.items() if key not in ("workers", "prefetch", "sampler")}


def _check_masks(num_classes: int, ignore: int | None, values: Any) -> None:
    require(2 <= num_classes <= 255, "data.num_classes", "2 to 255", num_classes)
    require(ignore is None or 0 <= ignore <= 255, "data.ignore", "null or a value between 0 and 255", ignore)
    if values is None:
        return
    require(isinstance(values, dict), "data.values", "values with a class each, {0:0,255:1}", values)
    for value, number in values.items():
        is_value = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
        require(is_value, "data.values", "values between 0 and 255 with a class each, {0:0,255:1}", value)
        is_class = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < num_classes
        require(number is None or is_class, f"data.values.{value}", f"null or a class, 0 to {num_classes - 1}", number)
    require(any(number is not None for number in values.values()), "data.values", "a class or more", values)
    require(ignore in (None, 255), "data.ignore",
            "its default with data.values, where null stands for what does not count", ignore)  # fmt: skip


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_fold(value: object) -> bool:
    return _is_name(value) or (isinstance(value, int) and not isinstance(value, bool))


DataConfig = (
    DigitsConfig
    | FashionMnistConfig
    | SyntheticConfig
    | ImageFolderConfig
    | MaskFolderConfig
    | TableConfig
    | ShapesConfig
    | HfConfig
    | OpenData
)


def _check_classes(classes: list[int] | None) -> None:
    if classes is not None:
        distinct = len(classes) >= 2 and len(set(classes)) == len(classes)
        require(distinct, "data.classes", "two or more labels, each once", classes)
