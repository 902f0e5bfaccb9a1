"""`task=check`: looks at every file and label of a data set once, before a run does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from syncbn.atomic_write import write_text
from syncbn.report import file_names
from syncbn.training.checkpoint import files
from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.config.schema import Config
from syncbn.training.data import workers as processes
from syncbn.training.data.inspection.inventory import Inventory, take_inventory
from syncbn.training.data.inspection.parts import locate, look_at
from syncbn.training.data.inspection.records import RULES, Finding, Record
from syncbn.training.data.inspection.summary import DatasetTally, summarize
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown

log = logging.getLogger(__name__)

_CHUNK = 16  # samples that a rank, or a worker, is given at once
_SHOWN_FINDINGS, _SHOWN_CLASSES = 5, 40  # on the console, of each rule and in all; check.json has everything
_LOGGED_FROM = 2000  # samples of a rank from which on progress is logged where there is no terminal


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Looks at all samples, dealt to the ranks; rank 0 writes `check.json` and prints a table. Returns no metrics.

    Raises:
        ConfigError: on every rank: the data set cannot be found at all; `run_dir` holds a training run.
        TrainingError: on every rank: there are findings.
    """
    with failing_together():
        if files.newest(run_dir) is not None:
            raise ConfigError(f"run: {shown(run_dir)} holds a training run; choose another name")
        inventory = take_inventory(config.data)
    mine = DatasetTally()
    for position, record in _records(inventory, config.data.workers, context):
        mine.add(position, locate(inventory.parts, position)[0].split, record)
    tally = DatasetTally()
    for part in world.on_all_ranks(mine):
        tally.merge(part)
    content = {"data": config.data.name, **summarize(inventory, tally)}
    findings = [Finding(**finding) for finding in content["findings"]]
    if context.is_first:
        write_text(run_dir / file_names.CHECK, json.dumps(content, indent=2) + "\n")
        _print(content, findings, run_dir)
    if findings:
        first, more = findings[0], f" ({len(findings)} findings)" if len(findings) > 1 else ""
        raise TrainingError(f"check: {first.rule}: {first.line()}{more}; see {shown(run_dir / 'check.json')}")
    return {}


def _records(inventory: Inventory, workers: int, context: RankContext) -> Iterator[tuple[int, Record]]:
    """Position and record of each of this rank's samples."""
    positions = range(len(inventory))
    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
    mine = chunks[context.rank :: context.world_size]
    num_samples, done = sum(map(len, mine)), 0
    with console.progress(num_samples, 0, context.is_first, "sample") as show:
        for found in processes.each(inventory.parts, look_at, mine, workers):
            yield from found
            before, done = done, done + len(found)
            if show is not None:
                show(done)
            elif num_samples >= _LOGGED_FROM and 10 * done // num_samples > 10 * before // num_samples:
                log.info("%d of %d samples of this rank", done, num_samples)


def _print(content: dict[str, Any], findings: list[Finding], run_dir: Path) -> None:
    """Tables of splits and classes, the first findings of each rule, and notes."""
    splits = content["splits"]
    console.print_rows("check: splits", ("", *splits), [
        (name, *(describe(split) for split in splits.values()))
        for name, describe in (
            ("samples", lambda split: str(split["samples"])),
            ("sizes", _sizes),
            ("kinds", lambda split: ", ".join(f"{kind} {count}" for kind, count in split["kinds"].items())),
            ("mean", lambda split: _numbers(split.get("mean", []))),
            ("std", lambda split: _numbers(split.get("std", []))),
        )
    ])  # fmt: skip
    if names := content["classes"][:_SHOWN_CLASSES]:
        left_out = len(content["classes"]) - len(names)
        title = "check: classes" + (f" (and {left_out} more in check.json)" if left_out else "")
        rows = [(name, *(_count(split["classes"][name]) for split in splits.values())) for name in names]
        console.print_rows(title, ("class", *splits), rows)
    for rule in RULES:
        found = [finding for finding in findings if finding.rule == rule]
        if found:
            console.CONSOLE.print(f"{rule} ({len(found)}): {RULES[rule]}", markup=False)
        for finding in found[:_SHOWN_FINDINGS]:
            console.CONSOLE.print(f"  {finding.line()}", markup=False)
        if len(found) > _SHOWN_FINDINGS:
            console.CONSOLE.print(f"  and {len(found) - _SHOWN_FINDINGS} more", markup=False)
    for note in content["notes"]:
        console.CONSOLE.print(f"note: {note}", markup=False)
    console.print_table("check (docs/data.md)", [("findings", str(len(findings))), ("run directory", shown(run_dir))])


def _sizes(split: dict[str, Any]) -> str:
    sizes = split["sizes"]
    if not sizes["distinct"]:
        return ""
    ends = ["x".join(map(str, sizes[name])) for name in ("smallest", "largest")]
    return ends[0] if sizes["distinct"] == 1 else f"{sizes['distinct']}, {ends[0]} to {ends[1]}"


def _count(counts: dict[str, int]) -> str:
    return str(counts["samples"]) + (f" ({counts['pixels']} pixels)" if "pixels" in counts else "")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
