"""Offsets of the tiles that a program works on."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

# Sizes change from layer to layer; a program is compiled for types and block shapes alone.
SIZES = ["count", "num_channels", "planes", "units", "rows", "tiles", "tiles_across", "tiles_per_split", "splits"]


@triton.jit
def row_length(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        units = units.to(tl.int64)
    return units * UNIT


@triton.jit
def reduced_tile(tile, block, num_channels, planes, size, tiles_across, LAST: tl.constexpr, R: tl.constexpr,
                  W: tl.constexpr):  # fmt: skip
    """Offsets of one tile of a channel (`LAST`: of W channels), and which of them exist."""
    down, across = tl.arange(0, R)[:, None], tl.arange(0, W)[None, :]
    if LAST:
        n = tile * R + down
        column = block * W + across
        offset = n * size + column
    else:
        n = (tile // tiles_across) * R + down
        column = (tile % tiles_across) * W + across
        offset = (n * num_channels + block) * size + column
    return offset, (n < planes) & (column < size)


@triton.jit
def channels_of(block, LAST: tl.constexpr, W: tl.constexpr):
    """The channels of a program that reduces: W of them, or the one."""
    if LAST:
        channel = block * W + tl.arange(0, W)
    else:
        channel = block
    return channel


@triton.jit
def total_per_channel(values, LAST: tl.constexpr):
    """Of a tile, per channel."""
    if LAST:
        total = tl.sum(values, 0)
    else:
        total = tl.sum(tl.sum(values, 1), 0)
    return total


@triton.jit
def elementwise_tile(num_channels, rows, units, tiles_across, LAST: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
                      W: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Offsets of one tile of the whole activation, which of them exist, and the channels, (R, 1) or (1, W)."""
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    width = row_length(units, UNIT, WIDE)
    row = (tile // tiles_across) * R + tl.arange(0, R)[:, None]
    column = (tile % tiles_across) * W + tl.arange(0, W)[None, :]
    if LAST:
        channel = column
        known = column < width
    else:
        channel = row % num_channels
        known = row < rows
    return row * width + column, (row < rows) & (column < width), channel, known
