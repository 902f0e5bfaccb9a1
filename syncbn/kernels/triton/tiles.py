"""Memory offsets, masks and channels of the tiles that a Triton program works on."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

# Arguments that Triton must not specialize on: sizes change from layer to layer, and kernels are compiled per types and
# block shapes only.
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
    """Offsets of one tile of a channel (`CHANNELS_LAST`: of BLOCK_COLS channels), and the mask of those in bounds."""
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
    """The channels that a reducing program covers: BLOCK_COLS of them with `CHANNELS_LAST`, else the single one."""
    if CHANNELS_LAST:
        channel = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    else:
        channel = block
    return channel


@triton.jit
def accumulator(CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, FOLD: tl.constexpr):
    """Zeros in the shape of `folded` values, float64."""
    if CHANNELS_LAST:
        zeros = tl.zeros([BLOCK_ROWS // FOLD, BLOCK_COLS], tl.float64)
    else:
        zeros = tl.zeros([BLOCK_ROWS, BLOCK_COLS // FOLD], tl.float64)
    return zeros


@triton.jit
def folded(
    values, CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """Sums of `FOLD` values of a tile each, of one channel, and as a rule of one thread.

    A tile whose sums are kept takes fewer registers so, which leaves some for values on their way from memory.
    """
    if FOLD == 1:
        sums = values
    elif CHANNELS_LAST:
        sums = tl.sum(tl.reshape(values, [FOLD, BLOCK_ROWS // FOLD, BLOCK_COLS]), 0)
    else:
        sums = tl.sum(tl.reshape(values, [BLOCK_ROWS, BLOCK_COLS // FOLD, FOLD]), 2)
    return sums


@triton.jit
def total_per_channel(values, CHANNELS_LAST: tl.constexpr):
    """Sums the values of a tile per channel: (BLOCK_COLS,) with `CHANNELS_LAST`, else a scalar."""
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
    """Offsets of this program's tile of the whole activation, with masks and channels.

    Returns:
        offsets and the mask of those in bounds, both (BLOCK_ROWS, BLOCK_COLS); the channels and the mask of those that
        exist, both (BLOCK_ROWS, 1) or, with `CHANNELS_LAST`, (1, BLOCK_COLS).
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
