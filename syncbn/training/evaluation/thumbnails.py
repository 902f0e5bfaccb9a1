"""Small pictures of samples, as PNG in base64."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from syncbn.training.data.dataset import IGNORE

LARGEST = 96  # pixels of the longer side; what is smaller keeps its size
# Of the classes of masks: black for 0, then Okabe and Ito's colors; gray for what does not count.
_COLORS = ((0, 0, 0), (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
           (240, 228, 66))  # fmt: skip
_GRAY = (128, 128, 128)


def draw_image(image: Tensor, mean: Tensor, std: Tensor) -> str | None:
    """An image as the model was given it, (C, H, W), its normalization undone; None for what is no image.

    One channel or two are drawn as gray, from three on the first three as red, green and blue. Values beyond 0 to 1 are
    scaled, so that the smallest is black and the largest white.
    """
    if image.dim() != 3 or not image.isfinite().all():
        return None
    pixels = image.cpu().double() * std[0] + mean[0]
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    low, high = float(pixels.min()), float(pixels.max())
    if low < -0.01 or high > 1.01:
        pixels = (pixels - low) / max(high - low, 1e-12)
    if max(pixels.shape[1:]) > LARGEST:
        pixels = F.interpolate(pixels[None], _size(pixels), mode="area")[0]
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return _png(Image.fromarray((levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).contiguous().numpy()))


def draw_mask(classes: Tensor) -> str | None:
    """A mask of classes, (H, W); None for what is no mask of two dimensions."""
    if classes.dim() != 2:
        return None
    values = classes.cpu()
    if max(values.shape) > LARGEST:
        values = F.interpolate(values[None, None].double(), _size(values), mode="nearest-exact")[0, 0]
    picture = Image.fromarray(values.to(torch.int64).clamp(0, IGNORE).to(torch.uint8).numpy())
    picture.putpalette([level for color in (*map(_color, range(IGNORE)), _GRAY) for level in color])
    return _png(picture)


def colors_of(num_classes: int) -> list[str]:
    """The colors that masks of so many classes are drawn in, as #rrggbb."""
    return ["#" + "".join(f"{level:02x}" for level in _color(number)) for number in range(num_classes)]


def _color(number: int) -> tuple[int, int, int]:
    return _COLORS[number if number < 1 else 1 + (number - 1) % (len(_COLORS) - 1)]


def _size(pixels: Tensor) -> tuple[int, int]:
    height, width = pixels.shape[-2:]
    scale = LARGEST / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _png(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode("ascii")
