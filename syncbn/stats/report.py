"""The report: one HTML file about one run or several, which needs no network.

It reads files of run directories alone, so it works for a run that failed, was killed, or still goes on. The same files
give the same report, byte for byte.
"""

from __future__ import annotations

import argparse
import html
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.stats.reading import Run, read_runs, run_directories

if TYPE_CHECKING:
    from syncbn.stats.drawing import Panel

_SEVERITIES = ("error", "warning", "info")


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Writes the report of these runs to `path`, whole or not at all.

    Args:
        runs: run directories, or those of multiruns, which stand for their jobs. Several are shown side by side.

    Raises:
        ValueError: a directory is not that of a run.
        ImportError: Bokeh, which draws, is not installed.
        OSError: the file cannot be written.
    """
    directories = list(dict.fromkeys(job for run in runs for job in run_directories(run)))
    if not directories:
        raise ValueError("a report needs at least one run")
    try:
        importlib.import_module("bokeh.plotting")
    except ImportError as error:
        raise ImportError(f"the report is drawn by Bokeh: pip install 'syncbn[report]' ({error})") from error
    page = _page(read_runs(directories))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m syncbn report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run directory, or that of a multirun; several: side by side",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="default: report.html in the directory of the run, here for several"
    )


def command(args: argparse.Namespace) -> int:
    """Writes the report and says where; the exit code is 2 if it cannot be written."""
    output = args.output or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html"))
    try:
        write_report(args.runs, output)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --output: {output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(output)
    return 0


def _page(runs: Sequence[Run]) -> str:
    from bokeh.document import Document
    from bokeh.models import Range1d
    from bokeh.resources import Resources

    from syncbn.stats import drawing, heatmaps, timeline

    layers = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    # One range for all plots over steps: zooming into one zooms all.
    steps = Range1d(0, max(1, *(run.last_step for run in runs)))

    def curves(title: str, text: str, unit: str, *keys: str) -> Panel:
        return drawing.curves(runs, title, text, unit, keys, steps)

    def heatmap(key: str, title: str, text: str, unit: str) -> Panel:
        return heatmaps.heatmap(runs, layers, key, title, text, unit, steps)

    def histogram(kind: str, title: str, text: str) -> Panel:
        return heatmaps.histograms(runs, layers, kind, title, text)

    others = sorted(
        {key for run in runs for key in run.metrics if key.startswith("val/")} - {"val/loss", "val/accuracy"}
    )
    drifts = sorted({key for run in runs for key in run.metrics if key.startswith("drift/")})
    curve_panels = [
        curves("Loss", _TEXTS["loss"], "loss", "train/loss", "val/loss"),
        curves("Accuracy", _TEXTS["accuracy"], "share right", "val/accuracy"),
        *(curves(key, "On the validation set.", key.removeprefix("val/"), key) for key in others),
        *(curves(f"Drift of {key.removeprefix('drift/')}", _TEXTS["loaded"], "running std", key) for key in drifts),
        curves("Learning rate", _TEXTS["lr"], "learning rate", "train/lr"),
    ]
    heat_panels = [
        heatmap("drift", "Drift", _TEXTS["drift"], "running std"),
        heatmap("between_rank_share", "Between-rank share", _TEXTS["share"], "share of variance"),
        heatmap("weight_abs", "Gamma", _TEXTS["gamma"], "mean |gamma|"),
        heatmap("dead_channels", "Dead channels", _TEXTS["dead"], "share of channels"),
    ]
    histogram_panels = [
        histogram("weight", "gamma", "Healthy: around one hump; a spike at 0 is dead channels."),
        histogram("bias", "beta", "Healthy: around 0, without far outliers."),
        histogram("running_mean", "running mean", "Healthy: the last batch lies where the running mean does."),
        histogram("running_var", "running variance", "Healthy: above 1e-8, and the last batch lies there too."),
    ]
    speed = curves("Throughput", _TEXTS["speed"], "samples / s over all ranks", "train/samples_per_second")
    document = Document()
    targets: list[str] = []

    def figures(panels: Iterable[Panel], style: str) -> str:
        parts = []
        for panel in panels:
            places = []
            for drawn in panel.plots:
                document.add_root(drawn)
                targets.append(f"plot-{len(targets) + 1}")
                places.append(f'<div id="{targets[-1]}"></div>')
            row = f'<div class="row">{"".join(places)}</div>' if places else ""
            kind = "absent" if not places else ""
            text = f"<figcaption><b>{_safe(panel.title)}.</b> {_safe(panel.text)}</figcaption>"
            parts.append(f'<figure class="{kind}">{text}{row}</figure>')
        return f'<div class="{style}">{"".join(parts)}</div>'

    sections = [
        ("Overview", _overview(runs)),
        ("Curves", figures(curve_panels, "pairs")),
        ("Layers over time", figures(heat_panels, "")),
        ("Freezing", figures([timeline.freeze_timeline(runs, steps)], "")),
        ("Layers at the end", _layer_tables(runs) + figures(histogram_panels, "pairs")),
        ("Audit", _each(runs, _audit)),
        ("Throughput", figures([speed], "")),
        ("Configuration", _differences(runs) + _each(runs, _config, "config.yaml")),
        ("Environment", _each(runs, _environment, "environment.json")),
    ]
    content = _renumbered(document.to_json(deferred=False))
    roots = {root["id"]: target for root, target in zip(content["roots"], targets, strict=True)}
    embedded = json.dumps(content).replace("<", "\\u003c")  # no text of a file can end the script
    items = json.dumps([{"docid": "report", "roots": roots, "root_ids": list(roots)}])
    title = _safe(f"syncbn report: {', '.join(run.label for run in runs)}")
    body = "".join(
        f'<section id="{name.lower().replace(" ", "-")}"><h2>{name}</h2>{text}</section>' for name, text in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"{Resources(mode='inline', components=['bokeh']).render_js()}\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n"
        f"<script>Bokeh.embed.embed_items({{report: {embedded}}}, {items})</script>\n</body>\n</html>\n"
    )


def _renumbered(content: Any) -> Any:
    """A document whose ids count from 1: Bokeh's own depend on what the process has drawn before."""
    numbers: dict[str, str] = {}

    def renumber(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: numbers.setdefault(item, f"m{len(numbers) + 1}")
                if key == "id" and isinstance(item, str)
                else renumber(item)
                for key, item in value.items()
            }
        return [renumber(item) for item in value] if isinstance(value, list) else value

    return renumber(content)


def _overview(runs: Sequence[Run]) -> str:
    from syncbn.stats import drawing

    finals = [_finals(run) for run in runs]
    names = sorted({name for final in finals for name in final}, key=lambda name: (_order(name), name))
    rows = []
    for k, (run, final) in enumerate(zip(runs, finals, strict=True)):
        numbers = [_number(final[name]) if name in final else "" for name in names]
        epoch = run.last("epoch")
        where = f"{run.last_step}" + ("" if epoch is None else f" (epoch {epoch:.4g})")
        swatch = f'<span class="swatch" style="background:{drawing.color(k)}"></span>' if len(runs) > 1 else ""
        rows.append([f"{swatch}{_safe(run.label)}", _safe(_state(run)), where, *numbers])
    headers = ["run", "state", "last step", *map(_safe, names)]
    remarks = [f"{run.label}: {remark}" for run in runs for remark in run.remarks]
    text = (
        "Numbers that a run gave at its end (of the weights that it kept) or, where it did not come to its end, the last on "
        "record. Rates lie between 0 and 1. In all plots over steps, dragging a box zooms all of them; a double use of "
        "the reset symbol goes back."
    )
    return f"<p>{text}</p>{_table(headers, rows)}" + "".join(f'<p class="absent">{_safe(line)}</p>' for line in remarks)


def _finals(run: Run) -> dict[str, float]:
    """The numbers that stand for a run."""
    given = (run.summary or {}).get("metrics")
    if isinstance(given, dict) and given:
        return {str(name): float(value) for name, value in given.items() if isinstance(value, (int, float, str))}
    wanted = ("val/", "test/", "drift/", "train/loss", "train/samples_per_second")
    return {name: table[max(table)] for name, table in run.metrics.items() if name.startswith(wanted)}


def _order(name: str) -> int:
    groups = ("test/", "val/", "drift/", "train/")
    return next((k for k, group in enumerate(groups) if name.startswith(group)), len(groups))


def _state(run: Run) -> str:
    if run.summary is None:
        return "no end on record: it goes on, was killed, or failed"
    if run.summary.get("failed"):
        return f"failed: {run.summary['failed']}"
    return "stopped early" if run.summary.get("stopped") else "finished"


def _layer_tables(runs: Sequence[Run]) -> str:
    """The last record of every layer in numbers."""
    columns = {
        "values_per_channel": "values per channel", "drift": "drift", "between_rank_share": "between-rank share",
        "weight_abs": "mean |gamma|", "bias": "mean beta", "running_mean_abs": "mean |running mean|",
        "running_var": "mean running variance", "dead_channels": "dead channels", "stats_frozen": "stats frozen",
        "affine_frozen": "affine frozen",
    }  # fmt: skip

    def table(run: Run) -> str:
        present = [key for key in columns if any(key in keys for keys in run.by_layer.values())]
        if not present:
            return '<p class="absent">No numbers of layers (bn/...) were recorded.</p>'
        rows = [
            [_safe(layer), *(_last(run.by_layer[layer].get(key)) for key in present)]
            for layer in run.layers
            if layer in run.by_layer
        ]
        return _table(["layer", *(columns[key] for key in present)], rows)

    return _each(runs, table, "numbers of the last record")


def _last(table: dict[int, float] | None) -> str:
    return _number(table[max(table)]) if table else ""


def _audit(run: Run) -> str:
    if run.audit is None:
        return '<p class="absent">No audit was recorded (audit.json).</p>'
    if not run.audit:
        return "<p>The audit found nothing.</p>"

    def rank(finding: dict[str, str]) -> int:
        severity = finding.get("severity", "").lower()
        return _SEVERITIES.index(severity) if severity in _SEVERITIES else len(_SEVERITIES)

    columns = ("severity", "layer", "rule", "why", "remedy")
    return _table(columns, [[_safe(f.get(key, "")) for key in columns] for f in sorted(run.audit, key=rank)])


def _differences(runs: Sequence[Run]) -> str:
    configs = [run.flat_config() for run in runs]
    keys = sorted({key for config in configs for key in config})
    differing = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    if len(runs) == 1 or not any(configs):
        return ""
    if not differing:
        return "<p>All configurations are the same.</p>"
    rows = [[_safe(key), *(_safe(config.get(key, "")) for config in configs)] for key in differing]
    return f"<p>Keys in which the runs differ:</p>{_table(['key', *(_safe(run.label) for run in runs)], rows)}"


def _config(run: Run) -> str:
    if not run.config:
        return '<p class="absent">No configuration was recorded (config.yaml).</p>'
    return f"<pre>{_safe(run.config)}</pre>"


def _environment(run: Run) -> str:
    if not run.environment:
        return '<p class="absent">No environment was recorded (environment.json).</p>'
    return _table(("what", "value"), [[_safe(key), _safe(value)] for key, value in run.environment.items()])


def _each(runs: Sequence[Run], content: Callable[[Run], str], folded: str = "") -> str:
    """The content of every run under its name; folded into a line that opens, if that line is given."""
    parts = []
    for run in runs:
        name = _safe(run.label) if len(runs) > 1 else ""
        if folded:
            summary = f"{name}: {folded}" if name else folded
            parts.append(f"<details><summary>{summary}</summary>{content(run)}</details>")
        else:
            parts.append((f"<h3>{name}</h3>" if name else "") + content(run))
    return "".join(parts)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{header}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _safe(text: str) -> str:
    return html.escape(text)


_TEXTS = {
    "loss": "Mean over the samples since the record before (train, solid) and over the validation set (dashed, circles). Healthy: "
    "both fall; validation that rises while training falls is overfitting, or statistics that do not fit.",
    "accuracy": "Share of the validation set that is right, evaluated with running statistics. Sudden dips while the loss "
    "falls point to running statistics that lag behind.",
    "loaded": "How far a running mean moved since it was loaded, in running standard deviations; the largest over layers and "
    "channels. Exactly 0 where statistics are frozen.",
    "lr": "Of the first parameter group.",
    "speed": "Evaluation and saving do not count. Healthy: flat.",
    "drift": "|batch mean - running mean| in running standard deviations, mean over channels. Healthy: high in the first steps, "
    "then low and even. A layer that stays bright evaluates with statistics that are not those of its data.",
    "share": "The part of the variance that lies between the ranks. Near 0 every rank sees the same distribution; where it is "
    "large, batch normalization without synchronization would normalize each rank differently.",
    "gamma": "Mean |gamma| over channels. Healthy: slow changes. A layer that fades towards 0 is being switched off.",
    "dead": "Share of channels with |gamma| < 1e-3 or a variance < 1e-8: their output no longer depends on their input. "
    "Healthy: 0.",
}

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; width: 1320px; margin: 24px auto; }
h1 { font-size: 22px; overflow-wrap: anywhere; } h2 { font-size: 18px; border-bottom: 1px solid #ccc; margin: 32px 0 8px; }
h3 { font-size: 14px; margin: 12px 0 4px; }
figure { margin: 0 0 20px; break-inside: avoid; } figcaption { max-width: 1100px; margin: 6px 0; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 4px; } .pairs { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 24px; }
.absent { color: #666; font-style: italic; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 6px 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ddd; padding: 3px 8px; text-align: left; vertical-align: top; overflow-wrap: anywhere; max-width: 420px; }
th { background: #f4f4f4; } pre { background: #f7f7f7; padding: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: 2px 0; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; }
@media print { body { width: auto; } details { display: block; } }
"""
