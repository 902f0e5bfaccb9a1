"""A generated data set for segmentation: colored shapes on a background, and masks that are partly ignored."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.training.config.data import ShapesConfig
from syncbn.training.data.dataset import IGNORE, Split
from syncbn.training.data.images import ImageData
from syncbn.training.data.randomness import mix_key

NAMES = ("background", "square", "disk", "triangle")
MAX_SHAPES = 4  # per image; the number is drawn from 1 to this


def make_shapes(config: ShapesConfig) -> ImageData:
    """Makes `data=shapes`: uint8 images (N, 3, size, size) and masks (N, size, size), split 80/10/10.

    A sample depends only on `data.seed` and its position. Colors are random, so that only the shape tells the class.
    In each mask a band of rows of random height is IGNORE, so that the number of pixels that count differs between
    samples, and thereby between ranks.
    """
    samples = [_sample(config, position) for position in range(config.num_samples)]
    images, masks = (torch.stack(parts) for parts in zip(*samples, strict=True))
    cuts = [config.num_samples * 8 // 10, config.num_samples * 9 // 10]
    parts = zip(images.tensor_split(cuts), masks.tensor_split(cuts), strict=True)
    train, val, test = (Split(*part) for part in parts)
    return ImageData(train, val, test, config.num_classes, config.shift, config.flip, NAMES[: config.num_classes])


def _sample(config: ShapesConfig, position: int) -> tuple[Tensor, Tensor]:
    size, generator = config.size, torch.Generator().manual_seed(mix_key(config.seed, position))

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def pick(low: int, high: int) -> int:  # low <= value < high
        return int(torch.randint(low, high, (), generator=generator))

    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = draw(0.0, 1.0, 3, 1, 1).expand(3, size, size)
    mask = torch.zeros(size, size, dtype=torch.uint8)
    for _ in range(pick(1, MAX_SHAPES + 1)):
        kind = pick(1, config.num_classes)
        centre_y, centre_x, radius = draw(0, size), draw(0, size), draw(size / 10, size / 4)
        inside = _inside(kind, rows - centre_y, columns - centre_x, radius)
        image = torch.where(inside, draw(0.0, 1.0, 3, 1, 1), image)
        mask[inside] = kind
    image = image + config.noise * torch.randn(3, size, size, generator=generator)
    height = pick(0, int(config.ragged * size) + 1)
    top = pick(0, size - height + 1)
    mask[top : top + height] = IGNORE
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), mask


def _inside(kind: int, y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Mask of the pixels inside a shape.

    Args:
        kind: index into NAMES, except the background.
        y, x: offsets of the pixels from the shape's center, (size, size), in pixels.
    """
    if NAMES[kind] == "square":
        return (y.abs() <= radius) & (x.abs() <= radius)
    if NAMES[kind] == "disk":
        return y.square() + x.square() <= radius.square()
    return (y.abs() <= radius) & (x.abs() <= (y + radius) / 2)  # a triangle with its tip at the top
