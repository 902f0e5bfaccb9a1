"""Tracking: metrics.jsonl always, wandb beside it. Written by rank 0; tracking can fail, training goes on."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from syncbn.atomic_write import write_text
from syncbn.report.metric_names import BN, LAYER_TABLE, of_layer
from syncbn.stats.monitor import LayerSnapshot
from syncbn.training.config.redaction import redact
from syncbn.training.config.run import TrackerConfig
from syncbn.training.tracking.wandb_run import WandbRun

# One number for the whole model: of the layer that is worst off.
_WORST = {"drift": max, "between_rank_share": max, "dead_channels": max, "values_per_channel": min}


class Tracker:
    """One record per logged step, flat keys with `/`, in `metrics.jsonl` and in wandb.

    Its state is the id of the online wandb run, so that it goes on as the same one. wandb cannot continue an offline
    run: there, each attempt is a run of its own, in a group with the others. Training never waits for wandb.

    Off rank 0 every method does nothing.
    """

    def __init__(self, config: TrackerConfig, run_dir: Path, full_config: dict[str, Any], *, active: bool) -> None:
        self._config, self._run_dir, self._full_config, self._active = config, run_dir, full_config, active
        self._file: TextIO | None = None
        self._wandb: WandbRun | None = None
        self._id: str | None = None
        if active:
            # Line-buffered: a line is written whole or, after a kill, not at all.
            self._file = (run_dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")

    def start(self) -> None:
        """Starts the wandb run; a state that is to be loaded has to be there."""
        if not self._active or self._config.mode == "disabled":
            return
        online = self._config.mode == "online"
        if online and self._id is None:
            self._id = secrets.token_hex(4)  # our own: a checkpoint may need it before a server has answered
        options = {
            "project": redact(self._config.project),
            "group": redact(self._config.group or self._run_dir.name),
            "job_type": self._full_config.get("task"),
            "name": self._run_dir.name,
            "id": self._id,
            "dir": self._run_dir,
            "config": self._full_config,
        }
        self._wandb = WandbRun(options, online=online, timeout=self._config.timeout)

    def state_dict(self) -> dict[str, Any]:
        """The id of the online run (None: there was none), and the name of the run directory that it belongs to."""
        return {"id": self._id, "run": self._run_dir.name}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes the id over, unless it is that of another run, whose checkpoint this one starts from."""
        if state_dict["run"] == self._run_dir.name:
            self._id = state_dict["id"]

    def log(self, step: int, metrics: Mapping[str, float], layers: Mapping[str, LayerSnapshot] | None = None) -> None:
        """Records numbers, and per layer scalars under `bn/<layer>/` (in wandb histograms over channels too)."""
        if self._file is None:
            return
        record: dict[str, Any] = {"step": step, **metrics}
        of_layers = {name: layer.scalars() for name, layer in (layers or {}).items()}
        for name, scalars in of_layers.items():
            record |= {of_layer(name, key): value for key, value in scalars.items()}
        for key, worst in _WORST.items():
            values = [scalars[key] for scalars in of_layers.values() if key in scalars]
            if values:  # what is not a number is worse than all numbers, and compares with none
                record[f"{BN}/{worst.__name__}_{key}"] = next(filter(math.isnan, values), worst(values))
        self._file.write(json.dumps({key: _jsonable(value) for key, value in record.items()}) + "\n")
        if self._wandb is not None:
            self._wandb.do(lambda run: run.log({**record, **_histograms(layers or {})}))

    def show_layers(self, step: int, layers: Mapping[str, LayerSnapshot]) -> None:
        """All layers at this step, channel by channel in `layers.json` (the latest only), in wandb as a table."""
        if self._file is None:
            return
        vectors = {
            name: {kind: [_jsonable(value) for value in vector.tolist()] for kind, vector in layer.vectors().items()}
            for name, layer in layers.items()
        }
        write_text(self._run_dir / "layers.json", json.dumps({"step": step, "layers": vectors}) + "\n")
        if self._wandb is not None:
            self._wandb.do(lambda run: run.log({"step": step, LAYER_TABLE: _table(layers)}))

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Final values, in wandb's summary."""
        if self._wandb is not None:
            self._wandb.do(lambda run: run.summary.update(dict(metrics)))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Closes the file and ends the wandb run."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(failed=failed)


def _table(layers: Mapping[str, LayerSnapshot]) -> Any:
    """A row per layer, in the order of the model; a column per number that any of them has."""
    import wandb

    rows = [(name, layer.scalars()) for name, layer in layers.items()]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    # wandb sorts what it shows by name: the position keeps the model's order within reach.
    data = [[position, name, *map(row.get, columns)] for position, (name, row) in enumerate(rows)]
    return wandb.Table(columns=["position", "layer", *columns], data=data)


def _histograms(layers: Mapping[str, LayerSnapshot]) -> dict[str, Any]:
    return {
        of_layer(name, f"hist/{kind}"): _histogram(finite)
        for name, layer in layers.items()
        for kind, vector in layer.vectors().items()
        if len(finite := vector[vector.isfinite()])
    }


def _histogram(vector: Tensor) -> Any:
    import numpy as np
    import wandb

    low, high = vector.min().item(), vector.max().item()
    scale = max(-low, high)
    if high - low <= max(1e-9 * scale, 1e-300):  # equal but for rounding: bins that narrow are an error to numpy
        low, high = low - max(0.5, 1e-9 * scale), high + max(0.5, 1e-9 * scale)
    return wandb.Histogram(np_histogram=np.histogram(vector.numpy(), bins=64, range=(low, high)))


def _jsonable(value: float) -> float | str:
    """JSON has no NaN and no infinity: as strings they stay readable by every parser."""
    return value if math.isfinite(value) else str(value)


def cut_back(metrics: Path, step: int | None) -> None:
    """Removes what a run that goes on from `step` records again: later records, test results, and what is frozen from
    this step on. None: everything.
    """
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, left by a kill
        again = {"test"} | ({"freeze"} if record["step"] == step else set())
        if step is not None and record["step"] <= step and not again & {key.split("/")[0] for key in record}:
            kept.append(line + "\n")
    write_text(metrics, "".join(kept))
