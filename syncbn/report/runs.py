"""Reading run directories for the report; does not import torch.

A damaged file raises no error; it becomes a remark in the report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from syncbn.report import file_names
from syncbn.report.metric_names import layer_and_kind
from syncbn.report.records import Series, number_of, read_records

# A directory with any of these files is a run directory.
_MARKS = (file_names.METRICS, file_names.CONFIG, file_names.SUMMARY)
_MIDDLE = "..."


@dataclass(frozen=True)
class Run:
    """One run, as read from the files of its directory.

    Attributes:
        label: a short name, unique among the runs of a report.
        path: the run directory.
        metrics: by name.
        layers: names of the batch normalization layers, in the order of the model.
        by_layer: the metrics of layers (`bn/LAYER/KEY`): by layer, then by key.
        vectors: per layer the last recorded per-channel vectors (`weight`, `running_var`, ...), without values that are
            not finite.
        vectors_step: the step at which `vectors` were recorded; None if it is not known.
        config: the text of config.yaml; empty if there is none.
        audit: findings, or None if no audit was written.
        environment: content of environment.json, by dotted key.
        summary: content of summary.json, which a run writes at its end; None without one.
        operators: the profiler's table of operators; empty without one.
        mistakes: content of mistakes.json; None without one.
        has_checkpoint: whether the run can go on from where it was saved.
        remarks: messages about files that could not be read, and lines that were left out.
    """

    label: str
    path: Path
    metrics: dict[str, Series]
    layers: list[str]
    by_layer: dict[str, dict[str, Series]]
    vectors: dict[str, dict[str, list[float]]]
    vectors_step: int | None
    config: str
    audit: list[dict[str, str]] | None
    environment: dict[str, str]
    summary: dict[str, Any] | None
    operators: str
    mistakes: dict[str, Any] | None
    has_checkpoint: bool
    remarks: list[str]

    @property
    def last_step(self) -> int:
        """The last step on record; 0 if there is none."""
        recorded = [*self.metrics.values(), *(series for keys in self.by_layer.values() for series in keys.values())]
        return max((series.last_step for series in recorded), default=0)

    @property
    def failed(self) -> str:
        """The reason why the run failed; empty if it did not."""
        return str((self.summary or {}).get("failed") or "")

    @property
    def overrides(self) -> list[str]:
        """Overrides given on the command line, as recorded in the summary; empty if there are none."""
        given = (self.summary or {}).get("overrides")
        return [str(override) for override in given] if isinstance(given, list) else []

    def last(self, key: str) -> float | None:
        """The last recorded value of a metric; None if it was not recorded."""
        series = self.metrics.get(key)
        return None if series is None else series.last

    def flat_config(self) -> dict[str, str]:
        """The configuration by dotted key; empty if there is none, it is not YAML, or has aliases.

        A run writes none, and with aliases a small file may stand for an endless table.
        """
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(self.config)):
                return {}
            return _flat(yaml.safe_load(self.config))
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}


def run_directories(path: Path) -> list[Path]:
    """The run directories at `path`: the directory itself, or the jobs of a multirun in it, by number.

    Raises:
        ValueError: `path` is no directory, or neither that of a run nor that of a multirun.
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
    """Reads the runs; each gets a unique label: its directory's name and, for a multirun's job, its own overrides."""
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
    """A long text with its middle left out, so that both ends are visible."""
    if len(text) <= length:
        return text
    tail = (length - len(_MIDDLE) + 1) // 2
    return text[: length - len(_MIDDLE) - tail] + _MIDDLE + text[-tail:]


def shorten_name(name: str, length: int = 34) -> str:
    """A long module name with its words cut short but not their numbers: names often differ in the middle."""
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
    metrics, by_layer = _read_metrics(path / file_names.METRICS, remarks)
    held = _read_json(path / file_names.LAYERS, remarks) or {}
    vectors = _vectors(held.get("layers"))
    findings = _read_json(path / file_names.AUDIT, remarks)
    audit = None if findings is None else _findings(findings.get("findings"))
    step = held.get("step")
    return Run(
        label=label,
        path=path,
        metrics=metrics,
        # First layers.json, which lists every layer; the records may begin with the layers that are not frozen.
        layers=list(dict.fromkeys([*vectors, *by_layer])),
        by_layer=by_layer,
        vectors=vectors,
        vectors_step=step if isinstance(step, int) else None,
        config=_read_text(path / file_names.CONFIG, remarks),
        audit=audit,
        environment=_flat(_read_json(path / file_names.ENVIRONMENT, remarks) or {}),
        summary=_read_json(path / file_names.SUMMARY, remarks),
        operators=_read_text(path / file_names.PROFILE / file_names.OPERATORS, remarks),
        mistakes=_read_json(path / file_names.MISTAKES, remarks),
        has_checkpoint=any((path / file_names.CHECKPOINTS).glob("step_*.pt")),
        remarks=remarks,
    )


def _read_metrics(path: Path, remarks: list[str]) -> tuple[dict[str, Series], dict[str, dict[str, Series]]]:
    """The metrics of the run and those of its layers, as in `Run.metrics` and `Run.by_layer`."""
    if not _is_readable(path, remarks):
        return {}, {}
    try:
        # Only "\n" ends a line: other line ends may stand in text.
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            recorded, found = read_records(lines)
    except OSError as error:
        remarks.append(f"{path.name} could not be read: {error.strerror}")
        return {}, {}
    remarks += [f"{path.name}: {remark}" for remark in found]
    metrics: dict[str, Series] = {}
    by_layer: dict[str, dict[str, Series]] = {}
    for key, series in recorded.items():
        if (of_layer := layer_and_kind(key)) is not None:
            by_layer.setdefault(of_layer[0], {})[of_layer[1]] = series
        else:
            metrics[key] = series
    return metrics, by_layer


def _vectors(layers: Any) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for name, kinds in layers.items() if isinstance(layers, dict) else ():
        found[name] = {}
        for kind, values in kinds.items() if isinstance(kinds, dict) else ():
            numbers = [number_of(value) for value in values] if isinstance(values, list) else []
            finite = [number for number in numbers if number is not None and math.isfinite(number)]
            if finite:
                found[name][kind] = finite
    return found


def _findings(findings: Any) -> list[dict[str, str]]:
    if not isinstance(findings, list):
        return []
    return [{key: str(value) for key, value in finding.items()} for finding in findings if isinstance(finding, dict)]


def _is_readable(path: Path, remarks: list[str]) -> bool:
    """Whether the file is there; what is no regular file adds a remark."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            remarks.append(f"{path.name} is no regular file")
        return path.is_file()
    except OSError as error:
        remarks.append(f"{path.name} could not be read: {error.strerror}")
        return False


def _read_text(path: Path, remarks: list[str]) -> str:
    if not _is_readable(path, remarks):
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        remarks.append(f"{path.name} could not be read: {error.strerror}")
        return ""


def _read_json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is absent or empty, or damaged, which adds a remark."""
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
    """Nested mappings as one flat dictionary of strings, by dotted key; a list is one value."""
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for name, item in value.items():
            flat |= _flat(item, f"{key}.{name}" if key else str(name))
        return flat
    return {key: "null" if value is None else str(value)} if key else {}
