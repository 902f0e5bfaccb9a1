"""How programs are laid out over an activation: tiles, grids, and over how many programs a channel is split."""

import math
from functools import lru_cache
from typing import NamedTuple

# Values of a tile: of a pass that sums, of one that writes, and of one that writes a small activation (of which large
# tiles are too few to keep all multiprocessors busy). Chosen by what fits into registers; nobody has timed them yet.
_SUM_TILE, _TILE, _SMALL_TILE = 2048, 2048, 512
# Warps of the programs that sum (float64 sums take two registers each), and of those that write.
_SUM_WARPS, WARPS = 8, 4
# The widest tile: in planes it runs along a plane; in rows over channels, few, so that it has rows to add up.
_WIDEST_PLANE, _WIDEST_ROW = 1024, 64
# Where small planes are written, most rows of a tile that has not few values anyway: each row brings a channel of its
# own, whose vectors take registers.
_MOST_PLANES = 16
# Programs that sum, for each multiprocessor; and tiles that are worth a program.
_PROGRAMS_PER_PROCESSOR, _TILES_PER_PROGRAM = 4, 4
# Of the programs that add up parts of sums: channels at a time, and numbers at a time.
COMBINED_CHANNELS, _COMBINED_NUMBERS = 8, 4096


class Layout(NamedTuple):
    """How a dense activation lies in memory: `planes` of `size` values for each channel, or (`last`) rows of channels.

    In rows, `planes` is their number and `size` that of the channels.
    """

    planes: int
    channels: int
    size: int
    last: bool


class _Sums(NamedTuple):
    """How the programs that sum are laid out."""

    grid: tuple[int, int]
    sizes: tuple[int, ...]  # num_channels, planes, units, tiles, tiles_across, tiles_per_split
    blocks: dict[str, int | bool]
    combine: dict[str, int]


class _Passes(NamedTuple):
    """How the programs that write are laid out."""

    grid: tuple[int]
    sizes: tuple[int, ...]  # num_channels, rows, units, tiles_across
    blocks: dict[str, int | bool]


@lru_cache(maxsize=4096)
def plan_sums(layout: Layout, itemsize: int, multiprocessors: int) -> _Sums:
    """Tiles of the programs that sum, and over how many of them a channel is split."""
    width, height = _block(layout, _SUM_TILE)
    height = min(height, _power_of_two(layout.planes))
    tiles_across = 1 if layout.last else ceil_div(layout.size, width)
    tiles = ceil_div(layout.planes, height) * tiles_across
    programs = ceil_div(layout.channels, width) if layout.last else layout.channels
    wanted = ceil_div(_PROGRAMS_PER_PROCESSOR * multiprocessors, programs)
    splits = max(1, min(wanted, tiles // _TILES_PER_PROGRAM))
    per_split = ceil_div(tiles, splits)
    splits = ceil_div(tiles, per_split)
    unit = _unit(layout.size, itemsize)
    options = {"num_warps": _SUM_WARPS, "enable_fp_fusion": False}
    at_a_time = min(_power_of_two(splits), _COMBINED_NUMBERS // COMBINED_CHANNELS)
    return _Sums(
        (programs, splits),
        (layout.channels, layout.planes, layout.size // unit, tiles, tiles_across, per_split),
        {**_common(layout, unit, height, width), "SINGLE_SPLIT": splits == 1, **options},
        {"BLOCK_SPLITS": at_a_time, "BLOCK_CHANNELS": COMBINED_CHANNELS, **options},
    )


@lru_cache(maxsize=4096)
def plan_passes(layout: Layout, itemsize: int, multiprocessors: int) -> _Passes:
    """Tiles of the programs that write."""
    rows = layout.planes if layout.last else layout.planes * layout.channels
    is_small = rows * layout.size < 4 * _TILE * multiprocessors
    width, height = _block(layout, _SMALL_TILE if is_small else _TILE)
    if not layout.last:
        height = min(height, max(_MOST_PLANES, _SMALL_TILE // width))
    tiles_across = ceil_div(layout.size, width)
    unit = _unit(layout.size, itemsize)
    return _Passes(
        (ceil_div(rows, height) * tiles_across,),
        (layout.channels, rows, layout.size // unit, tiles_across),
        {**_common(layout, unit, height, width), "num_warps": WARPS, "enable_fp_fusion": False},
    )


def _block(layout: Layout, tile: int) -> tuple[int, int]:
    """Columns and rows of a tile of so many values."""
    width = min(_power_of_two(layout.size), _WIDEST_ROW if layout.last else _WIDEST_PLANE, tile)
    return width, tile // width


def _common(layout: Layout, unit: int, height: int, width: int) -> dict[str, int | bool]:
    rows = layout.planes if layout.last else layout.planes * layout.channels
    # A tile may begin inside of the activation and end behind it.
    needs_wide = (rows + height) * (layout.size + width) >= 2**31
    return {
        "CHANNELS_LAST": layout.last,
        "UNIT": unit,
        "BLOCK_ROWS": height,
        "BLOCK_COLS": width,
        "INT64_OFFSETS": needs_wide,
    }


def _unit(size: int, itemsize: int) -> int:
    """The largest power of two that divides a row, up to the 16 bytes of the widest load."""
    return math.gcd(size, 16 // itemsize)


def _power_of_two(number: int) -> int:
    """The next one, not below the number."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
