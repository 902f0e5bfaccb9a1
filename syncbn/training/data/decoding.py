"""Images and masks that are decoded on access, with an optional cache in memory."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from syncbn.training.config.errors import ConfigError, SampleError, one_line
from syncbn.training.config.loading import DecodedConfig, parse_bytes
from syncbn.training.data.dataset import Rows
from syncbn.training.data.masks import MaskValues
from syncbn.training.data.preparation import Preparation, channels_first, upright_size
from syncbn.training.distributed import world

log = logging.getLogger(__name__)

_FEW = 8  # images that `warn_of_lost_bits` looks at, about
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
class First:
    """The first images of another `Source`."""

    source: Source
    number: int

    def __len__(self) -> int:
        return self.number

    def read(self, position: int) -> Path | bytes:
        """See `Source`."""
        return self.source.read(position)

    def name(self, position: int) -> str:
        """See `Source`."""
        return self.source.name(position)


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

    Images are brought upright by their EXIF data and prepared (see `Preparation`): (channels, *size). Masks hold
    classes, (*size,), and are fitted in the same way, but by the nearest pixel; their padding is IGNORE.

    Raises:
        SampleError: on access, an image that cannot be read; the message names it.
    """

    source: Source
    preparation: Preparation
    values: MaskValues | None = None
    """The classes of the values that masks hold; None: the rows are images."""
    of: Source | None = None
    """The images of masks, whose height and width have to be those of the masks; None for images."""
    cache: Cache | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, channels, *size), or (N, *size) for masks; -1 stands for sizes that differ."""
        channels = () if self.values is not None else (self.preparation.channels,)
        return (len(self.source), *channels, *(self.preparation.size or (-1, -1)))

    @property
    def num_bytes(self) -> int:
        """Bytes that all rows take when decoded."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.source)

    def each(self, index: Tensor) -> Iterator[Tensor]:
        """The rows at the positions `index`, (N,) int64, one by one: their sizes may differ."""
        return map(self._row, index.tolist())

    def __getitem__(self, index: Tensor, /) -> Tensor:
        assert self.preparation.size is not None
        rows = torch.empty((len(index), *self.shape[1:]), dtype=torch.uint8)
        for row, position in zip(rows, index.tolist(), strict=True):
            row.copy_(self._row(position))
        return rows

    def whole(self, position: int) -> Tensor:
        """An image or mask in its own size, (channels, H, W) or (H, W) uint8; not cached."""
        return self._decode(position, lambda position: self._whole(self.upright(position), position))

    def upright(self, position: int) -> Image.Image:
        """The image or mask as its EXIF data turns it, decoded; Pillow's exceptions of many types if it is damaged."""
        with opened(self.source, position) as image:
            return ImageOps.exif_transpose(image)

    def fitted(self, image: Image.Image, position: int) -> Tensor:
        """The row at this position, whose image or mask `upright(position)` is; read anew where it is read reduced.

        Raises:
            ValueError: pixels or a mask that cannot be used.
        """
        self._require_same_size(image, position)
        if self.values is not None:
            return self.preparation.fitted_mask(as_classes(image), self.values.classes)
        return self.preparation.fitted(image) if self.preparation.decode == "full" else self._fitted_file(position)

    def _row(self, position: int) -> Tensor:
        if self.cache is None:
            return self._decode(position, self._fitted_file)
        if not self.cache.filled[position]:
            self.cache.rows[position] = self._decode(position, self._fitted_file)
            self.cache.filled[position] = 1  # after the row, so that a set flag implies a complete row
        return self.cache.rows[position]

    def _fitted_file(self, position: int) -> Tensor:
        if self.values is not None:
            return self.fitted(self.upright(position), position)
        with opened(self.source, position) as image:
            return self.preparation.fitted_file(image)

    def _decode(self, position: int, read: Callable[[int], Tensor]) -> Tensor:
        name = self.source.name(position)
        try:
            return read(position)
        except ConfigError:
            raise
        except Exception as error:  # on a damaged file Pillow's readers raise exceptions of many types
            raise SampleError(
                f"data.path: cannot read the image {name!r} ({one_line(error)}); repair it, or remove it"
            ) from None

    def _whole(self, image: Image.Image, position: int) -> Tensor:
        self._require_same_size(image, position)
        if self.values is None:
            return channels_first(np.array(self.preparation.whole(image)))
        return torch.from_numpy(self.values.classes(np.array(as_classes(image))))

    def _require_same_size(self, image: Image.Image, position: int) -> None:
        if self.of is None:
            return
        with opened(self.of, position) as other:
            height, width = upright_size(other)
        if image.size != (width, height):
            raise ValueError("a mask of {}x{} pixels for an image of {}x{}".format(*image.size, width, height))


def values_of(rows: Rows, index: Tensor) -> Tensor:
    """All values of the rows at these positions, flat."""
    if not isinstance(rows, Decoded):
        return rows[index].flatten()
    return torch.cat([torch.zeros(0, dtype=torch.uint8), *(row.flatten() for row in rows.each(index))])


def opened(source: Source, position: int) -> Image.Image:
    """Opens an image without reading its pixels yet."""
    content = source.read(position)
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def as_classes(image: Image.Image) -> Image.Image:
    """A mask whose pixels are the stored values, for a palette its indices instead of its colors.

    Raises:
        ValueError: a mode other than palette, gray of 8 bits, or 1 bit.
    """
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"a mask of mode {image.mode}; expected class numbers, as a palette or gray of 8 bits")
    return image if image.mode != "1" else Image.fromarray(np.asarray(image).astype(np.uint8))


def warn_of_lost_bits(images: Decoded) -> None:
    """Logs a warning if some of a few evenly spaced images have more than 8 bits, whose lower ones are not used."""
    low, high, num_deep = 2**16, 0, 0
    for position in range(0, len(images), max(1, len(images) // _FEW)):
        with suppress(Exception), opened(images.source, position) as image:  # who needs the image names the error
            if image.mode.startswith("I;16"):
                values = np.asarray(image)
                low, high, num_deep = min(low, int(values.min())), max(high, int(values.max())), num_deep + 1
    if num_deep:
        log.warning(
            "data.range: images have 16 bits, of which the upper 8 are used: values from %d to %d, as in %d of them,"
            " become %d gray levels; data.range=[0,%d] maps them to 256",
            low, high, num_deep, (high >> 8) - (low >> 8) + 1, 2 ** high.bit_length() - 1,
        )  # fmt: skip


def keep_decoded(parts: Iterable[Decoded], config: DecodedConfig) -> None:
    """Gives every part a cache if all of them together fit into `config.cache`; otherwise none gets one."""
    if config.height_and_width is None:
        return  # a cache has rows of one size
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
