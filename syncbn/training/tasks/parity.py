"""`task=parity`: does what this configuration trains come out the same on several ranks as in one process?"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from syncbn.atomic_write import write_text
from syncbn.auditing.parity.errors import ParityError
from syncbn.auditing.parity.parity import compare
from syncbn.auditing.parity.rules import is_fault
from syncbn.auditing.rules import table
from syncbn.report import file_names
from syncbn.training.checkpoint import files
from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.config.schema import Config
from syncbn.training.data import registry
from syncbn.training.data.native import NativeData
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.losses import losses
from syncbn.training.models.build import build_network
from syncbn.training.models.pretrained import load_pretrained
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown
from syncbn.training.trainer.build import sampler_for
from syncbn.training.trainer.checks import build_freeze_plan
from syncbn.training.trainer.pixels import with_statistics_of_init

log = logging.getLogger(__name__)

SAMPLES_PER_RANK = 6  # of the largest world; enough for statistics that differ, few enough for the CPU


@dataclass(frozen=True)
class ConfiguredModel:
    """Builds the model of a configuration as its first step trains it; new processes import and call it."""

    config: Config
    num_channels: int
    num_classes: int | None
    steps_per_epoch: int

    def __call__(self) -> nn.Module:
        """The model in training mode, pretrained and frozen as configured."""
        torch.manual_seed(self.config.seed)
        model = build_network(self.config.model, self.config.bn, self.num_channels, self.num_classes)
        load_pretrained(model, self.config.init)
        build_freeze_plan(self.config, model, self.steps_per_epoch).apply(model, 0)
        return model.train()


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Compares one process with several, which it starts itself; writes `parity.json`, and returns no metrics.

    Raises:
        ConfigError: it was started by torchrun; nothing can be said about the model, or the time is up.
        TrainingError: there are findings.
    """
    if world.is_distributed():
        raise ConfigError("task=parity: starts its own ranks; use python train.py instead of torchrun")
    if files.newest(run_dir) is not None:
        raise ConfigError(f"run: {shown(run_dir)} holds a training run; choose another name")
    data = with_statistics_of_init(registry.load_data(config.data), config.init)
    if isinstance(data, NativeData):
        raise ConfigError("data.size: task=parity takes images of one size; give data.size=[HEIGHT,WIDTH]")
    loss = losses.build_loss(config.loss, data)
    sampler = sampler_for(config, data, context)
    num = min(config.batch_size, len(data.train), SAMPLES_PER_RANK * max(config.parity.world_sizes))
    batch = data.train_batch(sampler.shards(0)[0].index[:num], config.seed, 0, torch.float64)
    build = ConfiguredModel(config, data.num_channels, data.num_classes, sampler.steps_per_epoch)
    chosen = config.parity
    try:
        result = compare(
            build, loss, batch,
            world_sizes=chosen.world_sizes, steps=chosen.steps, timeout=chosen.timeout, report=log.info,
        )  # fmt: skip
    except (ParityError, ValueError) as error:
        raise ConfigError(f"parity: {error}") from None
    content = {
        "samples": num,
        "world_sizes": [asdict(size) for size in result.sizes],
        "findings": [finding.as_dict() for finding in result.findings],
    }
    write_text(run_dir / file_names.PARITY, json.dumps(content, indent=2) + "\n")
    console.CONSOLE.print(f"parity (docs/parity.md)\n{table(result.findings)}", markup=False)
    console.print_table("parity", [*((f"{one.world_size} ranks", one.in_words()) for one in result.sizes),
                                   ("run directory", shown(run_dir))])  # fmt: skip
    faults = [finding for finding in result.findings if is_fault(finding)]
    if faults:
        first, more = faults[0], f" ({len(faults)} findings)" if len(faults) > 1 else ""
        raise TrainingError(
            f"parity: {first.rule} in {first.layer or 'the model'}{more}; see {shown(run_dir / file_names.PARITY)}"
        )
    return {}
