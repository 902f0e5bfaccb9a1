"""`task=data`: the throughput of the data loader alone, without training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import torch

from syncbn.report.metric_names import LOADER_THROUGHPUT
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.schema import Config
from syncbn.training.data.by_size import parts_of
from syncbn.training.data.dataset import Data
from syncbn.training.data.decoding import Decoded
from syncbn.training.data.loader import Batch, Loader
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tracking import console


def measure_loading(config: Config, context: RankContext, data: Data) -> dict[str, float]:
    """Measures samples per second of the loader alone, summed over ranks, for the shorter of `duration` and an epoch.

    Every rank has to call it; all of them load at the same time. Timing begins after the first batch, so the start of
    the workers does not count. Where decoded images are cached, a second pass measures what later epochs get.

    Returns:
        `data/samples_per_second` of the last pass, the same on every rank.

    Raises:
        ConfigError: fewer than two steps to measure.
    """
    sampler = Sampler(
        len(data.train), config.batch_size, config.accumulate, config.seed, context.rank, context.world_size
    )
    num_steps = min(sampler.steps_per_epoch, Duration.parse(config.duration).in_steps(sampler.steps_per_epoch))
    if num_steps < 2:
        raise ConfigError(f"batch_size: expected two steps or more to measure, got {num_steps}; use a smaller one")
    has_cache = isinstance(data.train.images, Decoded) and data.train.images.cache is not None
    names = ["decoding", "from the cache"] if has_cache else ["loading"]
    rows, metrics = [], {}
    with Loader(data, context, workers=config.data.workers, prefetch=config.data.prefetch) as loader:
        for name in names:
            speeds = world.on_all_ranks(_speed(loader, sampler, config.seed, num_steps))
            rows += [(f"{name}, rank {rank}", f"{speed:.0f} samples/s") for rank, speed in enumerate(speeds)]
            rows += [(f"{name}, all ranks", f"{sum(speeds):.0f} samples/s")] if len(speeds) > 1 else []
            metrics[LOADER_THROUGHPUT] = sum(speeds)
    if context.is_first:
        workers = f"{config.data.workers} per rank, {config.data.prefetch} batches ahead each"
        rows += [
            ("workers", workers if config.data.workers else "none"),
            ("batches", f"{num_steps} of {config.batch_size} samples over {context.world_size} rank(s)"),
        ]
        console.print_table(f"data={config.data.name}, the loader alone", rows)
    return metrics


def _speed(loader: Loader, sampler: Sampler, seed: int, num_steps: int) -> float:
    """Samples per second of this rank, not counting the first batch."""
    batches = _batches(loader, sampler, seed)
    next(batches)
    start, num_samples = time.perf_counter(), 0
    for images, _ in islice(batches, (num_steps - 1) * len(sampler.shards(0))):
        num_samples += sum(map(len, parts_of(images)))
    if loader.context.device.type == "cuda":
        torch.cuda.synchronize(loader.context.device)
    return num_samples / (time.perf_counter() - start)


def _batches(loader: Loader, sampler: Sampler, seed: int) -> Iterator[Batch]:
    """This rank's micro-batches of steps 0, 1, ... without end."""
    step = 0
    while True:
        yield from loader.micro_batches(sampler, seed, step)
        step += 1
