"""The schemas of the data sets; part of `config`, and like it free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from syncbn.training.config.errors import require

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}


@dataclass(kw_only=True)
class LoadingConfig:
    """What every data set has: how batches are augmented and who prepares them."""

    shift: int
    """Random shift in pixels."""
    flip: bool
    """Random mirroring."""
    workers: int = 0
    """Processes per rank that prepare batches ahead; 0: the training process prepares each when it needs it."""
    prefetch: int = 2
    """Batches that each of them keeps ready."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, "data.shift", "a number of pixels, 0 or more", self.shift)
        require(self.workers >= 0, "data.workers", "a number of processes, 0 or more", self.workers)
        require(self.prefetch >= 1, "data.prefetch", "1 batch or more", self.prefetch)


@dataclass
class DigitsConfig(LoadingConfig):
    """scikit-learn's digits."""

    name: str
    classes: list[int] | None
    """Labels to keep, renumbered from 0; None for all."""

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
    """Train on the first so many samples; None for all 55,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train_samples is None or self.train_samples > 0, "data.train_samples", "null or 1 or more",
                self.train_samples)  # fmt: skip
        _check_classes(self.classes)


@dataclass
class SyntheticConfig(LoadingConfig):
    """A pattern per class plus noise."""

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
class DecodedConfig(LoadingConfig):
    """What data sets have whose images are files or encoded."""

    path: str
    """Directory."""
    size: int
    """Height and width that every image is brought to: its shorter side is resized, and the centre cut out."""
    channels: int
    """3: RGB; 1: gray."""
    cache: str
    """Keep decoded images in memory: "auto" up to a quarter of what is free, a size such as 2GB, or 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.size >= 1, "data.size", "1 pixel or more", self.size)
        require(self.channels in (1, 3), "data.channels", "3 (RGB) or 1 (gray)", self.channels)
        require(self.cache == "auto" or parse_bytes(self.cache) is not None, "data.cache",
                "auto, 0, or a size such as 500MB or 2GB", self.cache)  # fmt: skip


@dataclass(kw_only=True)
class ImageFolderConfig(DecodedConfig):
    """A directory of images per class."""

    name: str


@dataclass(kw_only=True)
class HfConfig(DecodedConfig):
    """A data set of Hugging Face's library, saved to disk."""

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
    """Images and masks of equal names."""

    name: str
    num_classes: int
    ignore: int | None
    """Value of a mask that is left out of loss and metrics; None: every pixel counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.num_classes <= 255, "data.num_classes", "2 to 255", self.num_classes)
        valid = self.ignore is None or 0 <= self.ignore <= 255
        require(valid, "data.ignore", "null or a value between 0 and 255", self.ignore)


@dataclass(kw_only=True)
class ShapesConfig(LoadingConfig):
    """Coloured shapes and their masks."""

    name: str
    num_samples: int
    num_classes: int
    """Background, and so many kinds of shapes less one."""
    size: int
    noise: float
    ragged: float
    """The largest share of a mask's rows that is ignored."""
    seed: int
    """Another seed, other images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_samples >= 10, "data.num_samples", "10 or more", self.num_samples)
        require(2 <= self.num_classes <= 4, "data.num_classes", "2 to 4: background, squares, disks, triangles",
                self.num_classes)  # fmt: skip
        require(self.size >= 8, "data.size", "8 pixels or more", self.size)
        require(self.noise >= 0, "data.noise", "0 or more", self.noise)
        require(0 <= self.ragged <= 1, "data.ragged", "a share between 0 and 1", self.ragged)


class OpenData(dict[str, Any]):
    """A data set of the user's own: `_target_`, its arguments, and how its batches are prepared."""

    def __init__(self, node: dict[str, Any]) -> None:
        super().__init__(node)
        for key, least in (("workers", 0), ("prefetch", 1)):
            value = getattr(self, key)
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(is_number, f"data.{key}", f"a number, {least} or more", value)

    @property
    def name(self) -> str:
        """What is built."""
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
    def arguments(self) -> dict[str, Any]:
        """`_target_` and its arguments alone."""
        return {key: value for key, value in self.items() if key not in ("workers", "prefetch")}


DataConfig = (
    DigitsConfig
    | FashionMnistConfig
    | SyntheticConfig
    | ImageFolderConfig
    | MaskFolderConfig
    | ShapesConfig
    | HfConfig
    | OpenData
)


def parse_bytes(text: str) -> int | None:
    """A size such as 500MB or 2GB in bytes (powers of 1000); None for what is no size."""
    found = _SIZE.fullmatch(text.strip())
    return None if found is None else int(float(found[1]) * 10 ** _POWERS[found[2].upper()])


def _check_classes(classes: list[int] | None) -> None:
    if classes is not None:
        distinct = len(classes) >= 2 and len(set(classes)) == len(classes)
        require(distinct, "data.classes", "two or more labels, each once", classes)
