"""Offsets of the tiles that a program works on."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

# Sizes change from layer to layer; a program is compiled for types and block shapes alone.
SIZES = ["count", "num_channels", "planes", "units", "rows", "tiles", "tiles_across", "tiles_per_split", "splits"]


@triton.jit
def row_length(units, UNIT: tl.constexpr, INT64_OFFSETS: tl.constexpr):
    if INT64_OFFSETS:
        units = units.to(tl.int64)
    return units * UNIT


@triton.jit
def reduced_tile(
    tile, block, num_channels, planes, size, tiles_across, CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Offsets of one tile of a channel (`CHANNELS_LAST`: of BLOCK_COLS channels), and which of them exist."""
    down, across = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLS)[None, :]
    if CHANNELS_LAST:
        n = tile * BLOCK_ROWS + down
        column = block * BLOCK_COLS + across
        offset = n * size + column
    else:
        n = (tile // tiles_across) * BLOCK_ROWS + down
        column = (tile % tiles_across) * BLOCK_COLS + across
        offset = (n * num_channels + block) * size + column
    return offset, (n < planes) & (column < size)


@triton.jit
def channels_of(block, CHANNELS_LAST: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The channels of a program that reduces: BLOCK_COLS of them, or the one."""
    if CHANNELS_LAST:
        channel = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    else:
        channel = block
    return channel


@triton.jit
def total_per_channel(values, CHANNELS_LAST: tl.constexpr):
    """Of a tile, per channel."""
    if CHANNELS_LAST:
        total = tl.sum(values, 0)
    else:
        total = tl.sum(tl.sum(values, 1), 0)
    return total


@triton.jit
def elementwise_tile(
    num_channels, rows, units, tiles_across, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Offsets of one tile of the whole activation, which of them exist, and the channels, (BLOCK_ROWS, 1) or
    (1, BLOCK_COLS).
    """
    tile = tl.program_id(0)
    if INT64_OFFSETS:
        tile = tile.to(tl.int64)
    width = row_length(units, UNIT, INT64_OFFSETS)
    row = (tile // tiles_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tile % tiles_across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    if CHANNELS_LAST:
        channel = column
        known = column < width
    else:
        channel = row % num_channels
        known = row < rows
    return row * width + column, (row < rows) & (column < width), channel, known
