"""Tracking on rank 0: metrics.jsonl always; wandb and TensorBoard as configured, whose failure ends no training."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.atomic_write import write_text
from syncbn.report import file_names
from syncbn.report.metric_names import (
    BETWEEN_RANK_SHARE,
    BN,
    DEAD_CHANNELS,
    FREEZE,
    LAYER_DRIFT,
    LAYER_TABLE,
    STEP,
    TEST,
    VALUES_PER_CHANNEL,
    of_layer,
)
from syncbn.stats.monitor import LayerSnapshot
from syncbn.training.config.errors import RankError
from syncbn.training.config.output import unwritable
from syncbn.training.config.redaction import redact
from syncbn.training.config.run import TrackerConfig
from syncbn.training.tracking.records import Records, jsonable
from syncbn.training.tracking.tensorboard_run import TensorBoardRun
from syncbn.training.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)

# wandb gets histograms again after a fiftieth of the steps done so far, and tables likewise. They are most of what it
# stores, and their number so grows with the logarithm of the steps: a million steps at the defaults stay under 1 GB
# (docs/tracking.md).
DENSITY = 50

# Layer metrics that are also recorded for the whole model, as the value of the worst layer: the largest or smallest.
_WORST = {LAYER_DRIFT: max, BETWEEN_RANK_SHARE: max, DEAD_CHANNELS: max, VALUES_PER_CHANNEL: min}


class Tracker:
    """Writes one record per logged step, with flat keys such as `val/loss`, to `metrics.jsonl`, wandb and TensorBoard.

    Its state is the id of the online wandb run, so that a resumed run continues the same one. wandb cannot continue an
    offline run: there, each attempt is a run of its own, in a group with the others. Training never waits for wandb.

    Args:
        full_config: what wandb records as the configuration of the run.
        active: True on rank 0; elsewhere every method does nothing.
    """

    def __init__(self, config: TrackerConfig, run_dir: Path, full_config: dict[str, Any], *, active: bool) -> None:
        self._config, self._run_dir, self._full_config, self._active = config, run_dir, full_config, active
        self._records: Records | None = None
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoardRun | None = None
        self._id: str | None = None
        self._warned = False
        self._in_full: dict[str, int] = {}  # the latest step that trackers got histograms of, and a table
        if active:
            self._records = Records(run_dir / file_names.METRICS)

    def start(self, step: int = 0) -> None:
        """Starts the wandb run and TensorBoard's files; a state has to be loaded before, as it has the run's id.

        Args:
            step: the step at which this attempt begins.
        """
        if self._active and self._config.tensorboard:
            self._tensorboard = TensorBoardRun(self._run_dir, step, self._full_config)
        if not self._active or self._config.mode == "disabled":
            return
        online = self._config.mode == "online"
        if online and self._id is None:
            self._id = secrets.token_hex(4)  # chosen here: a checkpoint may store it before the server answers
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
        """The id of the online run (None without one), and the name of the run directory to which it belongs."""
        return {"id": self._id, "run": self._run_dir.name}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes over the id, unless it belongs to another run, from whose checkpoint this one starts."""
        if state_dict["run"] == self._run_dir.name:
            self._id = state_dict["id"]

    def log(self, step: int, metrics: Mapping[str, float], layers: Mapping[str, LayerSnapshot] | None = None) -> None:
        """Records metrics, and scalars per layer under `bn/<layer>/`.

        wandb and TensorBoard also get histograms over channels, of fewer of the steps the longer a run is; see DENSITY.
        """
        if self._records is None:
            return
        record: dict[str, Any] = {STEP: step, **metrics}
        of_layers = {name: layer.scalars() for name, layer in (layers or {}).items()}
        for name, scalars in of_layers.items():
            record |= {of_layer(name, key): value for key, value in scalars.items()}
        for key, worst in _WORST.items():
            values = [scalars[key] for scalars in of_layers.values() if key in scalars]
            if values:  # NaN is the worst value; max and min may miss it, since it compares as false
                record[f"{BN}/{worst.__name__}_{key}"] = next(filter(math.isnan, values), worst(values))
        self._records.append(record)
        if self._wandb is None and self._tensorboard is None:
            return
        vectors = _vectors(layers) if layers and self._is_chosen("histograms", step) else {}
        if self._wandb is not None:
            self._wandb.do(lambda run: run.log({**record, **_histograms(vectors)}))
        if self._tensorboard is not None:
            self._tensorboard.log(step, record, vectors)

    def show_layers(self, step: int, layers: Mapping[str, LayerSnapshot]) -> None:
        """Records all layers: values per channel in `layers.json` (of the latest step only), and a table in wandb.

        The longer a run is, the fewer of the steps have a table; see DENSITY.
        """
        if self._records is None:
            return
        vectors = {
            name: {kind: [jsonable(value) for value in vector.tolist()] for kind, vector in layer.vectors().items()}
            for name, layer in layers.items()
        }
        try:
            write_text(self._run_dir / file_names.LAYERS, json.dumps({"step": step, "layers": vectors}) + "\n")
        except OSError as error:  # a view of the state, and not the state
            if not self._warned:
                log.warning("%s; training goes on", unwritable(error))
            self._warned = True
        if self._wandb is not None and self._is_chosen("table", step):
            self._wandb.do(lambda run: run.log({STEP: step, LAYER_TABLE: _table(layers)}))

    def _is_chosen(self, what: str, step: int) -> bool:
        """Whether wandb gets this step's layers in full: a fiftieth of the steps has passed since the last time."""
        chosen = what not in self._in_full or (step - self._in_full[what]) * DENSITY >= step
        if chosen:
            self._in_full[what] = step
        return chosen

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Writes the final values to wandb's summary."""
        if self._wandb is not None:
            self._wandb.do(lambda run: run.summary.update(dict(metrics)))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Closes the files and ends the wandb run.

        Raises:
            RankError: records could not be written; if the run has failed anyway, that is a warning.
        """
        if self._wandb is not None:
            self._wandb.finish(failed=failed)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._records is not None:
            try:
                self._records.close()
            except RankError as error:
                if not failed:
                    raise
                log.warning("%s", error)


def _table(layers: Mapping[str, LayerSnapshot]) -> Any:
    """A wandb table: a row per layer, in the order of the model, and a column per scalar that any layer has."""
    import wandb

    rows = [(name, layer.scalars()) for name, layer in layers.items()]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    # wandb sorts the rows that it shows by name; the position column allows sorting by the model's order.
    data = [[position, name, *map(row.get, columns)] for position, (name, row) in enumerate(rows)]
    return wandb.Table(columns=["position", "layer", *columns], data=data)


def _histograms(vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _histogram(vector) for name, vector in vectors.items()}


def _vectors(layers: Mapping[str, LayerSnapshot]) -> dict[str, Tensor]:
    """What histograms are of: the finite values over channels, by the name of the histogram."""
    return {
        of_layer(name, f"hist/{kind}"): finite
        for name, layer in layers.items()
        for kind, vector in layer.vectors().items()
        if len(finite := vector[vector.isfinite()])
    }


def _histogram(vector: Tensor) -> Any:
    import numpy as np
    import wandb

    low, high = vector.min().item(), vector.max().item()
    scale = max(-low, high)
    if high - low <= max(1e-9 * scale, 1e-300):  # equal up to rounding: numpy rejects bins this narrow
        low, high = low - max(0.5, 1e-9 * scale), high + max(0.5, 1e-9 * scale)
    return wandb.Histogram(np_histogram=np.histogram(vector.numpy(), bins=64, range=(low, high)))


def cut_back(metrics: Path, step: int | None) -> None:
    """Removes the records of `metrics.jsonl` that a run resumed at `step` writes again.

    Those are the records of later steps, test results, and what was frozen or unfrozen at this step. The file is
    replaced atomically.

    Args:
        step: None removes all records.
    """
    if not metrics.exists():
        return
    kept, num_damaged = [], 0
    lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines:
        try:
            record: dict[str, Any] = json.loads(line)
            recorded = int(record[STEP])
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            num_damaged += bool(line.strip()) and line is not lines[-1]  # a kill may leave a last line incomplete
            continue
        again = {TEST} | ({FREEZE} if recorded == step else set())
        if step is not None and recorded <= step and not again & {key.split("/")[0] for key in record}:
            kept.append(line + "\n")
    if num_damaged:
        log.warning("%s: %d damaged line(s) are left out", metrics, num_damaged)
    write_text(metrics, "".join(kept))
