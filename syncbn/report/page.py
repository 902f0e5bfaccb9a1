"""Page of the report: its sections, in order, as one HTML document that contains Bokeh's script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from bokeh.document import Document
from bokeh.models import Range1d
from bokeh.resources import Resources

from syncbn.report.drawing import Panel
from syncbn.report.drawing import curves as draw_curves
from syncbn.report.gallery import gallery
from syncbn.report.heatmaps import heatmap as draw_heatmap
from syncbn.report.heatmaps import histograms as draw_histograms
from syncbn.report.metric_names import (
    BETWEEN_RANK_SHARE,
    DEAD_CHANNELS,
    DRIFT,
    LAYER_DRIFT,
    LEARNING_RATE,
    THROUGHPUT,
    TRAIN_LOSS,
    VAL,
    VAL_ACCURACY,
    VAL_LOSS,
    WEIGHT_ABS,
    below,
)
from syncbn.report.runs import Run
from syncbn.report.synchronization import synchronization
from syncbn.report.tables import audit, config, differences, each, environment, failures, layer_tables, overview, safe
from syncbn.report.timeline import freeze_timeline

_TEXTS = {
    "loss": "Solid: training, mean over the samples since the record before; dashed, circles: validation. Healthy: "
    "both fall. Validation that rises while training falls is overfitting, or running statistics that do not fit.",
    "accuracy": "Share of the validation set that is right, evaluated with running statistics. Dips while the loss "
    "falls point to running statistics that lag behind.",
    "loaded": "How far a running mean moved since it was loaded, in running standard deviations; the largest over "
    "layers and channels. Exactly 0 where statistics are frozen.",
    "lr": "Of the first parameter group.",
    "speed": "Evaluation and saving do not count. Healthy: flat.",
    "drift": "|batch mean - running mean| in running standard deviations, mean over channels. Healthy: high in the "
    "first steps, then low and even. A layer that stays bright is evaluated with statistics that are not those of its "
    "data. Blank: not recorded.",
    "share": "The part of the variance that lies between the ranks. Near 0 every rank sees the same distribution; "
    "where it is large, batch normalization without synchronization normalizes each rank differently. "
    "Blank: not recorded.",
    "gamma": "Mean |gamma| over channels. Healthy: slow changes. A layer that fades towards 0 is being switched off.",
    "dead": "Share of channels with |gamma| < 1e-3 or a variance < 1e-8: their output hardly depends on their input. "
    "Healthy: 0.",
}

_ABSENT = {
    LAYER_DRIFT: "It needs a logging step (log_every) and layers with running statistics.",
    BETWEEN_RANK_SHARE: "It needs several ranks and layers that synchronize (bn.sync=true).",
    WEIGHT_ABS: "It needs layers with gamma.",
    DEAD_CHANNELS: "It needs layers with gamma or running statistics.",
}

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1320px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 22px; overflow-wrap: anywhere; }
h2 { font-size: 18px; border-bottom: 1px solid #ccc; margin: 32px 0 8px; }
h3 { font-size: 14px; margin: 12px 0 4px; }
figure { margin: 0 0 20px; break-inside: avoid; }
figcaption { max-width: 1100px; margin: 6px 0; overflow-wrap: anywhere; }
.row, .pairs { display: grid; grid-template-columns: minmax(0, 1fr); gap: 8px 24px; }
@media (min-width: 800px) { .row:has(> :nth-child(2)), .pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.row > div { min-width: 0; overflow-x: auto; }
.failed { border-left: 4px solid #b00020; padding: 4px 12px; background: #fdf1f2; overflow-wrap: anywhere; }
.absent { color: #666; font-style: italic; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 6px 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ddd; padding: 3px 8px; text-align: left; vertical-align: top;
  overflow-wrap: break-word; max-width: 420px; }
th { background: #f4f4f4; } pre { background: #f7f7f7; padding: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.examples { display: flex; flex-wrap: wrap; gap: 10px; margin: 8px 0; }
.examples figure { margin: 0; width: 100px; font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
.examples figure.mask { width: 306px; }
.examples img { height: 96px; max-width: 96px; object-fit: contain; image-rendering: pixelated; background: #eee; }
.confusion td, .confusion th { text-align: right; padding: 2px 6px; max-width: 120px; }
summary { cursor: pointer; padding: 2px 0; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; }
@media print { body { max-width: none; } details { display: block; } }
"""


def page(runs: Sequence[Run]) -> str:
    """The report of the runs as an HTML document."""
    figures = _Figures(with_absent=not all(run.failed for run in runs))
    body = "".join(
        f'<section id="{name.lower().replace(" ", "-")}"><h2>{name}</h2>{text}</section>'
        for name, text in _sections(runs, figures)
        if text
    )
    title = safe(f"syncbn report: {', '.join(run.label for run in runs)}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n"
        f"{Resources(mode='inline', components=['bokeh']).render_js()}\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{failures(runs)}{body}\n{figures.script()}\n</body>\n</html>\n"
    )


def _sections(runs: Sequence[Run], figures: _Figures) -> list[tuple[str, str]]:
    """Title and HTML of every section, in order."""
    layers = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    # One range for all plots over steps: zooming into one zooms all.
    last = max(1, *(run.last_step for run in runs))
    steps = Range1d(-0.015 * last, 1.015 * last)  # points at the ends are not cut

    def curves(title: str, text: str, unit: str, *keys: str) -> Panel:
        return draw_curves(runs, title, text, unit, keys, steps)

    def heatmap(key: str, title: str, text: str, unit: str) -> Panel:
        return draw_heatmap(runs, layers, key, title, text, _ABSENT[key], unit, steps)

    def histogram(kind: str, title: str, text: str) -> Panel:
        return draw_histograms(runs, layers, kind, title, text)

    others = sorted({name for run in runs for name in below(VAL, run.metrics)} - {VAL_LOSS, VAL_ACCURACY})
    drifts = sorted({name for run in runs for name in below(DRIFT, run.metrics)})
    curve_panels = [
        curves("Loss", _TEXTS["loss"], "loss", TRAIN_LOSS, VAL_LOSS),
        curves("Accuracy", _TEXTS["accuracy"], "share right", VAL_ACCURACY),
        *(curves(key, "On the validation set.", key.removeprefix(f"{VAL}/"), key) for key in others),
        *(curves(f"Drift of {key.removeprefix(f'{DRIFT}/')}", _TEXTS["loaded"], "running std", key) for key in drifts),
        curves("Learning rate", _TEXTS["lr"], "learning rate", LEARNING_RATE),
        curves("Throughput", _TEXTS["speed"], "samples / s over all ranks", THROUGHPUT),
    ]
    heat_panels = [
        heatmap(LAYER_DRIFT, "Drift", _TEXTS["drift"], "running std"),
        heatmap(BETWEEN_RANK_SHARE, "Between-rank share", _TEXTS["share"], "share of variance"),
        heatmap(WEIGHT_ABS, "Gamma", _TEXTS["gamma"], "mean |gamma|"),
        heatmap(DEAD_CHANNELS, "Dead channels", _TEXTS["dead"], "share of channels"),
    ]
    histogram_panels = [
        histogram("weight", "gamma", "Healthy: around one hump; a spike at 0 is dead channels."),
        histogram("bias", "beta", "Healthy: around 0, without far outliers."),
        histogram("running_mean", "running mean", "Healthy: the last batch lies where the running mean does."),
        histogram("running_var", "running variance", "Healthy: above 1e-8, and the last batch lies there too."),
    ]
    return [
        ("Overview", overview(runs) + differences(runs)),
        ("Curves", figures.add(curve_panels, "pairs")),
        ("What it gets wrong", gallery(runs)),
        ("Layers over time", figures.add(heat_panels)),
        ("What would it change", each(runs, synchronization)),
        ("Freezing", figures.add([freeze_timeline(runs, steps)])),
        ("Layers at the end", layer_tables(runs) + figures.add(histogram_panels, "pairs")),
        ("Audit", each(runs, audit)),
        ("Configuration", each(runs, config, "config.yaml")),
        ("Environment", each(runs, environment, "environment.json")),
    ]


class _Figures:
    """The plots of a page: the elements that will show them, and the script that draws into these."""

    def __init__(self, *, with_absent: bool) -> None:
        self._with_absent = with_absent  # whether a panel without plots is shown, for what it says
        self._document = Document()
        self._targets: list[str] = []  # ids of the elements, in the order of the document's roots

    def add(self, panels: Iterable[Panel], style: str = "") -> str:
        """Adds the plots of the panels to the document; returns the HTML that holds them, of a class `style`."""
        parts = []
        shown = [panel for panel in panels if panel.plots or self._with_absent]
        for panel in sorted(shown, key=lambda panel: not panel.plots):  # gaps between plots come last
            places = []
            for drawn in panel.plots:
                self._document.add_root(drawn)
                self._targets.append(f"plot-{len(self._targets) + 1}")
                places.append(f'<div id="{self._targets[-1]}"></div>')
            row = f'<div class="row">{"".join(places)}</div>' if places else ""
            kind = "absent" if not places else ""
            text = f"<figcaption><b>{safe(panel.title)}.</b> {safe(panel.text)}</figcaption>"
            parts.append(f'<figure class="{kind}">{text}{row}</figure>')
        return f'<div class="{style}">{"".join(parts)}</div>' if parts else ""

    def script(self) -> str:
        content = _renumbered(self._document.to_json(deferred=False))
        roots = {root["id"]: target for root, target in zip(content["roots"], self._targets, strict=True)}
        embedded = json.dumps(content).replace("<", "\\u003c")  # text from a file cannot end the script
        items = json.dumps([{"docid": "report", "roots": roots, "root_ids": list(roots)}])
        return f"<script>Bokeh.embed.embed_items({{report: {embedded}}}, {items})</script>"


def _renumbered(content: Any) -> Any:
    """The document with ids that count from 1, because Bokeh's ids depend on what the process has drawn before."""
    numbers: dict[str, str] = {}

    def renumber(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: numbers.setdefault(item, f"m{len(numbers) + 1}")
                if key == "id" and isinstance(item, str)
                else renumber(item)
                for key, item in value.items()
            }
        return [renumber(item) for item in value] if isinstance(value, (list, tuple)) else value

    return renumber(content)
