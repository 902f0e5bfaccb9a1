"""Loading a checkpoint for the tasks with `load`: data and model are built by the configuration of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from syncbn.report.metric_names import prefixed
from syncbn.training.checkpoint import files, state
from syncbn.training.checkpoint.resume import is_below, require_secrets
from syncbn.training.config.data import DataConfig, OpenData
from syncbn.training.config.errors import ConfigError, configured_by
from syncbn.training.config.keys import READERS
from syncbn.training.config.parsing import apply_overrides, of_command, parse, to_dict
from syncbn.training.config.redaction import redacted
from syncbn.training.config.run_files import require_regular_files
from syncbn.training.config.schema import Config
from syncbn.training.config.trust import Command, check_stored
from syncbn.training.data import dataset, registry
from syncbn.training.data.dataset import ModelShape
from syncbn.training.data.loader import Loader
from syncbn.training.data.whole_folder import load_whole
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.evaluation.evaluate import evaluate
from syncbn.training.evaluation.metrics import build_metrics
from syncbn.training.evaluation.mistakes import Mistakes
from syncbn.training.launch.overrides import held_back
from syncbn.training.losses import class_weights, losses
from syncbn.training.models.pretrained import load_pretrained
from syncbn.training.tasks.sweeps import jobs_of
from syncbn.training.tracking.console import shown
from syncbn.training.tracking.tracker import Tracker
from syncbn.training.trainer.build import build_model, context_for

# Keys that a task reads from its own command line, not from the configuration of the training.
OWN_KEYS = ("eval", "audit", "recalibrate", "export", "predict", "init")


@dataclass(frozen=True)
class LoadedRun:
    """A model restored from a checkpoint, with the configuration, rank context and data to use it."""

    path: Path
    step: int
    weights: str
    """Which of the checkpoint's weights the model has: "raw", or "ema" for the averaged ones."""
    config: Config
    """That of the training with the command line's overrides; no `bn.virtual_ranks`, which are for training only."""
    context: RankContext
    data: dataset.Data
    model: nn.Module
    class_weights: Tensor | None = None

    def describe(self) -> str:
        """The checkpoint in words, for the head of a table."""
        others = "".join(f", {name} of {init.path}" for name, init in self.config.init.items())
        return f"{self.path}, step {self.step}, {'averaged' if self.weights == 'ema' else 'raw'} weights{others}"

    def evaluate(self, *splits: str, mistakes: Mistakes | None = None) -> dict[str, float]:
        """Evaluates the model on some of "train", "val" and "test"; every rank has to call it.

        A test split that the data set lacks is left out.

        Args:
            mistakes: is shown the validation split.

        Returns:
            `<split>/loss`, `<split>/accuracy` and the other metrics, the same on every rank.
        """
        with configured_by(self.path):
            loss = self.loss()
            own = build_metrics(self.config.metrics, self.data.num_classes)
            data = losses.with_known_labels(self.data, loss, self.config.data)
        metrics: dict[str, float] = {}
        with self.loader(data) as loader:
            for name in splits:
                split = getattr(data, name)
                if split is None:
                    continue
                values = evaluate(
                    self.model, data, split, loss, self.context, metrics=own, loader=loader,
                    mistakes=mistakes if name == "val" else None,
                )  # fmt: skip
                metrics |= prefixed(name, values)
        return metrics

    def mistakes(self) -> Mistakes | None:
        """A collector of mistakes for `evaluate`; None if the run was to have no report. Every rank has to call it."""
        with configured_by(self.path):
            loss = self.loss()
        return Mistakes(self.data, loss, self.config.tracker.examples) if self.config.tracker.report else None

    def loss(self) -> losses.Loss:
        """The loss of the training, its class weights those that the checkpoint stores; every rank has to call it."""
        return losses.build_loss(self.config.loss, self.data, self.class_weights)

    def loader(self, data: dataset.Data | None = None) -> Loader:
        """A loader of `data`, by default the run's, with the configured workers; it is a context manager."""
        return Loader(
            data if data is not None else self.data,
            self.context,
            workers=self.config.data.workers,
            prefetch=self.config.data.prefetch,
        )

    def record(self, run_dir: Path, metrics: dict[str, float]) -> None:
        """Appends metrics to `metrics.jsonl` of a run directory, at the checkpoint's step."""
        tracker = replace(self.config.tracker, mode="disabled", tensorboard=False)
        with Tracker(tracker, run_dir, redacted(to_dict(self.config)), active=self.context.is_first) as records:
            records.start()
            records.log(self.step, metrics)


@dataclass(frozen=True)
class OpenedRun:
    """A checkpoint that has been read and checked, with the configuration for using it; it needs no data set yet."""

    path: Path
    checkpoint: dict[str, Any]
    weights: str
    """See `LoadedRun`."""
    state: dict[str, Tensor]
    """The state dict of those weights."""
    config: Config
    """See `LoadedRun`."""

    def model(self, shape: ModelShape, context: RankContext) -> nn.Module:
        """Builds the model and loads it, and sub-networks of other runs that `init` names; every rank calls it.

        Args:
            context: that of `config`, see `context_for`.

        Raises:
            ConfigError: on every rank: the model cannot be built, or a state does not fit.
        """
        with configured_by(self.path, held_back()):
            model = build_model(self.config, shape, context)
        with failing_together():
            state.load_into(model, self.state, self.path, "load")
            load_pretrained(model, self.config.init)
        return model


def open_run(config: Config, run_dir: Path) -> OpenedRun:
    """Reads the checkpoint that `load` names.

    Raises:
        ConfigError: `load` names no checkpoint of a run, or one without the chosen weights; `run_dir` already contains
            a training run, or the checkpoint itself; the stored configuration names code that this command does not
            trust.
    """
    require_regular_files(run_dir)
    path, checkpoint = _read(config, run_dir)
    weights, content = _choose_weights(checkpoint, config.eval.weights, path)
    mine, given = to_dict(config), held_back()
    command = Command(mine, config.trust, replaced=apply_overrides({}, given))
    check_stored(_that_is_run(checkpoint["config"], config.task), "load", path, command)
    with configured_by(path):
        parse(checkpoint["config"] | of_command(config))
    stored = apply_overrides(checkpoint["config"], given) | {key: mine[key] for key in OWN_KEYS}
    require_secrets(stored, path, unused=("tracker",))
    trained = parse(stored | of_command(config))
    trained.bn.virtual_ranks = None
    return OpenedRun(path, checkpoint, weights, content, trained)


def load_run(config: Config, run_dir: Path, context: RankContext) -> LoadedRun:
    """Loads the checkpoint that `load` names, and its data, or those of `eval.path`; every rank calls it.

    Raises:
        ConfigError: on every rank: see `open_run` and `OpenedRun.model`; the data cannot be loaded.
    """
    with failing_together():  # building the model may be a collective: a rank that cannot read fails all
        opened = open_run(config, run_dir)
        with configured_by(opened.path, [*held_back(), "eval.path"]):
            data = dataset.as_trained(_data(opened, config.task), opened.checkpoint)
    trained = opened.config
    context = context_for(trained, context)
    step = int(opened.checkpoint["step"])
    return LoadedRun(opened.path, step, opened.weights, trained, context, data, opened.model(data, context),
                     class_weights.stored(opened.checkpoint))  # fmt: skip


def _data(opened: OpenedRun, task: str) -> dataset.Data:
    """The data set of the training, or that of `eval.path`."""
    path = opened.config.eval.path
    if path is None:
        return registry.load_data(_that_is_read(opened.config.data, task))
    return load_whole(opened.config.data, path, opened.checkpoint.get("data", {}).get("classes", []))


def _that_is_run(stored: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """The stored configuration, in which transforms of training images are no code where this task runs none.

    Their values stay to be looked at: an interpolation in them would be resolved all the same.
    """
    data = stored.get("data")
    if task in READERS["data.augment"] or not isinstance(data, Mapping) or "_target_" in data:
        return stored
    return {**stored, "data": {key: _as_data(value) if key == "augment" else value for key, value in data.items()}}


def _as_data(value: Any) -> Any:
    """Containers with the keys that ask for a call (`_target_`, `_args_`) renamed."""
    if isinstance(value, Mapping):
        return {str(key).strip("_"): _as_data(item) for key, item in value.items()}
    return [_as_data(item) for item in value] if isinstance(value, list | tuple) else value


def _that_is_read(config: DataConfig, task: str) -> DataConfig:
    if task in READERS["data.augment"] or isinstance(config, OpenData):
        return config
    return replace(config, augment={})


def _read(config: Config, run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The file that `load` names and its content; a ConfigError if `run_dir` contains it, or a training run."""
    if files.newest(run_dir) is not None:
        raise ConfigError(f"run: {shown(run_dir)} holds a training run; choose another name, load={shown(run_dir)}")
    assert config.load is not None
    if jobs := jobs_of(Path(config.load), "load"):
        raise ConfigError(f"load: {config.load!r} is a multirun of {len(jobs)} jobs, which task=predict alone takes;"
                          f" give one of them, load={shown(jobs[0])}")  # fmt: skip
    stored = files.read_best_or_newest(Path(config.load), "load")
    if is_below(stored.path, run_dir):
        raise ConfigError(f"run: {shown(run_dir)} holds what load names, which is never changed; choose another name")
    stored.require_run("load")
    return stored.path, stored.content


def _choose_weights(checkpoint: dict[str, Any], choice: str, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The chosen weights, "raw" or "ema", and their state dict.

    Raises:
        ConfigError: the checkpoint does not contain the weights of `eval.weights`.
    """
    if "average" in checkpoint:
        weights = "raw" if choice == "raw" else "ema"
        return weights, checkpoint["average" if weights == "ema" else "model"]
    # The file has a single state dict: the best model, or a recalibrated one, which records its kind of weights.
    averaged = any(checkpoint["config"].get(key) is not None for key in ("ema", "swa"))
    weights = checkpoint.get("weights", "ema" if averaged else "raw")
    if choice == "ema" and weights == "raw":
        raise ConfigError(f"eval.weights=ema: {path} holds no averaged weights; use eval.weights=auto or raw")
    if choice == "raw" and weights == "ema":
        raise ConfigError(
            f"eval.weights=raw: {path} holds the averaged weights alone; load a checkpoint of some step instead,"
            " load=.../checkpoints/step_....pt"
        )
    return weights, checkpoint["model"]
