"""Freeze timeline: the spans of steps in which modules were frozen, drawn as bars."""

from __future__ import annotations

from collections.abc import Sequence

from bokeh.models import ColumnDataSource, HoverTool, Legend, LegendItem, Range1d

from syncbn.report.drawing import COLORS, WIDTH, Panel, escaped, name_rows, plot, steps_axis
from syncbn.report.metric_names import module_and_switch
from syncbn.report.runs import Run

SWITCHES = {"stats": COLORS[0], "affine": COLORS[4], "weights": COLORS[3]}
_Bars = tuple[tuple[float, float], ...]  # (start, end) in steps


def freeze_timeline(runs: Sequence[Run], steps: Range1d) -> Panel:
    """The panel of the freeze timeline: a row per module that is ever frozen, with bars for each of its switches.

    Modules below one prefix that are frozen in the same steps share a row.
    """
    title = "Freeze timeline"
    plots, without = [], []
    for run in runs:
        rows = _rolled_up(_bars(run), run.layers)
        if not rows:
            without.append(run.label)
            continue
        names = [name for name, _ in reversed(rows.items())]
        height = max(50, min(len(names) * 24, max(600, len(names) * 12)))
        drawn = plot(WIDTH, height, run.label if len(runs) > 1 else "", x_range=steps, y_range=Range1d(0, len(names)))
        items = []
        for lane, (switch, color) in enumerate(SWITCHES.items()):
            bars = [(row, name, bar) for row, name in enumerate(names) for bar in rows[name].get(switch, ())]
            data = {
                "left": [start for _, _, (start, _) in bars],
                "right": [end for _, _, (_, end) in bars],
                "top": [row + 0.9 - 0.27 * lane for row, _, _ in bars],
                "bottom": [row + 0.65 - 0.27 * lane for row, _, _ in bars],
                "module": [escaped(name) for _, name, _ in bars],
            }
            if not bars:
                continue
            quads = drawn.quad("left", "right", "top", "bottom", source=ColumnDataSource(data), color=color)
            items.append(LegendItem(label=switch, renderers=[quads]))
            hover = HoverTool(renderers=[quads], visible=False)
            hover.tooltips = [("module", "@module"), ("frozen", f"{switch}, step @left to @right")]
            drawn.add_tools(hover)
        drawn.add_layout(
            Legend(items=items, click_policy="hide", border_line_color=None, orientation="horizontal"), "above"
        )
        name_rows(drawn, names)
        steps_axis(drawn)
        plots.append(drawn)
    if not plots:
        return Panel(title, "No freeze switch was recorded: nothing was frozen by a rule.")
    text = (
        "A bar means frozen: stats holds running mean and variance, affine gamma and beta, weights all other "
        "parameters. Modules below one prefix that share their times share a row, which tells how many they are. "
        "Affine and weights without stats is the classic mistake: the parameters rest, the running statistics move on."
    )
    nothing = f" Nothing was frozen by a rule in {', '.join(without)}." if without else ""
    return Panel(title, text + nothing, plots)


def _bars(run: Run) -> dict[str, dict[str, _Bars]]:
    """The spans in which each module was frozen, by switch; without unfreezing, a span ends with the run."""
    found: dict[str, dict[str, _Bars]] = {}
    for key, series in run.metrics.items():
        parts = module_and_switch(key)
        if parts is None or parts[1] not in SWITCHES:
            continue
        module, switch = parts
        spans, since = [], None
        for step, value in series.points.items():
            if value and since is None:
                since = step
            elif not value and since is not None:
                spans.append((float(since), float(step)))
                since = None
        if since is not None:
            spans.append((float(since), float(max(run.last_step, since + 1))))
        if spans:
            found.setdefault(module, {})[switch] = tuple(spans)
    return found


def _rolled_up(modules: dict[str, dict[str, _Bars]], layers: Sequence[str]) -> dict[str, dict[str, _Bars]]:
    """The bars of each row, by its name: modules below one prefix are merged if no two of them differ in a switch.

    Args:
        layers: the names of all recorded batch normalization layers, frozen or not.
    """
    rows: dict[str, dict[str, _Bars]] = {}
    members: dict[str, int] = {}
    for module, switches in modules.items():
        parts = module.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        row = next(prefix for prefix in prefixes if prefix == module or _agree(prefix, modules, layers))
        rows.setdefault(row, {}).update(switches)
        members[row] = members.get(row, 0) + 1
    return {name if members[name] == 1 else f"{name} ({members[name]} modules)": rows[name] for name in rows}


def _agree(prefix: str, modules: dict[str, dict[str, _Bars]], layers: Sequence[str]) -> bool:
    def is_below(name: str) -> bool:
        return name == prefix or name.startswith(f"{prefix}.")

    for switch in SWITCHES:
        times = {switches[switch] for name, switches in modules.items() if is_below(name) and switch in switches}
        # A layer below the prefix whose statistics or affine are never frozen has no record of it, yet it differs.
        is_partial = switch != "weights" and any(
            is_below(layer) and switch not in modules.get(layer, {}) for layer in layers
        )
        if len(times) > 1 or (times and is_partial):
            return False
    return True
