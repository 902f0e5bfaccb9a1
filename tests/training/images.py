"""Small image files for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_image(path: Path, seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB", **options) -> Path:
    """An image of random pixels, `size` being its width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def save_classes(root: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    """A directory per class with so many images, no two alike."""
    seed = 0
    for name, num in classes.items():
        for number in range(num):
            seed += 1
            save_image(root / name / f"{number:03}{suffix}", seed)
    return root


def save_masks(root: Path, num: int = 4, values: tuple[int, ...] = (0, 1, 2, 255)) -> Path:
    """train, val and test with images and masks of these values."""
    for split in ("train", "val", "test"):
        for number in range(num):
            save_image(root / split / "images" / f"{number}.jpg", number)
            mask = np.random.default_rng(number).choice(np.array(values, dtype=np.uint8), (16, 20))
            path = root / split / "masks" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root
