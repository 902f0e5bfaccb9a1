"""The figures of a report: Bokeh plots with a title and a text that says what healthy looks like."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from bokeh.models import (
    BasicTickFormatter, BoxZoomTool, ColumnDataSource, CustomJSHover, FixedTicker, HoverTool, Legend, LegendItem, Range1d,
    ResetTool, SaveTool,
)  # fmt: skip
from bokeh.plotting import figure
from numpy.typing import NDArray

from syncbn.stats.reading import Run, shorten

WIDTH = 1280  # pixels that the plots of one row have together
# Okabe and Ito's colours, without the yellow that white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NUM_POINTS = 1000  # of one curve; a longer one is drawn as means of neighbours
_INK, _GRID = "#333333", "#e4e4e4"


@dataclass(frozen=True)
class Panel:
    """A figure of the report; without plots its text says what is absent."""

    title: str
    text: str
    plots: Sequence[figure] = field(default_factory=list)


def color(index: int) -> str:
    """The colour of a run, everywhere in the report."""
    return COLORS[index % len(COLORS)]


def plain(text: str, length: int = 60) -> str:
    """Text from a file as Bokeh may draw it: never as TeX, which it would have to load."""
    return re.sub(r"\$\$|\\[\[(]", lambda found: " ".join(found[0]), shorten(text, length))


def plot(width: int, height: int, title: str = "", **options: object) -> figure:
    """An empty plot in the style of the report; width and height are those of the frame, without axes."""
    drawn = figure(
        frame_width=width, frame_height=height, tools=[BoxZoomTool(), ResetTool(), SaveTool()], title=plain(title),
        min_border=4, outline_line_color=None, toolbar_location="above", **options,
    )  # fmt: skip
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


def name_rows(drawn: figure, names: Sequence[str], *, visible: bool = True) -> None:
    """Labels row k, which lies between k and k + 1, with the k-th name, as far as there is room for it."""
    every = max(1, math.ceil(len(names) * 10 / (drawn.frame_height or 1)))
    drawn.yaxis.ticker = FixedTicker(ticks=[row + 0.5 for row in range(0, len(names), every)])
    drawn.yaxis.major_label_overrides = {row + 0.5: plain(name, 30) for row, name in enumerate(names)}
    drawn.yaxis.major_label_text_font_size = "10px"
    drawn.yaxis.visible = visible
    drawn.ygrid.visible = False


def hover_names(names: Sequence[str]) -> CustomJSHover:
    """Shows the name of the row that the pointer is in."""
    # A data source, because a formatter's arguments have to be models.
    source = ColumnDataSource({"name": list(names)})
    code = "const row = Math.floor(special_vars.y); return source.data.name[row] ?? ''"
    return CustomJSHover(args={"source": source}, code=code)


def steps_axis(drawn: figure, visible: bool = True) -> None:
    """Whole steps below."""
    drawn.xaxis.axis_label = "step" if visible else None
    drawn.xaxis.formatter = BasicTickFormatter(use_scientific=False)


def thinned(table: dict[int, float], most: int = NUM_POINTS) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps and values of a curve, NaN where not finite (the line has a gap there); means of neighbours if there are
    more than `most`.
    """
    steps, values = np.array(list(table), dtype=np.float64), np.array(list(table.values()), dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    if len(steps) > most:
        parts = np.array_split(np.arange(len(steps)), most)
        steps = np.array([steps[part[-1]] for part in parts])
        values = np.array([finite_mean(values[part]) for part in parts])
    return steps.astype(np.float32), values.astype(np.float32)


def finite_mean(values: NDArray[np.float64], axis: int | None = None) -> NDArray[np.float64]:
    """The mean of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total: NDArray[np.float64] = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curves(runs: Sequence[Run], title: str, text: str, unit: str, keys: Sequence[str], steps: Range1d) -> Panel:
    """Metrics over steps, a colour per run; the first key is drawn solid, the second dashed with circles."""
    tables = [
        (k, i, key, run.metrics[key]) for k, run in enumerate(runs) for i, key in enumerate(keys) if key in run.metrics
    ]
    drawable = [table for *_, table in tables if any(math.isfinite(value) for value in table.values())]
    names = " or ".join(keys)
    if not drawable:
        return Panel(title, f"No finite {names} was recorded." if tables else f"No {names} was recorded.")
    values = [value for table in drawable for value in table.values() if math.isfinite(value)]
    is_log = min(values) > 0 and max(values) > 30 * min(values)
    drawn = plot(WIDTH // 2 - 70, 240, x_range=steps, y_axis_type="log" if is_log else "linear")
    drawn.yaxis.axis_label = f"{unit} (log scale)" if is_log else unit
    steps_axis(drawn)
    items = []
    for k, which, key, table in tables:
        if table not in drawable:
            continue
        x, y = thinned(table)
        name = key if len(runs) == 1 else runs[k].label if len(keys) == 1 else f"{runs[k].label}  {key}"
        source = ColumnDataSource({"x": x, "y": y})
        style = {"color": color(which if len(runs) == 1 else k), "source": source}
        line = drawn.line("x", "y", line_width=1.5, line_dash="solid" if which == 0 else "dashed", **style)
        is_sparse = which > 0 or len(x) < 40
        dots = drawn.scatter(
            "x", "y", size=5 if is_sparse else 1, fill_color="white" if which else style["color"], **style
        )
        items.append(LegendItem(label=plain(name, 48), renderers=[line, dots]))
        hover = HoverTool(renderers=[dots if is_sparse else line], mode="mouse", visible=False)
        hover.tooltips = [("", escaped(name)), ("step", "@x{0}"), (unit, "@y{0.0000}")]
        drawn.add_tools(hover)
    if len(items) > 1:
        inside = len(items) <= 4
        legend = Legend(
            items=items, click_policy="hide", label_text_font_size="10px", spacing=0, padding=4, glyph_height=14,
            background_fill_alpha=0.8, border_line_color=_GRID, location="top_right" if inside else "top_left",
        )  # fmt: skip
        drawn.add_layout(legend, "center" if inside else "below")
    notes = [text]
    if any(len(table) > NUM_POINTS for table in drawable):
        notes.append(f"A longer record is drawn as {NUM_POINTS} means of neighbouring values.")
    for k, _, key, table in tables:
        bad = [step for step, value in table.items() if not math.isfinite(value)]
        if bad:
            more = f" and {len(bad) - 1} later step(s)" if len(bad) > 1 else ""
            whose = "" if len(runs) == 1 else f"{runs[k].label}: "
            notes.append(f"{whose}{key} was not finite at step {bad[0]}{more}.")
    return Panel(title, " ".join(notes), [drawn])


def escaped(text: str) -> str:
    """Text from a file inside a tooltip's template, where @, $ and { begin a placeholder."""
    return plain(re.sub(r"[@$<>&{}]", " ", text))
