"""The tables of a report, as HTML; all text that comes from files is escaped."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Callable, Iterable, Sequence

from syncbn.report.drawing import color
from syncbn.report.metric_names import (
    BETWEEN_RANK_SHARE,
    DEAD_CHANNELS,
    DRIFT,
    EPOCH,
    LAYER_DRIFT,
    TEST,
    THROUGHPUT,
    TRAIN,
    TRAIN_LOSS,
    VAL,
    VALUES_PER_CHANNEL,
    WEIGHT_ABS,
)
from syncbn.report.records import Series
from syncbn.report.runs import Run

_ABSENT = '<p class="absent">'
_FEW = 2  # runs that are the columns of the overview, which then fits into a narrow window
_SEVERITIES = ("error", "warning", "info")


def failures(runs: Sequence[Run]) -> str:
    """Why runs failed, and what to do; empty if none did."""
    return "".join(
        f'<div class="failed"><p><b>{safe(run.label)} failed.</b> {safe(run.failed)}</p>{_go_on(run)}</div>'
        for run in runs
        if run.failed
    )


def _go_on(run: Run) -> str:
    """What to do after a failure, as HTML."""
    name = run.path.resolve().name
    if name.isdecimal():
        return "<p>Correct what the message names, and start the multirun again.</p>"
    words = run.overrides
    if run.has_checkpoint:
        then = "the same command goes on from the last checkpoint"
        words = words if any(word.startswith("run=") for word in words) else [*words, f"run={name}"]
    else:
        then = "it has no checkpoint, so the same command begins anew"
    command = " ".join(["train.py", *map(shlex.quote, words)])
    return f"<p>Correct what the message names; {then}:</p><pre>{safe(command)}</pre>"


def overview(runs: Sequence[Run]) -> str:
    """A table of the runs with their state and their final metrics."""
    finals = [_finals(run) for run in runs]
    names = sorted({name for final in finals for name in final}, key=lambda name: (_order(name), name))
    rows = []
    for k, (run, final) in enumerate(zip(runs, finals, strict=True)):
        numbers = [_number(final[name]) if name in final else "" for name in names]
        epoch = run.last(EPOCH)
        where = f"{run.last_step}" + ("" if epoch is None else f" (epoch {epoch:.4g})")
        swatch = f'<span class="swatch" style="background:{color(k)}"></span>' if len(runs) > 1 else ""
        rows.append([f"{swatch}{safe(run.label)}", safe(_state(run)), where, *numbers])
    headers = ["run", "state", "last step", *map(safe, names)]
    if len(runs) <= _FEW:
        headers, *rows = (list(column) for column in zip(headers, *rows, strict=True))
    remarks = [f"{run.label}: {remark}" for run in runs for remark in run.remarks]
    text = (
        "Numbers that a run gave at its end (of the weights that it kept) or, where it did not come to its end, the "
        "last on record. Rates lie between 0 and 1. Dragging a box in a plot over steps zooms all of them; "
        "the symbol above a plot that turns back resets."
    )
    return f"<p>{text}</p>{table(headers, rows)}" + "".join(f'<p class="absent">{safe(line)}</p>' for line in remarks)


def _finals(run: Run) -> dict[str, float]:
    """The final metrics of a run: those of its summary or, without any, the last ones recorded."""
    given = (run.summary or {}).get("metrics")
    if isinstance(given, dict) and given:
        return {str(name): float(value) for name, value in given.items() if isinstance(value, (int, float, str))}
    wanted = (f"{VAL}/", f"{TEST}/", f"{DRIFT}/", TRAIN_LOSS, THROUGHPUT)
    return {name: series.last for name, series in run.metrics.items() if name.startswith(wanted)}


def _order(name: str) -> int:
    groups = (f"{TEST}/", f"{VAL}/", f"{DRIFT}/", f"{TRAIN}/")
    return next((k for k, group in enumerate(groups) if name.startswith(group)), len(groups))


def _state(run: Run) -> str:
    if run.summary is None:
        return "no end on record: it goes on, was killed, or failed"
    if run.failed:
        return f"failed: {run.failed}"
    return "stopped early" if run.summary.get("stopped") else "finished"


def layer_tables(runs: Sequence[Run]) -> str:
    """A table for each run of the last recorded metrics of every layer."""
    columns = {
        VALUES_PER_CHANNEL: "values per channel", LAYER_DRIFT: "drift", BETWEEN_RANK_SHARE: "between-rank share",
        WEIGHT_ABS: "mean |gamma|", "bias": "mean beta", "running_mean_abs": "mean |running mean|",
        "running_var": "mean running variance", DEAD_CHANNELS: "dead channels", "stats_frozen": "stats frozen",
        "affine_frozen": "affine frozen",
    }  # fmt: skip

    def numbers(run: Run) -> str:
        present = [key for key in columns if any(key in keys for keys in run.by_layer.values())]
        if not present:
            return '<p class="absent">No numbers of layers (bn/...) were recorded.</p>'
        rows = [
            [safe(layer), *(_last(run.by_layer[layer].get(key)) for key in present)]
            for layer in run.layers
            if layer in run.by_layer
        ]
        return table(["layer", *(columns[key] for key in present)], rows)

    return each(runs, numbers, "numbers of the last record")


def _last(series: Series | None) -> str:
    return "" if series is None else _number(series.last)


def audit(run: Run) -> str:
    """A table of the findings that the audit of a run recorded, the most severe first."""
    if run.audit is None:
        return '<p class="absent">No audit was recorded (audit.json).</p>'
    if not run.audit:
        return "<p>The audit found nothing.</p>"

    def rank(finding: dict[str, str]) -> int:
        severity = finding.get("severity", "").lower()
        return _SEVERITIES.index(severity) if severity in _SEVERITIES else len(_SEVERITIES)

    columns = ("severity", "layer", "rule", "why", "remedy")
    return table(columns, [[safe(f.get(key, "")) for key in columns] for f in sorted(run.audit, key=rank)])


def differences(runs: Sequence[Run]) -> str:
    """A table of the configuration keys in which runs differ; empty for a single run."""
    configs = [run.flat_config() for run in runs]
    keys = sorted({key for config in configs for key in config})
    differing = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    if len(runs) == 1 or not any(configs):
        return ""
    if not differing:
        return "<p>All configurations are the same.</p>"
    rows = [[safe(key), *(safe(config.get(key, "")) for config in configs)] for key in differing]
    return f"<p>Keys in which the runs differ:</p>{table(['key', *(safe(run.label) for run in runs)], rows)}"


def config(run: Run) -> str:
    """The configuration of a run as it stands in its file."""
    if not run.config:
        return '<p class="absent">No configuration was recorded (config.yaml).</p>'
    return f"<pre>{safe(run.config)}</pre>"


def environment(run: Run) -> str:
    """A table of the software and hardware that a run recorded."""
    if not run.environment:
        return '<p class="absent">No environment was recorded (environment.json).</p>'
    return table(("what", "value"), [[safe(key), safe(value)] for key, value in run.environment.items()])


def each(runs: Sequence[Run], content: Callable[[Run], str], folded: str = "") -> str:
    """The content for each run under its label; inside of a collapsed element with `folded` as its title, if given.

    Of runs that failed, what is absent is left out; what is absent in all others is said once.
    """
    parts = []
    contents = [(run, content(run)) for run in runs]
    contents = [(run, shown) for run, shown in contents if not (run.failed and shown.startswith(_ABSENT))]
    texts = {shown for _, shown in contents}
    if len(texts) == 1 and next(iter(texts)).startswith(_ABSENT):
        return texts.pop()
    for run, shown in contents:
        name = safe(run.label) if len(runs) > 1 else ""
        if folded:
            summary = f"{name}: {folded}" if name else folded
            parts.append(f"<details><summary>{summary}</summary>{shown}</details>")
        else:
            parts.append((f"<h3>{name}</h3>" if name else "") + shown)
    return "".join(parts)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; headers and cells are HTML already, and are not escaped."""
    head = "".join(f"<th>{header}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def safe(text: str) -> str:
    return html.escape(text)
