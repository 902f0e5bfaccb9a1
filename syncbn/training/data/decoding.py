"""Images that are decoded when they are asked for, and kept where there is room."""

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
from syncbn.training.distributed import world

log = logging.getLogger(__name__)

_ORIENTATION, _SIDEWAYS = 0x0112, 5  # EXIF's tag; from this value on height and width are exchanged
_SHARED_MEMORY = "/dev/shm"  # where torch keeps the tensors that processes share, on Linux


class Source(Protocol):
    """Encoded images by position; has to pickle, because worker processes read it too."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> Path | bytes:
        """A file, or a file's content."""

    def name(self, position: int) -> str:
        """What an error calls it."""


@dataclass(frozen=True)
class Files:
    """Files as a source; text takes less memory than `Path`s, and each worker has a copy."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> Path:
        """The file itself."""
        return Path(self.paths[position])

    def name(self, position: int) -> str:
        """Its path."""
        return self.paths[position]


@dataclass(frozen=True)
class Cache:
    """Decoded rows (N, ...) uint8 and whether each is there (N,) uint8; worker processes share them.

    Two processes that decode the same row write the same bytes, so nobody waits for anybody.
    """

    rows: Tensor
    filled: Tensor

    @classmethod
    def empty(cls, shape: Sequence[int], *, shared: bool) -> Cache:
        """Shared memory is reserved now, so that too little of it is known before training, not in the middle of it."""
        rows, filled = (torch.zeros(size, dtype=torch.uint8) for size in (tuple(shape), tuple(shape[:1])))
        return cls(rows.share_memory_(), filled.share_memory_()) if shared else cls(rows, filled)


@dataclass
class Decoded:
    """Rows of a split (see `data.Rows`) that are decoded when asked for, uint8.

    Images are turned as their EXIF data says, their shorter side is resized to `size` (bilinear, antialiased) and the
    centre is cut out: (channels, size, size). Masks are cut in the same way, but by the nearest pixel, and hold class
    numbers: (size, size).

    Raises:
        ConfigError: an image that cannot be read, by name.
    """

    source: Source
    size: int
    channels: int | None
    """3: RGB, 1: gray, None: a mask."""
    values: Sequence[int] | None = None
    """Masks: what each of the 256 values becomes, negative for a value that must not occur."""
    of: Source | None = None
    """Masks: their images, which have to be of the same size."""
    cache: Cache | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, channels, size, size) or, of masks, (N, size, size)."""
        channels = () if self.channels is None else (self.channels,)
        return (len(self.source), *channels, self.size, self.size)

    @property
    def num_bytes(self) -> int:
        """What all of it takes when it is decoded."""
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
            self.cache.filled[position] = 1  # after the row: whoever sees it finds the row complete
        return self.cache.rows[position]

    def _decode(self, position: int) -> Tensor:
        name = self.source.name(position)
        try:
            with _opened(self.source, position) as image:
                pixels = self._fit(ImageOps.exif_transpose(image), position)
        except ConfigError:
            raise
        except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
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
        if self.values is None:
            return values
        classes = np.array(self.values)[values]
        if (classes < 0).any():
            raise ValueError(
                f"a mask with the values {sorted(set(values[classes < 0].tolist()))}, which data.num_classes and"
                " data.ignore do not cover"
            )
        return classes.astype(np.uint8)


def _opened(source: Source, position: int) -> Image.Image:
    """An image whose pixels are not read yet."""
    content = source.read(position)
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _as_bytes(image: Image.Image) -> Image.Image:
    """16 bits per pixel as 8; Pillow's own conversion would cut everything above 255 off."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, which have no fixed range; save it with 8 or 16 bits")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _as_classes(image: Image.Image) -> Image.Image:
    """The numbers of a mask as they are stored: of a palette the indices and not the colours."""
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"a mask of mode {image.mode}; expected class numbers, as a palette or gray of 8 bits")
    return image if image.mode != "1" else Image.fromarray(np.asarray(image).astype(np.uint8))


def keep_decoded(parts: Iterable[Decoded], config: DecodedConfig) -> None:
    """Gives all parts a cache if together they fit into `config.cache`, else none of them."""
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
    """The share of one rank: each has a cache of its own."""
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size()))
    given, free = parse_bytes(limit), _free_bytes(shared)
    return (free // 4 if given is None else min(given, free)) // num_ranks


def _free_bytes(shared: bool) -> int:
    """Memory that is free on this machine, in this container, and (if `shared`) for sharing between processes."""
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = [int(fields["MemAvailable"].split()[0]) * 1024]
    else:  # not Linux: half of what there is
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    if (cgroup / "memory.max").exists() and (limit := (cgroup / "memory.max").read_text().strip()) != "max":
        free.append(max(0, int(limit) - int((cgroup / "memory.current").read_text())))
    if shared and os.path.isdir(_SHARED_MEMORY):
        free.append(shutil.disk_usage(_SHARED_MEMORY).free)
    return min(free)
