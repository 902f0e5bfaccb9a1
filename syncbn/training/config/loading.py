"""Settings that data sets share: loading and augmentation, and how encoded images are decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from syncbn.training.config.errors import ConfigError, require, require_choice

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
FITS = ("crop", "pad", "stretch")
DECODINGS = ("full", "reduced")
NATIVE = "native"
SAMPLERS = ("shuffled", "balanced")
_POWERS = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}


@dataclass(kw_only=True)
class LoadingConfig:
    """Settings that the named data sets share: augmentation, and the processes that prepare batches."""

    shift: int
    """Largest random shift, in pixels, up, down, left and right."""
    flip: bool
    """Mirror images left to right, at random, half of the time."""
    workers: int = 0
    """Worker processes per rank that prepare batches ahead; 0: the training process prepares each when it needs it."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""
    mean: Any = "auto"
    """Mean by which pixels from 0 to 1 are normalized: "auto" (of the training images), "imagenet", a number or one per
    channel, or "init.<name>" (by which the network in that file was trained).
    """
    std: Any = "auto"
    """Standard deviation by which they are normalized; as `mean`."""
    sampler: str = "shuffled"
    """Samples of an epoch: "shuffled" (each once) or "balanced" (as many draws, equally many of each class)."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Transforms of whole training images by name, `_target_` and arguments each; they replace `shift` and `flip`."""

    def __post_init__(self) -> None:
        self.augment = {name: node for name, node in self.augment.items() if node is not None}
        for name, node in self.augment.items():
            if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
                key = f"data.augment.{name}._target_"
                raise ConfigError(f"{key}: required; give a transform, {key}=torchvision.transforms.v2.RandomRotation")
        for key, value in (("data.mean", self.mean), ("data.std", self.std)):
            _check_statistic(key, value)
        require_choice("data.sampler", self.sampler, SAMPLERS)
        require(self.shift >= 0, "data.shift", "a number of pixels, 0 or more", self.shift)
        require(self.workers >= 0, "data.workers", "a number of processes, 0 or more", self.workers)
        require(self.prefetch >= 1, "data.prefetch", "1 batch or more", self.prefetch)


@dataclass(kw_only=True)
class DecodedConfig(LoadingConfig):
    """Settings that data sets of encoded images (files or bytes) share."""

    path: str
    """Directory of the data set."""
    size: Any
    """Height and width of every image, in pixels: a number, or [height, width]; for masks also "native": its own."""
    channels: int
    """3: RGB; 1: gray."""
    fit: str = "crop"
    """How images of other shapes get this size: "crop" (resized to cover it, the center cut out), "pad" (resized to lie
    in it, the rest padded) or "stretch" (height and width resized each by itself).
    """
    decode: str = "full"
    """JPEG files: "full", or "reduced" (at a half, a quarter or an eighth of their size, if twice `size` is left)."""
    range: list[float] | None = None
    """Values of images of more than 8 bits that become black and white; None: the upper 8 of 16 bits are used."""
    cache: str
    """Memory for keeping decoded images: "auto" (a quarter of the free memory), a size such as 2GB, or 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.size if isinstance(self.size, list) else [self.size]
        if self.size == NATIVE:
            self._check_native()
            sizes = [1]
        valid = len(sizes) == (2 if isinstance(self.size, list) else 1) and all(_is_count(size) for size in sizes)
        require(valid, "data.size", "1 pixel or more, or [height, width]", self.size)
        require_choice("data.fit", self.fit, FITS)
        require_choice("data.decode", self.decode, DECODINGS)
        limits = self.range
        valid = limits is None or (len(limits) == 2 and all(map(isfinite, limits)) and limits[0] < limits[1])
        require(valid, "data.range", "null or [low, high], the lower one first", limits)
        require(self.channels in (1, 3), "data.channels", "3 (RGB) or 1 (gray)", self.channels)
        require(self.cache == "auto" or parse_bytes(self.cache) is not None, "data.cache",
                "auto, 0, or a size such as 500MB or 2GB", self.cache)  # fmt: skip

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """Both of `size`; None: each image has its own."""
        if self.size == NATIVE:
            return None
        height, width = self.size if isinstance(self.size, list) else (self.size, self.size)
        return height, width

    @property
    def has_masks(self) -> bool:
        """Whether the targets are masks."""
        return False

    def _check_native(self) -> None:
        require(self.has_masks, "data.size", "1 pixel or more, or [height, width]; native is for masks", self.size)
        for key, value, only in (("fit", self.fit, ("crop",)), ("decode", self.decode, ("full",)),
                                 ("cache", self.cache, ("auto", "0"))):  # fmt: skip
            require(value in only, f"data.{key}",
                    f"{' or '.join(only)} with data.size=native, which resizes and keeps no image", value)  # fmt: skip


def parse_bytes(text: str) -> int | None:
    """Parses a size such as 500MB or 2GB into bytes (powers of 1000); None if the text is no size."""
    found = _SIZE.fullmatch(text.strip())
    return None if found is None else int(float(found[1]) * 10 ** _POWERS[found[2].upper()])


def _check_statistic(key: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    is_positive = all(
        isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number)
        and (number > 0 or key == "data.mean") for number in numbers
    )  # fmt: skip
    is_name = isinstance(value, str) and (value in ("auto", "imagenet") or value.startswith("init."))
    require(is_name or (bool(numbers) and is_positive), key,
            "auto, imagenet, init.<name>, or numbers, one per channel" + ("" if key == "data.mean" else ", above 0"),
            value)  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
