"""Images per second that one process decodes and prepares, beside Pillow alone and, where installed, torchvision.

python benchmarks/data.py [--images 64] [--turns 7]          a minute; no GPU

A worker of a rank does the same work in a process of its own, so the numbers are those of a worker with a core to
itself. All candidates take turns, and processor time counts, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded, Files
from syncbn.training.data.images import ImageData
from syncbn.training.data.loader import Loader
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16
# Kind of file: suffix, width and height, height and width of the result.
KINDS = {
    "JPEG 500x375 to 224": (".jpg", (500, 375), 224),
    "JPEG 1600x1200 to 224": (".jpg", (1600, 1200), 224),
    "PNG 256x256 to 224": (".png", (256, 256), 224),
}
Candidate = Callable[[], object]


def main() -> None:
    """Prints a table per kind of file."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--images", type=int, default=64)
    arguments.add_argument("--turns", type=int, default=7)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}, Python {version}; images per second of a core")
    for kind, (suffix, size, wanted) in KINDS.items():
        with tempfile.TemporaryDirectory() as name:
            paths = save_images(Path(name), given.images, suffix, size)
            print(f"\n{kind}\n\n| | images/s | to Pillow |\n|---|---|---|")
            report(candidates(paths, wanted), given.images, given.turns)


def save_images(root: Path, num: int, suffix: str, size: tuple[int, int]) -> list[str]:
    """Soft shapes with a little noise, about as compressible as photographs; in a directory of one class."""
    generator, paths = np.random.default_rng(0), []
    (root / "class").mkdir()
    for number in range(num):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        noisy = np.asarray(coarse, dtype=np.int16) + generator.integers(-6, 7, (size[1], size[0], 3), dtype=np.int16)
        path = root / f"class/{number}{suffix}"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, **({"quality": 90} if suffix == ".jpg" else {}))
        paths.append(str(path))
    return paths


def candidates(paths: list[str], size: int) -> dict[str, Candidate]:
    """What is timed, by name; each goes once through all files."""
    full, reduced = (Preparation((size, size), 3, decode=decode) for decode in ("full", "reduced"))
    index = torch.arange(len(paths))
    found: dict[str, Candidate] = {
        "Pillow alone": lambda: [by_pillow(path, size) for path in paths],
        "Pillow alone, again": lambda: [by_pillow(path, size) for path in paths],
        "ours, decoded": lambda: [Decoded(Files(paths), full)[part] for part in index.split(BATCH)],
        "ours, decoded, `data.decode=reduced`": lambda: [
            Decoded(Files(paths), reduced)[part] for part in index.split(BATCH)
        ],
        "Pillow, batches for training, by hand": lambda: batches_by_hand(paths, size),
        "ours, batches for training": lambda: batches(paths, full),
    }
    if find_spec("torchvision") is not None:
        found["torchvision's ImageFolder, batches for training"] = lambda: batches_of_torchvision(paths, size)
    return found


def report(timed: dict[str, Candidate], num: int, turns: int) -> None:
    """Rows of a table: the median of all turns, and that of the ratios to Pillow in the same turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(turns + 1):
        for name, candidate in timed.items():
            before = time.process_time()
            candidate()
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - before)
    of_pillow = seconds["Pillow alone"]
    for name, taken in seconds.items():
        ratio = median(base / own for base, own in zip(of_pillow, taken, strict=True))
        print(f"| {name} | {num / median(taken):.0f} | {ratio:.2f} |")


def by_pillow(path: str, size: int) -> Tensor:
    """As little as it takes: decoded, the centre cut out and resized, (C, H, W) uint8."""
    with Image.open(path) as image:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def batches_by_hand(paths: list[str], size: int) -> None:
    """Normalized batches as a loop of one's own makes them: mirrored or not, to float, stacked."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for first in range(0, len(paths), BATCH):
        images = []
        for path in paths[first : first + BATCH]:
            image = by_pillow(path, size)
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            images.append((image.to(torch.float32) / 255 - mean) / std)
        torch.stack(images)


def batches(paths: list[str], prepared: Preparation) -> None:
    """Batches of an epoch as a run gets them, shifted, mirrored and normalized."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[None, :, None, None] for values in (MEAN, STD))
    split = Split(Decoded(Files(paths), prepared), torch.zeros(len(paths), dtype=torch.int64))
    data = ImageData(split, split, None, 2, 4, True, mean=mean, std=std, preparation=prepared)
    context = RankContext(0, 1, torch.device("cpu"), torch.float32)
    sampler = Sampler(len(paths), BATCH, 1, 0, 0, 1)
    with Loader(data, context) as loader:
        for step in range(sampler.steps_per_epoch):
            list(loader.micro_batches(sampler, 0, step))


def batches_of_torchvision(paths: list[str], size: int) -> None:
    """The same by ImageFolder and a DataLoader."""
    from torchvision import datasets, transforms

    chain = [transforms.Resize(size), transforms.CenterCrop(size), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize(MEAN, STD)]  # fmt: skip
    folder = datasets.ImageFolder(str(Path(paths[0]).parents[1]), transforms.Compose(chain))
    for _ in torch.utils.data.DataLoader(folder, BATCH, shuffle=True):
        pass


if __name__ == "__main__":
    main()
