"""Launch plans of the Triton kernels: tile sizes, launch grids, and over how many programs a channel is split."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from syncbn.kernels.activations import ACTIVATIONS

# Tiles are as large as fits into registers.
_SUM_TILE = 2048  # values of a tile in a reduction
_TILE = 2048  # values of a tile in an elementwise kernel
_SMALL_TILE = 512  # the same on a small activation, of which larger tiles would be too few to keep the device busy
_THREAD_VALUES = 8  # values per thread of a small tile in a reduction

_FEW_TILES = 4  # in planes, a program of a reduction with no more tiles than these neither folds nor loads ahead
_FOLD = 4  # values that are added up before they are accumulated (see `tiles.folded`)
_STAGES = 3  # tiles that are on their way from memory at a time

# Warps per program.
_SUM_WARPS = 4  # of a reduction
_MANY_SUM_WARPS = 8  # of a reduction that needs more registers than those of 4 warps
_COMBINE_WARPS = 8  # of the kernels that combine partial sums
WARPS = 4  # of an elementwise kernel

# Most columns of a tile.
_WIDEST_PLANE = 1024  # in planes: positions of a plane
_WIDEST_ROW = 32  # in rows: channels, few of them, so that there are rows to sum
_WIDEST_SMALL_ROW = 16  # in rows of a small activation, which has few
_SMALL_ROWS = 2**23  # bytes up to which an activation in rows is small
# Most rows of a tile in an elementwise kernel over small planes, unless the tile has at most _SMALL_TILE values: each
# row has a channel of its own, whose per-channel values take registers.
_MOST_PLANES = 16

# How a reduction is split.
_PROGRAMS_PER_PROCESSOR = 4  # programs to aim at per multiprocessor
_TILES_PER_PROGRAM = 4  # the fewest tiles that are worth a program, in planes
_TILES_PER_ROWS_PROGRAM = 2  # the same in rows
_MOST_TILES_TWICE = 8  # most tiles of a channel that a program of `whole_channels` reads twice
# With this many channels, those of so few tiles are not split: there is a program for each multiprocessor, or nearly.
_UNSPLIT_CHANNELS = 128

# Of the kernels that combine partial sums.
_COMBINED_CHANNELS = 8  # channels per program
_COMBINED_NUMBERS = 4096  # values of a tile, splits times channels


class LaunchOptions(dict[str, Any]):
    """Constexprs and compile options of a kernel's launches, by name, for one layout (whose sizes never differ).

    Attributes:
        kernels: what `launch` has compiled for them.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.kernels: dict[tuple[Any, ...], Any] = {}


class Layout(NamedTuple):
    """Memory layout of a dense activation: planes (contiguous), or rows of channels (`last`; see `reductions`).

    In planes, each channel has `planes` planes (one per sample) of `size` values. In rows, `planes` is the number of
    rows and `size` their length, the number of channels.
    """

    planes: int
    channels: int
    size: int
    last: bool


class ReductionPlan(NamedTuple):
    """Launch plan of a reduction, and of the kernel that combines its partial sums (`combine`)."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # num_channels, planes, units, tiles, tiles_across, tiles_per_split
    moments: LaunchOptions
    partial_moments: LaunchOptions  # stores partial sums even where there is one split
    backward_sums: dict[str | None, LaunchOptions]  # by activation
    combine_grid: tuple[int, int, int]
    combine_moments: LaunchOptions
    combine_and_finish: LaunchOptions
    combine_backward_sums: LaunchOptions
    whole_channels: ChannelPlan | None


class ChannelPlan(NamedTuple):
    """Launch plan of the kernels of `whole_channels`, for activations that they are made for."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # num_channels, planes, units, tiles, tiles_across
    forward: dict[str | None, LaunchOptions]  # by activation
    backward: dict[str | None, LaunchOptions]


class ElementwisePlan(NamedTuple):
    """Launch plan of an elementwise kernel."""

    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # num_channels, rows, units, tiles_across
    backward_elementwise: LaunchOptions
    normalize: dict[str | None, LaunchOptions]  # by activation


@lru_cache(maxsize=4096)
def plan_sums(layout: Layout, itemsize: int, multiprocessors: int) -> ReductionPlan:
    """Plans a reduction: its tiles, and over how many programs (`grid[1]`) each channel is split."""
    width, height = _block(layout, _SUM_TILE, itemsize)
    height = min(height, _power_of_two(layout.planes))
    tiles_across = 1 if layout.last else ceil_div(layout.size, width)
    tiles = ceil_div(layout.planes, height) * tiles_across
    programs = ceil_div(layout.channels, width) if layout.last else layout.channels
    wanted = ceil_div(_PROGRAMS_PER_PROCESSOR * multiprocessors, programs)
    splits = max(1, min(wanted, tiles // (_TILES_PER_ROWS_PROGRAM if layout.last else _TILES_PER_PROGRAM)))
    if not layout.last and layout.channels >= _UNSPLIT_CHANNELS and tiles <= _MOST_TILES_TWICE:
        splits = 1
    per_split = ceil_div(tiles, splits)
    splits = ceil_div(tiles, per_split)
    unit = _unit(layout.size, itemsize)
    at_a_time = min(_power_of_two(splits), _COMBINED_NUMBERS // _COMBINED_CHANNELS)
    common = {
        **_common(layout, unit, height, width),
        **_fold_and_stages(layout, itemsize, unit, per_split, height if layout.last else width),
        "enable_fp_fusion": False,
    }
    few = max(1, height * width // (32 * _THREAD_VALUES))
    moments = {**common, "num_warps": min(few, _MANY_SUM_WARPS if itemsize == 8 else _SUM_WARPS)}
    # Loads of single values keep more addresses in registers.
    backward = {**common, "num_warps": min(few, _MANY_SUM_WARPS if itemsize == 8 or unit == 1 else _SUM_WARPS)}
    is_single = {"SINGLE_SPLIT": splits == 1}
    combine = {"BLOCK_SPLITS": at_a_time, "BLOCK_CHANNELS": _COMBINED_CHANNELS, "num_warps": _COMBINE_WARPS,
               "enable_fp_fusion": False}  # fmt: skip
    return ReductionPlan(
        (programs, splits, 1),
        (layout.channels, layout.planes, layout.size // unit, tiles, tiles_across, per_split),
        LaunchOptions({**moments, **is_single}),
        LaunchOptions({**moments, "SINGLE_SPLIT": False}),
        _with_activations({**backward, **is_single}),
        (ceil_div(layout.channels, _COMBINED_CHANNELS), 1, 1),
        LaunchOptions(combine),
        LaunchOptions(combine),
        LaunchOptions(combine),
        _plan_channels(layout, unit, tiles, tiles_across, moments, backward) if splits == 1 else None,
    )


def _plan_channels(
    layout: Layout, unit: int, tiles: int, tiles_across: int, moments: dict[str, Any], backward: dict[str, Any]
) -> ChannelPlan | None:
    """Plans the kernels of `whole_channels`, by the constants of those that they share their sums with."""
    if layout.last or tiles > _MOST_TILES_TWICE:
        return None
    sizes = (layout.channels, layout.planes, layout.size // unit, tiles, tiles_across)
    forward, backward = (
        {name: value for name, value in blocks.items() if name != "CHANNELS_LAST"} for blocks in (moments, backward)
    )
    return ChannelPlan((layout.channels, 1, 1), sizes, _with_activations(forward), _with_activations(backward))


@lru_cache(maxsize=4096)
def plan_passes(layout: Layout, itemsize: int, multiprocessors: int) -> ElementwisePlan:
    """Plans an elementwise kernel."""
    rows = layout.planes if layout.last else layout.planes * layout.channels
    is_small = rows * layout.size < 4 * _TILE * multiprocessors
    width, height = _block(layout, _SMALL_TILE if is_small else _TILE, itemsize)
    if not layout.last:
        height = min(height, max(_MOST_PLANES, _SMALL_TILE // width))
    tiles_across = ceil_div(layout.size, width)
    unit = _unit(layout.size, itemsize)
    blocks = {**_common(layout, unit, height, width), "num_warps": WARPS, "enable_fp_fusion": False}
    return ElementwisePlan(
        (ceil_div(rows, height) * tiles_across, 1, 1),
        (layout.channels, rows, layout.size // unit, tiles_across),
        LaunchOptions(blocks),
        _with_activations(blocks),
    )


def _fold_and_stages(layout: Layout, itemsize: int, unit: int, tiles: int, length: int) -> dict[str, int]:
    """FOLD and STAGES of a reduction, whose programs take `tiles` tiles each, of `length` values in a sum's direction.

    As measured: tiles on their way take memory of the multiprocessor, too much of it in float64; they are copied there
    at least 4 bytes at a time, and slowly so; and rows of half types have to be rearranged to be folded.
    """
    fold, stages = min(_FOLD, length), _STAGES
    if itemsize == 8:
        fold, stages = 1, 1
    elif unit * itemsize < 8:
        stages = 1
    elif not layout.last and tiles <= _FEW_TILES:
        fold, stages = 1, 1
    if layout.last and (itemsize < 4 or _is_small(layout, itemsize)):
        fold = 1
    return {"FOLD": fold, "STAGES": stages}


def _is_small(layout: Layout, itemsize: int) -> bool:
    """Whether an activation in rows has few of them."""
    return layout.planes * layout.size * itemsize <= _SMALL_ROWS


def _with_activations(blocks: dict[str, Any]) -> dict[str | None, LaunchOptions]:
    return {activation: LaunchOptions({"ACTIVATION": activation, **blocks}) for activation in (None, *ACTIVATIONS)}


def _block(layout: Layout, tile: int, itemsize: int) -> tuple[int, int]:
    """Columns and rows of a tile of `tile` values."""
    widest = _WIDEST_PLANE
    if layout.last:
        widest = _WIDEST_SMALL_ROW if _is_small(layout, itemsize) else _WIDEST_ROW
    width = min(_power_of_two(layout.size), widest, tile)
    return width, tile // width


def _common(layout: Layout, unit: int, height: int, width: int) -> dict[str, int | bool]:
    rows = layout.planes if layout.last else layout.planes * layout.channels
    # The last tile may extend past the end of the activation, so offsets can exceed its number of values.
    needs_wide = (rows + height) * (layout.size + width) >= 2**31
    return {
        "CHANNELS_LAST": layout.last,
        "UNIT": unit,
        "BLOCK_ROWS": height,
        "BLOCK_COLS": width,
        "INT64_OFFSETS": needs_wide,
    }


def _unit(size: int, itemsize: int) -> int:
    """The largest power of two that divides a row's length, at most the number of values in a 16-byte (widest) load."""
    return math.gcd(size, 16 // itemsize)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
