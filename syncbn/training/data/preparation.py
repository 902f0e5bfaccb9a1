"""How an image becomes pixels of the size that a model takes, and how pixels are normalized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from syncbn.training.config.loading import NATIVE, DecodedConfig
from syncbn.training.data.dataset import IGNORE

_ORIENTATION, _SIDEWAYS = 0x0112, 5  # EXIF's orientation tag; its values from 5 on exchange height and width


class Placement(NamedTuple):
    """Which part of an image is used, and where in the result it comes to lie."""

    source: tuple[float, float, float, float]
    """Left, top, right and bottom of the part that is used, in pixels of the image."""
    target: tuple[int, int, int, int]
    """Left, top, right and bottom of where it lies, in pixels of the result; around it is padding."""


def placement(fit: str, image: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Where an image of a height and width lies in a result of `size`, (height, width).

    Args:
        fit: "crop": the image covers the result, what stands out is cut off on both sides; "pad": it lies in the middle
            of the result, and padding around it; "stretch": height and width are resized each by itself.
    """
    (height, width), (to_height, to_width) = image, size
    source, target = (0.0, 0.0, float(width), float(height)), (0, 0, to_width, to_height)
    if fit == "crop":
        ratio, wanted = width / height, to_width / to_height
        used_width = wanted * height if ratio > wanted else width
        used_height = width / wanted if ratio < wanted else height
        left, top = (width - used_width) * 0.5, (height - used_height) * 0.5
        source = (left, top, left + used_width, top + used_height)
    elif fit == "pad":
        scale = min(to_height / height, to_width / width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
        left, top = (to_width - inner_width) // 2, (to_height - inner_height) // 2
        target = (left, top, left + inner_width, top + inner_height)
    return Placement(source, target)


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes an array of pixels for a model; a checkpoint stores it."""

    size: tuple[int, int] | None
    """Height and width; None: those of the file."""
    channels: int
    """3: RGB; 1: gray."""
    fit: str = "crop"
    """See `placement`."""
    range: tuple[float, float] | None = None
    """Values of an image of more than 8 bits that become 0 and 255; None: the upper 8 of 16 bits."""
    decode: str = "full"
    """ "reduced": JPEG files are decoded at a half, a quarter or an eighth of their size, see `fitted_file`."""

    @classmethod
    def of(cls, config: DecodedConfig) -> Preparation:
        """The preparation that the configuration of a data set of encoded images asks for."""
        limits = None if config.range is None else (config.range[0], config.range[1])
        return cls(config.height_and_width, config.channels, config.fit, limits, config.decode)

    def description(self) -> dict[str, Any]:
        """The settings as plain containers."""
        limits = None if self.range is None else list(self.range)
        size = NATIVE if self.size is None else list(self.size)
        described = {"size": size, "channels": self.channels, "fit": self.fit, "range": limits}
        return described if self.decode == "full" else {**described, "decode": self.decode}

    def whole(self, image: Image.Image) -> Image.Image:
        """The image in its own size, as RGB or gray of 8 bits; itself if it is that already.

        Raises:
            ValueError: a mode without a fixed range of values ("I" or "F") where no `range` is given.
        """
        image, mode = self._as_bytes(image), "RGB" if self.channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)

    def fitted(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """The image in the size that the model takes, (channels, *size) uint8; padding is 0.

        Args:
            size: height and width of the file, if the image has been reduced.

        Raises:
            ValueError: see `whole`.
        """
        return channels_first(self._resized(self.whole(image), of_file=size))

    def fitted_file(self, image: Image.Image) -> Tensor:
        """An opened file, not decoded yet, upright and fitted.

        With `decode="reduced"` a JPEG file is decoded at the smallest of its half, quarter and eighth in which the part
        that is used has at least twice the height and width of the result; the resizing does the rest.
        """
        size = upright_size(image)
        if self.decode == "reduced":
            (left, top, right, bottom), (at_left, at_top, at_right, at_bottom) = placement(
                self.fit, size, self.size or size
            )
            ratio = min((right - left) / (at_right - at_left), (bottom - top) / (at_bottom - at_top))
            factor = next((factor for factor in (8, 4, 2) if ratio >= 2 * factor), 1)
            if factor > 1:  # other formats than JPEG take no notice
                image.draft(None, (image.width // factor, image.height // factor))
        ImageOps.exif_transpose(image, in_place=True)  # which copies no image that is upright already
        return self.fitted(image, size)

    def fitted_mask(self, image: Image.Image, convert: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Tensor:
        """A mask in the size that the model takes, (*size,) uint8, by the nearest pixel; padding is IGNORE.

        Args:
            convert: from the values of the image to classes.
        """
        return torch.from_numpy(self._resized(image, Image.Resampling.NEAREST, IGNORE, convert))

    def _resized(
        self,
        image: Image.Image,
        resampling: Image.Resampling = Image.Resampling.BILINEAR,  # antialiased in Pillow
        padding: int = 0,
        convert: Callable[[np.ndarray], np.ndarray] = np.asarray,
        of_file: tuple[int, int] | None = None,
    ) -> np.ndarray:
        size = of_file or (image.height, image.width)
        wanted = self.size or size
        source, (left, top, right, bottom) = placement(self.fit, size, wanted)
        # The eighth of 801 pixels has 101, the last of which stands for a single one of them.
        factor = next(factor for factor in (1, 2, 4, 8) if -(-size[1] // factor) == image.width)
        source = (source[0] / factor, source[1] / factor, source[2] / factor, source[3] / factor)
        inner = convert(np.array(image.resize((right - left, bottom - top), resampling, box=source)))
        if inner.shape[:2] == wanted:
            return inner
        outer = np.full((*wanted, *inner.shape[2:]), padding, dtype=inner.dtype)
        outer[top:bottom, left:right] = inner
        return outer

    def fitted_pixels(self, pixels: Tensor) -> Tensor:
        """What `fitted` does, for pixels in memory: (C, H, W) uint8 or float32 to (C, *size) of the same type."""
        if self.size is None or pixels.shape[1:] == self.size:
            return pixels
        return torch.stack([torch.from_numpy(self._resized(Image.fromarray(channel.numpy()))) for channel in pixels])

    def fitted_classes(self, classes: Tensor) -> Tensor:
        """What `fitted_mask` does, for a mask of classes in memory, (H, W) uint8."""
        as_is = self.size is None or classes.shape == self.size
        return classes if as_is else self.fitted_mask(Image.fromarray(classes.numpy()))

    def _as_bytes(self, image: Image.Image) -> Image.Image:
        """Converts more than 8 bits per pixel to 8, and palettes with transparency to RGBA.

        Without a range, 16-bit values are divided by 256, because Pillow's own conversion clips at 255.
        """
        if is_deep(image.mode):
            values = np.asarray(image)
            if self.range is not None:
                low, high = self.range
                scaled = (values.astype(np.float64) - low) * (255 / (high - low))
                return Image.fromarray(np.rint(np.nan_to_num(scaled).clip(0, 255)).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"pixels of mode {image.mode}, which have no fixed range; save it with 8 or 16 bits, or give"
                    " data.range=[low,high]"
                )
            return Image.fromarray((values >> 8).astype(np.uint8))
        return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image, once it is turned as its EXIF data says."""
    sideways = image.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def is_deep(mode: str) -> bool:
    """Whether images of this mode of Pillow's have more than 8 bits per value."""
    return mode.startswith("I;16") or mode in ("I", "F")


def channels_first(pixels: np.ndarray) -> Tensor:
    """An image as Pillow has it, (H, W) or (H, W, C), as a tensor (C, H, W)."""
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def normalized(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Images (N, C, H, W), scaled to [0, 1] if they are uint8, minus mean over std, which are (1, C, 1, 1)."""
    mean, std = mean.to(dtype), std.to(dtype)
    if images.dtype != torch.uint8:
        return (images.to(dtype) - mean).div_(std)
    # In place, because memory for a batch costs more than its arithmetic.
    return images.to(dtype).div_(255).sub_(mean).div_(std)
