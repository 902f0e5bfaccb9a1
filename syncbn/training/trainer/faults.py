"""The error for a step whose loss or gradient is not finite: the samples to look at, and how to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from syncbn.report import file_names
from syncbn.training.config.errors import TrainingError, listed
from syncbn.training.config.output import output_root, short
from syncbn.training.config.schema import Config
from syncbn.training.data.by_size import each_size
from syncbn.training.data.dataset import Data
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext

_NAMED = 10  # samples in a message, of each rank; all of them are in the file


class NonFiniteError(TrainingError):
    """The loss or the gradient of a step is not finite; the message names the samples to look at."""


def find_fault(
    step: int, ranks: list[int], sampler: Sampler, data: Data, context: RankContext, run_dir: Path
) -> NonFiniteError:
    """Builds the error: it names the samples with pixels that are not finite, or else all samples of these ranks.

    One sample is enough to make the statistics of a synchronized layer NaN, and with them the loss of every rank. Where
    there are more samples than a message can name, rank 0 appends all of them to a file in the run directory.

    Args:
        ranks: those whose loss was not finite; empty if it was the gradient, which means all ranks.
    """
    what = "loss" if ranks else "gradient"
    samples = {rank: sampler.samples(step, rank) for rank in (ranks if ranks else range(context.world_size))}
    index, epoch = torch.cat(list(samples.values())), sampler.epoch_of(step)
    batch = data.train_batch(index, sampler.seed, epoch, context.dtype)
    culprits = [
        sample
        for part, images, _ in each_size(index, *batch)
        for sample in part[~images.flatten(1).isfinite().all(1)].tolist()
    ]
    seen = {rank: part.tolist() for rank, part in samples.items()}
    by_rank = "; ".join(f"rank {rank}: {_listed(part)}" for rank, part in seen.items())
    where = f"samples with pixels that are not: {_listed(culprits)}" if culprits else f"samples of {by_rank}"
    record = {"step": step, "what": what, "samples_by_rank": seen, "with_pixels_that_are_not_finite": culprits}
    rest = ""
    if max(len(part) for part in ([culprits] if culprits else seen.values())) > _NAMED:
        path = run_dir / file_names.NONFINITE
        rest = f" (all are in {short(path)})"
        if context.is_first:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return NonFiniteError(f"step {step}: the {what} is not finite; training {where}{rest}")


def with_remedy(fault: NonFiniteError, config: Config, lr: float, checkpoint: Path, run_dir: Path) -> NonFiniteError:
    """The error with what is known of the step, and how to go on from the state before it.

    Args:
        lr: the learning rate of the step.
        checkpoint: holds that state.
    """
    run = os.path.relpath(run_dir, output_root(config.output_dir))
    clip = "clip_norm=1 (there is none now)" if config.clip_norm is None else f"a clip_norm below {config.clip_norm:g}"
    return NonFiniteError(
        f"{fault}; learning rate {lr:.3g}. The state before the step is saved, {short(checkpoint)}: the same command"
        f" with run={run} on_nonfinite=skip goes on from there without it; a lower optimizer.lr, or {clip}, needs a run"
        " from the beginning"
    )


def _listed(numbers: list[int]) -> str:
    return listed([*map(str, numbers)], _NAMED)
