"""Images and masks that are decoded on access, with an optional cache in memory."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from syncbn.training.config.data import DecodedConfig, parse_bytes
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.masks import MaskValues
from syncbn.training.distributed import world

log = logging.getLogger(__name__)

_ORIENTATION, _SIDEWAYS = 0x0112, 5  # EXIF's orientation tag; its values from 5 on exchange height and width
_SHARED_MEMORY = "/dev/shm"  # where torch keeps the tensors that processes share, on Linux


class Source(Protocol):
    """Protocol of a sequence of encoded images. Has to be picklable, because worker processes read it too."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> Path | bytes:
        """The path of an image file, or the content of one."""

    def name(self, position: int) -> str:
        """Name of the image in error messages."""


@dataclass(frozen=True)
class Files:
    """Image files as a `Source`. Paths are text, because each worker has a copy and `Path`s take more memory."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> Path:
        """The path of the file."""
        return Path(self.paths[position])

    def name(self, position: int) -> str:
        """The path of the file, as given."""
        return self.paths[position]


@dataclass(frozen=True)
class Cache:
    """Decoded rows, (N, ...) uint8, and flags, (N,) uint8, of the rows that are filled; workers may share both.

    It needs no lock: two processes that decode the same row write the same bytes.
    """

    rows: Tensor
    filled: Tensor

    @classmethod
    def empty(cls, shape: Sequence[int], *, shared: bool) -> Cache:
        """An empty cache.

        Args:
            shared: allocate shared memory, all of it now, so that a shortage shows before training, not during it.
        """
        rows, filled = (torch.zeros(size, dtype=torch.uint8) for size in (tuple(shape), tuple(shape[:1])))
        return cls(rows.share_memory_(), filled.share_memory_()) if shared else cls(rows, filled)


@dataclass
class Decoded:
    """Rows of a split (see `dataset.Rows`) that are decoded on access, uint8.

    Images are brought upright by their EXIF data, their shorter side is resized to `size` (bilinear, antialiased), and
    the center is cropped: (channels, size, size). Masks hold class numbers, (size, size), and are resized and cropped
    in the same way, but by the nearest pixel.

    Raises:
        ConfigError: on access, an image that cannot be read; the message names it.
    """

    source: Source
    size: int
    channels: int | None
    """3: RGB; 1: gray; None: the rows are masks."""
    values: MaskValues | None = None
    """For masks: the classes of the values that they hold."""
    of: Source | None = None
    """For masks: their images, whose height and width have to be the same."""
    cache: Cache | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, channels, size, size), or (N, size, size) for masks."""
        channels = () if self.channels is None else (self.channels,)
        return (len(self.source), *channels, self.size, self.size)

    @property
    def num_bytes(self) -> int:
        """Bytes that all rows take when decoded."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        rows = torch.empty((len(index), *self.shape[1:]), dtype=torch.uint8)
        for row, position in zip(rows, index.tolist(), strict=True):
            row.copy_(self._row(position))
        return rows

    def _row(self, position: int) -> Tensor:
        if self.cache is None:
            return self._decode(position)
        if not self.cache.filled[position]:
            self.cache.rows[position] = self._decode(position)
            self.cache.filled[position] = 1  # after the row, so that a set flag implies a complete row
        return self.cache.rows[position]

    def _decode(self, position: int) -> Tensor:
        name = self.source.name(position)
        try:
            with _opened(self.source, position) as image:
                pixels = self._fit(ImageOps.exif_transpose(image), position)
        except ConfigError:
            raise
        except Exception as error:  # on a damaged file Pillow's readers raise exceptions of many types
            raise ConfigError(
                f"data.path: cannot read the image {name!r} ({' '.join(str(error).split()) or type(error).__name__});"
                " repair it, or remove it"
            ) from None
        return torch.from_numpy(pixels if self.channels is None else _channels_first(pixels))

    def _fit(self, image: Image.Image, position: int) -> np.ndarray:
        if self.of is not None:
            with _opened(self.of, position) as other:
                size = other.size[::-1] if other.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS else other.size
            if image.size != size:
                raise ValueError("a mask of {}x{} pixels for an image of {}x{}".format(*image.size, *size))
        if self.channels is None:
            return self._classes(ImageOps.fit(_as_classes(image), (self.size, self.size), Image.Resampling.NEAREST))
        image = _as_bytes(image).convert("RGB" if self.channels == 3 else "L")
        return np.array(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR))

    def _classes(self, mask: Image.Image) -> np.ndarray:
        values = np.array(mask)
        return values if self.values is None else self.values.classes(values)


def _opened(source: Source, position: int) -> Image.Image:
    """Opens an image without reading its pixels yet."""
    content = source.read(position)
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _as_bytes(image: Image.Image) -> Image.Image:
    """Converts 16 bits per pixel to 8, and palettes with transparency to RGBA.

    16-bit values are divided by 256, because Pillow's own conversion clips at 255.

    Raises:
        ValueError: a mode without a fixed range of values ("I" or "F").
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, which have no fixed range; save it with 8 or 16 bits")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _as_classes(image: Image.Image) -> Image.Image:
    """A mask whose pixels are the stored class numbers, for a palette its indices instead of its colors.

    Raises:
        ValueError: a mode other than palette, gray of 8 bits, or 1 bit.
    """
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"a mask of mode {image.mode}; expected class numbers, as a palette or gray of 8 bits")
    return image if image.mode != "1" else Image.fromarray(np.asarray(image).astype(np.uint8))


def keep_decoded(parts: Iterable[Decoded], config: DecodedConfig) -> None:
    """Gives every part a cache if all of them together fit into `config.cache`; otherwise none gets one."""
    parts, shared = list(parts), config.workers > 0
    needed, allowed = sum(part.num_bytes for part in parts), _allowed_bytes(config.cache, shared)
    if allowed == 0:
        return
    if needed > allowed:
        log.info(
            "images are decoded anew each time: all of them would take %.1f GB, and data.cache=%s allows %.1f GB",
            needed / 1e9, config.cache, allowed / 1e9,
        )  # fmt: skip
        return
    for part in parts:
        part.cache = Cache.empty(part.shape, shared=shared)


def _allowed_bytes(limit: str, shared: bool) -> int:
    """Bytes that this rank may use for its cache; every rank on the machine has its own."""
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size()))
    given, free = parse_bytes(limit), _free_bytes(shared)
    return (free // 4 if given is None else min(given, free)) // num_ranks


def _free_bytes(shared: bool) -> int:
    """Free bytes: the least of the machine's memory, its container's (cgroup v2) and, if `shared`, of /dev/shm."""
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = [int(fields["MemAvailable"].split()[0]) * 1024]
    else:  # not Linux: half of the physical memory
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    if (cgroup / "memory.max").exists() and (limit := (cgroup / "memory.max").read_text().strip()) != "max":
        free.append(max(0, int(limit) - int((cgroup / "memory.current").read_text())))
    if shared and os.path.isdir(_SHARED_MEMORY):
        free.append(shutil.disk_usage(_SHARED_MEMORY).free)
    return min(free)
