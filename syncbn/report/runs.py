"""What run directories hold, read for the report; no torch. A file that is damaged is remarked, and is no error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from syncbn.report.metric_names import layer_and_kind

_MARKS = ("metrics.jsonl", "config.yaml", "summary.json")  # a directory with one of them is that of a run
_MIDDLE = "..."


@dataclass(frozen=True)
class Run:
    """One run, as its files tell it.

    Attributes:
        label: a short name that differs from those of the other runs of a report.
        metrics: per key the value at each step that recorded it, in the order of steps; may be NaN or infinite.
        layers: names of the batch normalization layers, in the order of the model.
        by_layer: the same as `metrics` for the keys below `bn/`: by layer, then by key.
        vectors: per layer what it held last, channel by channel (`weight`, `running_var`, ...).
        vectors_step: the step of `vectors`.
        config: the text of config.yaml; empty if there is none.
        audit: findings, or None if no audit was written.
        summary: what the run said at its end; None if it did not come to it.
        remarks: files that could not be read, lines that were left out.
    """

    label: str
    path: Path
    metrics: dict[str, dict[int, float]]
    layers: list[str]
    by_layer: dict[str, dict[str, dict[int, float]]]
    vectors: dict[str, dict[str, list[float]]]
    vectors_step: int | None
    config: str
    audit: list[dict[str, str]] | None
    environment: dict[str, str]
    summary: dict[str, Any] | None
    remarks: list[str]

    @property
    def last_step(self) -> int:
        """The last step on record; 0 if there is none."""
        tables = [*self.metrics.values(), *(table for keys in self.by_layer.values() for table in keys.values())]
        return max((step for table in tables for step in table), default=0)

    @property
    def overrides(self) -> list[str]:
        """What was given on the command line, if the run said so at its end."""
        given = (self.summary or {}).get("overrides")
        return [str(override) for override in given] if isinstance(given, list) else []

    def last(self, key: str) -> float | None:
        """The last value of a metric."""
        table = self.metrics.get(key)
        return table[max(table)] if table else None

    def flat_config(self) -> dict[str, str]:
        """The configuration by dotted key; empty if there is none or it is not YAML."""
        try:
            return _flat(yaml.safe_load(self.config))
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}


def run_directories(path: Path) -> list[Path]:
    """The directory itself if it is that of a run, or the numbered jobs of a multirun in it.

    Raises:
        ValueError: it is neither.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    if _is_run(path):
        return [path]
    jobs = [child for child in path.iterdir() if child.name.isdecimal() and child.is_dir() and _is_run(child)]
    if not jobs:
        raise ValueError(f"{path}: not a run directory, and no multirun either (it has none of {', '.join(_MARKS)})")
    return sorted(jobs, key=lambda job: (int(job.name), job.name))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run, each with a label that is its own: the directory's name, and what a job of a multirun overrides."""
    names = [path.resolve().name for path in paths]
    if any(name.isdecimal() for name in names) or len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}/{name}" for path, name in zip(paths, names, strict=True)]
    runs = [_read_run(path, name) for path, name in zip(paths, names, strict=True)]
    common = set.intersection(*(set(run.overrides) for run in runs)) if runs else set()
    taken: dict[str, int] = {}
    labelled = []
    for run in runs:
        own = [override for override in run.overrides if override not in common]
        label = " ".join([run.label, *own]) if run.path.resolve().name.isdecimal() else run.label
        taken[label] = taken.get(label, 0) + 1
        labelled.append(replace(run, label=label if taken[label] == 1 else f"{label} ({taken[label]})"))
    return labelled


def shorten(text: str, length: int = 34) -> str:
    """A long text with its middle left out, so that both ends can be read."""
    if len(text) <= length:
        return text
    tail = (length - len(_MIDDLE) + 1) // 2
    return text[: length - len(_MIDDLE) - tail] + _MIDDLE + text[-tail:]


def shorten_name(name: str, length: int = 34) -> str:
    """A long module name with shorter words, numbers kept: what tells two layers apart is often in the middle."""
    for longest in (12, 8, 6, 5, 4, 3):
        if len(name) <= length:
            break
        words = (re.fullmatch(r"(.*?)(\d*)", word, re.DOTALL) for word in name.split("."))
        pairs = [found.groups() for found in words if found]
        name = ".".join(word[: max(1, longest - len(digits))] + digits for word, digits in pairs)
    return shorten(name, length)


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def _read_run(path: Path, label: str) -> Run:
    remarks: list[str] = []
    metrics, by_layer = _read_metrics(path / "metrics.jsonl", remarks)
    held = _read_json(path / "layers.json", remarks) or {}
    vectors = _vectors(held.get("layers"))
    findings = _read_json(path / "audit.json", remarks)
    audit = None if findings is None else _findings(findings.get("findings"))
    step = held.get("step")
    return Run(
        label=label,
        path=path,
        metrics=metrics,
        # layers.json lists every layer, the records may begin with those that are not frozen.
        layers=list(dict.fromkeys([*vectors, *by_layer])),
        by_layer=by_layer,
        vectors=vectors,
        vectors_step=step if isinstance(step, int) else None,
        config=_read_text(path / "config.yaml", remarks),
        audit=audit,
        environment=_flat(_read_json(path / "environment.json", remarks) or {}),
        summary=_read_json(path / "summary.json", remarks),
        remarks=remarks,
    )


def _read_metrics(path: Path, remarks: list[str]) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """The records by key and step, those of layers apart. A later record of the same step wins, key by key."""
    records: dict[int, dict[str, Any]] = {}
    num_damaged = 0
    for line in _read_text(path, remarks).split("\n"):
        try:
            record = json.loads(line)
            step = record["step"]
            if not isinstance(step, int):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            num_damaged += bool(line.strip())
            continue
        records.setdefault(step, {}).update(record)
    if num_damaged:
        remarks.append(f"metrics.jsonl: {num_damaged} damaged line(s) left out")
    metrics: dict[str, dict[int, float]] = {}
    by_layer: dict[str, dict[str, dict[int, float]]] = {}
    for step in sorted(records):
        for key, raw in records[step].items():
            value = _number(raw)
            if value is None or key == "step":
                continue
            if (of_layer := layer_and_kind(key)) is not None:
                layer, kind = of_layer
                by_layer.setdefault(layer, {}).setdefault(kind, {})[step] = value
            else:
                metrics.setdefault(key, {})[step] = value
    return metrics, by_layer


def _number(value: Any) -> float | None:
    """A number of a record; NaN and infinity come as strings."""
    if isinstance(value, (int, float, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return None


def _vectors(layers: Any) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for name, kinds in layers.items() if isinstance(layers, dict) else ():
        found[name] = {}
        for kind, values in kinds.items() if isinstance(kinds, dict) else ():
            numbers = [_number(value) for value in values] if isinstance(values, list) else []
            finite = [number for number in numbers if number is not None and math.isfinite(number)]
            if finite:
                found[name][kind] = finite
    return found


def _findings(findings: Any) -> list[dict[str, str]]:
    if not isinstance(findings, list):
        return []
    return [{key: str(value) for key, value in finding.items()} for finding in findings if isinstance(finding, dict)]


def _read_text(path: Path, remarks: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        remarks.append(f"{path.name} could not be read: {error.strerror}")
        return ""


def _read_json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    """The content of a file; None if it is absent, or damaged, which is remarked."""
    text = _read_text(path, remarks)
    if not text:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        remarks.append(f"{path.name} is damaged")
        return None
    if not isinstance(content, dict):
        remarks.append(f"{path.name} does not hold an object")
        return None
    return content


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested mappings as one, by dotted key; a list is one value."""
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for name, item in value.items():
            flat |= _flat(item, f"{key}.{name}" if key else str(name))
        return flat
    return {key: "null" if value is None else str(value)} if key else {}
