"""Runs the task of a checked configuration, inside the job's process group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from syncbn.nn import rank_checks
from syncbn.nn.groups import world_of_one
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.redaction import redact
from syncbn.training.config.schema import Config
from syncbn.training.config.trust import check_origin
from syncbn.training.data import registry
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.launch.overrides import held_back
from syncbn.training.launch.process_group import process_group
from syncbn.training.tasks import audit, check, evaluate, export, parity, predict, recalibrate
from syncbn.training.tasks.measure_data import measure_loading
from syncbn.training.tasks.train import train
from syncbn.training.tracking.summary import write_summary
from syncbn.training.trainer.build import context_for

# The tasks that take a run or checkpoint from `load`.
WITH_LOAD = {
    "eval": evaluate.run,
    "audit": audit.run,
    "recalibrate": recalibrate.run,
    "export": export.run,
    "predict": predict.run,
}


def run(config: Config, run_dir: Path, job: str = "0", overrides: Sequence[str] = ()) -> dict[str, float]:
    """Runs the task on this rank; returns its metrics, the same on every rank but for the throughput.

    Args:
        job: a name that differs between the jobs of one multirun.
        overrides: those of the command line; a resumed run compares them with its stored configuration.

    Raises:
        ConfigError: a mistake in the configuration, found before training starts.
    """
    check_origin(config.trust, overrides)
    device = _device(config)
    context = context_for(config, RankContext(world.rank(), world.world_size(), device, torch.float32))
    checks = rank_checks.enabling(config.bn.debug)
    # The tracker closes after the process group is destroyed, so the other ranks do not wait for rank 0's upload.
    alone = nullcontext() if world.is_distributed() else world_of_one()
    with ExitStack() as tracking, process_group(device.type, job, config.collective_timeout), alone, checks:
        if config.task in WITH_LOAD:
            metrics = WITH_LOAD[config.task](config, run_dir, context)
            if context.is_first and metrics:
                given = [redact(override) for override in (*overrides, *held_back())]
                write_summary(run_dir, 0, metrics, given)  # its row in the table of a multirun
            return metrics
        if config.task == "parity":
            return parity.run(config, run_dir, context)
        if config.task == "check":
            return check.run(config, run_dir, context)
        if config.task == "data":
            return measure_loading(config, context, registry.load_data(config.data))
        return train(config, run_dir, context, overrides, tracking)


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here; use device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
