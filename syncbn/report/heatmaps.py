"""Figures of layers: heatmaps of a quantity by layer and step, and histograms over channels at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    ColorBar,
    ColumnDataSource,
    CustomJSHover,
    HoverTool,
    LinearColorMapper,
    Range1d,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from numpy.typing import NDArray

from syncbn.report.drawing import WIDTH, Panel, color, finite_mean, hover_names, name_rows, plain, plot, steps_axis
from syncbn.report.metric_names import WEIGHT_ABS
from syncbn.report.records import Series
from syncbn.report.runs import Run

NUM_CELLS = 20_000  # cells of all heatmaps of one quantity together, to bound the size of the file
NUM_BINS = 30
_PER_ROW = 2  # plots in a row of a wide screen


def heatmap(
    runs: Sequence[Run],
    layers: Sequence[str],
    key: str,
    title: str,
    text: str,
    absent_text: str,
    unit: str,
    steps: Range1d,
) -> Panel:
    """A panel of one quantity by layer and step: a heatmap per run, all with the same color scale.

    Args:
        key: the quantity, as in the metric `bn/LAYER/KEY`.
        absent_text: what a run has to do to record it, for a panel without records.
    """
    most = max(20, min(400, NUM_CELLS // max(1, len(layers))) // len(runs))
    grids = [_grid(run, layers, key, most) for run in runs]
    values = np.concatenate([grid[1].ravel() for grid in grids if grid is not None] or [np.empty(0)])
    values = values[np.isfinite(values)]
    without = [run.label for run, grid in zip(runs, grids, strict=True) if grid is None]
    if not len(values):
        return Panel(title, f"No {title.lower()} was recorded (bn/LAYER/{key}). {absent_text}".rstrip())
    notes = [text]
    low, high = _colors_from_to(values, is_size=key != WEIGHT_ABS)
    if high < values.max():
        notes.append(f"Above {high:.3g} all colours are the same; the largest value is {values.max():.3g}.")
    if without:
        notes.append(f"Not recorded by {', '.join(without)}.")
    mapper = LinearColorMapper(palette=Cividis256, low=low, high=high, nan_color="#ffffff")
    present = [(run, grid) for run, grid in zip(runs, grids, strict=True) if grid is not None]
    if any(grid[2] for _, grid in present):
        notes.append("Where records are denser than the columns, a cell is the mean of its records.")
    names = list(reversed(layers))
    rows, hover_layer = Range1d(0, len(names)), hover_names(names)
    plots = []
    width = WIDTH // min(_PER_ROW, len(present))
    for run, ((start, end), cells, _) in present:
        drawn = plot(width, _height(len(names), 14), run.label if len(runs) > 1 else "", x_range=steps, y_range=rows)
        drawn.image([np.flipud(cells).astype(np.float32)], start, 0, end - start, len(names), color_mapper=mapper)
        drawn.grid.visible = False
        steps_axis(drawn)
        name_rows(drawn, names)
        every = (end - start) / cells.shape[1]
        code = f"return String(Math.round({start!r} + {every!r} * (Math.floor((value - {start!r}) / {every!r}) + 1)))"
        hover = HoverTool(formatters={"$y": hover_layer, "$x": CustomJSHover(code=code)}, visible=False)
        hover.tooltips = [("layer", "$y{custom}"), ("step", "$x{custom}"), (key, "@image{0.[0000]}")]
        drawn.add_tools(hover)
        bar = ColorBar(color_mapper=mapper, title=unit, width=12, padding=4, title_text_font_size="11px")
        bar.title_text_font_style, bar.major_label_text_font_size = "normal", "10px"
        bar.formatter = BasicTickFormatter(power_limit_low=-5)  # 0.006 and not 6.000e-3
        drawn.add_layout(bar, "right")
        plots.append(drawn)
    return Panel(title, " ".join(notes), plots)


def histograms(runs: Sequence[Run], layers: Sequence[str], kind: str, title: str, text: str) -> Panel:
    """A panel of histograms over the channels of each layer, a row per layer, for one kind of vector.

    One run is drawn as bars, with an outline for the last batch where it was recorded; several runs as outlines.
    """
    held = [
        {name: _scaled(vectors[kind], kind) for name, vectors in run.vectors.items() if kind in vectors} for run in runs
    ]
    everything = np.concatenate([vector for vectors in held for vector in vectors.values()] or [np.empty(0)])
    if not len(everything):
        return Panel(f"Histograms of {title}", "Not recorded, or not finite (layers.json).")
    batch_kind = kind.replace("running", "batch")
    batches: dict[str, NDArray[np.float64]] = {}
    if len(runs) == 1 and batch_kind != kind:
        batches = {name: _scaled(v[batch_kind], kind) for name, v in runs[0].vectors.items() if batch_kind in v}
    low, high = np.quantile(everything, [0.005, 0.995])
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, NUM_BINS + 1)
    names = list(reversed([name for name in layers if any(name in vectors for vectors in held)]))
    margin = 0.02 * (high - low)
    across, rows = Range1d(low - margin, high + margin), Range1d(0, len(names))
    height = _height(len(names), 18 if len(runs) == 1 else 26)
    drawn = plot(WIDTH // 2, height, x_range=across, y_range=rows)
    drawn.xaxis.axis_label = f"{title}, log10" if kind.endswith("var") else title
    name_rows(drawn, names)
    hover_layer = hover_names(names)
    if len(runs) == 1:
        _bars(drawn, names, held[0], edges, hover_layer)
        if batches:
            _outlines(drawn, names, batches, edges, "#D55E00", "last batch", hover_layer)
    else:
        for k, run in enumerate(runs):
            _outlines(drawn, names, held[k], edges, color(k), run.label, hover_layer)
    notes = [text, "Each row is scaled to its highest bar; the outermost bars hold what lies beyond the axis."]
    if len(runs) > 1:
        notes.append("Colours are those of the overview.")
    if batches:
        notes.append("Orange: the same of the last batch.")
    missing = [run.label for run, vectors in zip(runs, held, strict=True) if not vectors]
    if missing:
        notes.append(f"Not recorded by {', '.join(missing)}.")
    return Panel(f"Histograms of {title}", " ".join(notes), [drawn])


def _grid(
    run: Run, layers: Sequence[str], key: str, most: int
) -> tuple[tuple[float, float], NDArray[np.float64], bool] | None:
    """The records of one quantity in columns of equal width; None if there are none.

    A record stands for the steps since the record before it.

    Returns:
        The first and last step that the columns cover; values of shape (layers, columns), NaN where nothing finite was
        recorded; and whether any column is a mean of several records.
    """
    recorded = [run.by_layer.get(layer, {}).get(key, Series()) for layer in layers]
    tables = [series.points for series in recorded]
    steps = sorted({step for table in tables for step in table})
    if not steps:
        return None
    values = np.array([[table.get(step, math.nan) for step in steps] for table in tables])
    values[~np.isfinite(values)] = np.nan
    gaps = [after - before for before, after in pairwise(steps)] or [max(1, steps[0])]
    every: float = math.gcd(*gaps)
    start = steps[0] - max(every, min(gaps[0], steps[0]) // every * every)
    num_columns = round((steps[-1] - start) / every)
    if num_columns > most:
        every, num_columns = (steps[-1] - start) / most, most
    edges = start + every * np.arange(num_columns + 1)
    begins, ends = (np.searchsorted(steps, side, side="right") for side in (edges[:-1], edges[1:]))
    # A column without a record shows the next record, which stands for its steps too.
    columns = [
        finite_mean(values[:, begin : max(end, begin + 1)], axis=1)
        for begin, end in zip(np.minimum(begins, len(steps) - 1), ends, strict=True)
    ]
    return (
        (start, steps[-1]),
        np.stack(columns, axis=1),
        any(series.is_thinned for series in recorded) or bool((ends - begins > 1).any()),
    )


def _colors_from_to(values: NDArray[np.float64], *, is_size: bool) -> tuple[float, float]:
    """The ends of the color scale.

    The upper end is the largest value, but the 95th percentile where that is less than half of it: a few outliers must
    not give all other values the same color.

    Args:
        is_size: whether the scale starts at 0; else at the smallest value.
    """
    low = 0.0 if is_size else float(values.min())
    high, largest = float(np.quantile(values, 0.95)), float(values.max())
    high = largest if largest <= 2 * high or high <= low else high
    return low, high if high > low else low + (0.01 if is_size else 1.0)


def _height(num_rows: int, wanted: int) -> int:
    """Height of a plot in pixels, at least 60: `wanted` per row; beyond 50 rows less per row, but at least 6."""
    return max(60, min(num_rows * wanted, max(50 * wanted, num_rows * 6)))


def _scaled(vector: Sequence[float], kind: str) -> NDArray[np.float64]:
    values = np.asarray(vector, dtype=np.float64)
    return np.log10(np.maximum(values, 1e-12)) if kind.endswith("var") else values


def _counts(vector: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.histogram(np.clip(vector, edges[0], edges[-1]), edges)[0]


def _bars(
    drawn: figure,
    names: Sequence[str],
    vectors: dict[str, NDArray[np.float64]],
    edges: NDArray[np.float64],
    hover_layer: CustomJSHover,
) -> None:
    columns: dict[str, list[float]] = {"left": [], "right": [], "bottom": [], "top": [], "channels": []}
    for row, name in enumerate(names):
        counts = _counts(vectors[name], edges)
        for k in np.flatnonzero(counts):
            bar = (edges[k], edges[k + 1], row, row + 0.9 * counts[k] / counts.max(), counts[k])
            for column, value in zip(columns.values(), bar, strict=True):
                column.append(float(value))
    source = ColumnDataSource({key: np.array(column, dtype=np.float32) for key, column in columns.items()})
    bars = drawn.quad(
        "left", "right", "top", "bottom", source=source, color=color(0), line_color="white", line_width=0.5
    )
    hover = HoverTool(renderers=[bars], formatters={"$y": hover_layer}, visible=False)
    hover.tooltips = [("layer", "$y{custom}"), ("value", "@left{0.000} to @right{0.000}"), ("channels", "@channels{0}")]
    drawn.add_tools(hover)


def _outlines(
    drawn: figure,
    names: Sequence[str],
    vectors: dict[str, NDArray[np.float64]],
    edges: NDArray[np.float64],
    line_color: str,
    label: str,
    hover_layer: CustomJSHover,
) -> None:
    x: list[NDArray[np.float64]] = []
    y: list[NDArray[np.float64]] = []
    for row, name in enumerate(names):
        if name in vectors:
            counts = _counts(vectors[name], edges)
            x += [np.repeat(edges, 2), np.array([np.nan])]  # NaN ends the line before the next row
            y += [row + 0.9 * np.pad(np.repeat(counts / counts.max(), 2), 1), np.array([np.nan])]
    if not x:
        return
    source = ColumnDataSource({"x": np.concatenate(x).astype(np.float32), "y": np.concatenate(y).astype(np.float32)})
    line = drawn.line("x", "y", source=source, color=line_color, line_width=1.2)
    hover = HoverTool(renderers=[line], formatters={"$y": hover_layer}, visible=False)
    hover.tooltips = [("layer", "$y{custom}"), ("value", "$x{0.000}"), ("of", plain(label))]
    drawn.add_tools(hover)
