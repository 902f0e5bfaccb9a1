"""Figures of the report: Bokeh plots with a title and a text that says what a healthy run looks like."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    BoxZoomTool,
    ColumnDataSource,
    CustomJSHover,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    Range1d,
    ResetTool,
    SaveTool,
)
from bokeh.plotting import figure
from numpy.typing import NDArray

from syncbn.report.records import MOST, Series
from syncbn.report.runs import Run, shorten, shorten_name

WIDTH = 1280  # pixels of one row of plots on a wide screen
MIN_WIDTH = 320
# Okabe and Ito's palette, without its yellow, which is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("solid", [6, 3])  # of the first metric in a plot, and of further ones
_INK, _GRID = "#333333", "#e4e4e4"


@dataclass(frozen=True)
class Panel:
    """A figure of the report: title, text and plots. Without plots the text says what was not recorded."""

    title: str
    text: str
    plots: Sequence[figure] = field(default_factory=list)


def color(index: int) -> str:
    """The color of the run with this index, the same in the whole report."""
    return COLORS[index % len(COLORS)]


def plain(text: str, length: int = 60) -> str:
    """Text from a file, shortened, in which Bokeh finds no TeX (it would have to load a script to draw that)."""
    return re.sub(r"\$\$|\\[\[(]", lambda found: " ".join(found[0]), shorten(text, length))


def plot(width: int, height: int, title: str = "", **options: object) -> figure:
    """An empty plot in the style of the report.

    Args:
        width: of the plot on a wide screen; it takes the width of its place on the page.
        height: of the frame, without axes.
    """
    drawn = figure(
        sizing_mode="stretch_width",
        width=width,
        min_width=MIN_WIDTH,
        frame_height=height,
        title=plain(title, width // 8),
        tools=[BoxZoomTool(), ResetTool(), SaveTool()],
        toolbar_location="above",
        min_border=4,
        min_border_right=18,  # half of the last step's label
        outline_line_color=None,
        **options,
    )
    drawn.toolbar.logo = None
    drawn.toolbar.autohide = True
    drawn.grid.grid_line_color = _GRID
    drawn.axis.axis_line_color = drawn.axis.major_tick_line_color = _INK
    drawn.axis.minor_tick_line_color = None
    drawn.axis.axis_label_text_font_style = "normal"
    drawn.axis.major_label_text_color = drawn.axis.axis_label_text_color = drawn.title.text_color = _INK
    drawn.title.text_font_size = "12px"
    drawn.title.visible = bool(title)
    return drawn


def name_rows(drawn: figure, names: Sequence[str]) -> None:
    """Labels row k, from y = k to k + 1, with the k-th name; with many rows only every n-th, for lack of room."""
    every = max(1, math.ceil(len(names) * 10 / (drawn.frame_height or 1)))
    drawn.yaxis.ticker = FixedTicker(ticks=[row + 0.5 for row in range(0, len(names), every)])
    drawn.yaxis.major_label_overrides = {row + 0.5: plain(shorten_name(name)) for row, name in enumerate(names)}
    drawn.yaxis.major_label_text_font_size = "10px"
    drawn.min_border_left = 30 + 5 * max((len(shorten_name(name)) for name in names), default=0)
    drawn.ygrid.visible = False


def hover_names(names: Sequence[str]) -> CustomJSHover:
    """A formatter for hover tools that gives the name of the row under the pointer."""
    # A data source, because a formatter's arguments have to be models.
    source = ColumnDataSource({"name": list(names)})
    code = "const row = Math.floor(special_vars.y); return source.data.name[row] ?? ''"
    return CustomJSHover(args={"source": source}, code=code)


def steps_axis(drawn: figure) -> None:
    """Labels the x axis as steps, with whole numbers."""
    drawn.xaxis.axis_label = "step"
    drawn.xaxis.ticker.desired_num_ticks = 6  # labels of six digits fit beside each other in a narrow plot
    drawn.xaxis.formatter = BasicTickFormatter(use_scientific=False)


def arrays(series: Series) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps and values of a curve, both (points,).

    A value that is not finite becomes NaN, which leaves a gap in the line.
    """
    values = np.array(list(series.points.values()), dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return np.array(list(series.points), dtype=np.float32), values.astype(np.float32)


def finite_mean(values: NDArray[np.float64], axis: int | None = None) -> NDArray[np.float64]:
    """The mean of the finite values; NaN where there are none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total: NDArray[np.float64] = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curves(runs: Sequence[Run], title: str, text: str, unit: str, keys: Sequence[str], steps: Range1d) -> Panel:
    """A panel of metrics over steps: the first key as solid lines with dots, further ones dashed with circles.

    Each run has a color; a single run has one for each key.
    """
    recorded = [
        (k, i, run.metrics[key]) for k, run in enumerate(runs) for i, key in enumerate(keys) if key in run.metrics
    ]
    drawable = [entry for entry in recorded if _finite(entry[2])]
    if not drawable:
        return Panel(title, f"No {'finite ' if recorded else ''}{' or '.join(keys)} was recorded.")
    values = np.array([value for *_, series in drawable for value in _finite(series)])
    is_log = bool(values.min() > 0 and values.max() > 30 * values.min())
    drawn = plot(WIDTH // 2, 240, x_range=steps, y_axis_type="log" if is_log else "linear")
    if not is_log:  # around a single value, or equal ones
        drawn.y_range.default_span = 0.2 * float(abs(values).max()) or 1.0
    drawn.yaxis.axis_label = plain(f"{unit} (log scale)" if is_log else unit, 40)
    if is_log:
        _label_decades(drawn, values.min(), values.max())
    steps_axis(drawn)
    lines: dict[str, list[GlyphRenderer]] = {}
    for k, i, series in drawable:
        name = keys[i] if len(runs) == 1 else runs[k].label
        lines.setdefault(name, []).extend(_curve(drawn, series, color(i if len(runs) == 1 else k), i > 0, name, unit))
    if len(runs) > 1 and len(keys) > 1:
        for i in sorted({i for _, i, _ in drawable}):
            lines[f"{'dashed' if i else 'solid'}: {keys[i]}"] = [_sample(drawn, is_second=i > 0)]
    if len(lines) > 1:
        _add_legend(drawn, lines, is_rising=sum(_trend(series) for *_, series in drawable) > 0)
    notes = [text]
    if any(series.is_thinned for *_, series in drawable):
        notes.append(f"A record of more than {MOST} values is drawn as means over equally many steps.")
    for k, i, series in recorded:
        if series.num_bad:
            more = f" and {series.num_bad - 1} later step(s)" if series.num_bad > 1 else ""
            whose = "" if len(runs) == 1 else f"{runs[k].label}: "
            notes.append(f"{whose}{keys[i]} was not finite at step {series.first_bad}{more}.")
    return Panel(title, " ".join(notes), [drawn])


def _curve(
    drawn: figure, series: Series, line_color: str, is_second: bool, name: str, unit: str
) -> list[GlyphRenderer]:
    x, y = arrays(series)
    source = ColumnDataSource({"x": x, "y": y})
    fill = "white" if is_second else line_color
    line = drawn.line("x", "y", source=source, color=line_color, line_width=1.5, line_dash=_DASHES[is_second])
    # Dots mark the records where there are few, and a single value between two gaps, where there is no line.
    size = 5 if len(x) < 60 else 1.5
    dots = drawn.scatter("x", "y", source=source, color=line_color, fill_color=fill, size=size)
    hover = HoverTool(renderers=[dots], visible=False)
    hover.tooltips = [("", escaped(name)), ("step", "@x{0}"), (escaped(unit), "@y{0.0000}")]
    drawn.add_tools(hover)
    return [line, dots]


def _sample(drawn: figure, *, is_second: bool) -> GlyphRenderer:
    """A line that only the legend shows."""
    return drawn.line([math.nan], [math.nan], color=_INK, line_width=1.5, line_dash=_DASHES[is_second])


def _finite(series: Series) -> list[float]:
    return [value for value in series.points.values() if math.isfinite(value)]


def _trend(series: Series) -> int:
    """The sign of the last finite value minus the first: 1, 0 or -1."""
    finite = _finite(series)
    return (finite[-1] > finite[0]) - (finite[-1] < finite[0])


def _add_legend(drawn: figure, lines: dict[str, list[GlyphRenderer]], *, is_rising: bool) -> None:
    """Adds a legend: in the corner that the curves leave free, or below the plot if it has many entries."""
    items = [LegendItem(label=plain(name, 36), renderers=renderers) for name, renderers in lines.items()]
    legend = Legend(items=items, click_policy="hide", location="bottom_right" if is_rising else "top_right")
    legend.label_text_font_size, legend.glyph_height, legend.spacing, legend.padding = "10px", 14, 0, 4
    legend.glyph_width = 30  # three dashes
    legend.background_fill_alpha, legend.border_line_color = 0.8, _GRID
    if len(items) > 5:
        legend.location, legend.ncols = "top_left", 2
    drawn.add_layout(legend, "below" if len(items) > 5 else "center")


def _label_decades(drawn: figure, low: float, high: float) -> None:
    """Sets the ticks of a logarithmic y axis: at 1, 2, 5, 10, ... or, over many decades, at powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in ((1, 2, 5) if len(decades) < 5 else (1,))]
    ticks = ticks[:: max(1, len(ticks) // 10)]
    drawn.yaxis.ticker = drawn.ygrid.ticker = FixedTicker(ticks=ticks)
    drawn.yaxis.major_label_overrides = {tick: f"{tick:g}" for tick in ticks}


def escaped(text: str) -> str:
    """Text from a file for a tooltip's template, without markup and without @, $ and {, which begin placeholders."""
    return plain(re.sub(r"[@$<>&{}]", " ", text))
