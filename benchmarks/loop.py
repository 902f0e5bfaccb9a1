"""What a step of the trainer costs next to a bare loop, and what logging costs.

torchrun --nproc-per-node 2 benchmarks/loop.py [--overrides data=fashion_mnist batch_size=128] [--json FILE]
torchrun --nproc-per-node 2 benchmarks/loop.py --compare bn.fuse=true bn.fuse=false [--overrides ...] [--json FILE]

The bare loop has the same model, data, augmentation, DDP, optimizer and schedule, and nothing else: no check whether
the loss is finite, no totals over ranks, no logging. Variants take turns in random order, each in a loop made anew;
five rounds. A round measures the steps 50 to 150 of each, which hold two logging steps (log_every=50). Printed are
ratios to the bare loop of the same round: the median, and in brackets the smallest and the largest. "Bare again" is
the noise.

With --compare: the trainer with the first setting and with the second one, in the same way; ratios of samples per
second to the second, which also runs twice. A setting may be several overrides in quotes, or "" for none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from syncbn.training import data as datasets
from syncbn.training import launch, losses, optimizers, schedules, tasks
from syncbn.training.config import Config
from syncbn.training.loaded import build_model
from syncbn.training.loop import Trainer
from syncbn.training.parsing import parse
from syncbn.training.place import Place
from syncbn.training.sampling import Sampler

ROOT = Path(__file__).parents[1]
FIRST, LAST = 50, 150  # the steps that are measured
ROUNDS = 5
LOGGING = {
    "trainer": [],
    "trainer, no logging": ["tracker=none", f"log_every={LAST}"],
    "trainer, logging every step": ["log_every=1"],
}


def configure(overrides: list[str]) -> Config:
    """The configuration of train.py for 150 steps and no evaluation among them."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse(compose("train", [f"duration={LAST}", f"eval_every={LAST}", *overrides]))


def bare_loop(config: Config, place: Place) -> float:
    """Seconds of the measured steps."""
    data = datasets.load(config.data)
    model = build_model(config, data, place)
    sampler = Sampler(len(data.train), config.batch_size, 1, config.seed, place.rank, place.world_size)
    wrapped = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    optimizer = optimizers.build(config.optimizer, model)
    schedule = LambdaLR(optimizer, schedules.build(config.schedule, LAST, sampler.steps_per_epoch))
    loss = losses.build(config.loss, data)
    model.train()
    for step in range(LAST):
        if step == FIRST:
            began = time.perf_counter()
        [shard] = sampler.shards(step)
        images, labels = data.train_batch(shard.index, config.seed, sampler.epoch_of(step), place.dtype)
        optimizer.zero_grad(set_to_none=True)
        total, _ = loss(wrapped(images), labels)
        (total * (place.world_size / shard.num_global)).backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - began


def trainer_loop(config: Config, place: Place, directory: Path) -> float:
    """Seconds of the measured steps, from the beginning of one step to that of another."""
    began: list[float] = []
    train_step = Trainer._train_step

    def noting_the_time(trainer: Trainer, step: int) -> None:
        began.append(time.perf_counter())
        train_step(trainer, step)

    with ExitStack() as tracking, mock.patch.object(Trainer, "_train_step", noting_the_time):
        tasks.train(config, directory, place, [], tracking)
    return (began[-1] - began[FIRST]) * (LAST - FIRST) / (LAST - 1 - FIRST)


def main() -> None:
    """Measures all variants; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--compare", nargs=2, metavar="SETTING")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    launch.register_resolvers()
    dist.init_process_group("gloo")
    place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), torch.float32)
    plain = configure(arguments.overrides)
    scratch = [tempfile.mkdtemp() if place.is_first else ""]
    dist.broadcast_object_list(scratch)
    os.chdir(scratch[0])

    trained = LOGGING if arguments.compare is None else settings(*arguments.compare)
    seconds: dict[str, list[float]] = {}
    for round_ in range(ROUNDS):
        variants: dict[str, Callable[[], float]] = {}
        if arguments.compare is None:
            variants = {name: lambda: bare_loop(plain, place) for name in ("bare", "bare again")}
        for number, (name, overrides) in enumerate(trained.items()):
            directory = Path(scratch[0], f"{number}_{round_}")
            directory.mkdir(exist_ok=True)
            config = configure([*arguments.overrides, *overrides])
            variants[name] = lambda config=config, directory=directory: trainer_loop(config, place, directory)
        order = list(variants)
        random.Random(round_).shuffle(order)
        for name in order:
            dist.barrier()
            seconds.setdefault(name, []).append(variants[name]())
    dist.barrier()
    if place.is_first:
        report(seconds, "bare" if arguments.compare is None else list(trained)[-2], plain, arguments.json)
    dist.destroy_process_group()


def settings(first: str, second: str) -> dict[str, list[str]]:
    """Overrides of the two settings, and of the second once more, by name."""
    names = [first or "as it is", second or "as it is"]
    return {names[0]: shlex.split(first), names[1]: shlex.split(second), f"{names[1]} again": shlex.split(second)}


def report(seconds: dict[str, list[float]], baseline: str, config: Config, path: Path | None) -> None:
    """Prints the table, the baseline first; writes JSON if asked to."""
    print(f"torch {torch.__version__}, {platform.machine()}, {dist.get_world_size()} ranks, data={config.data.name}, "
          f"batch_size={config.batch_size}")  # fmt: skip
    is_bare = baseline == "bare"  # then what counts is time, and else what is done in it
    print(f"| loop | ms per step | {'to the bare loop' if is_bare else f'samples per second, to {baseline}'} |")
    print("|---|---|---|")
    rows = {}
    for name in sorted(seconds, key=lambda name: (name != baseline, f"{baseline} again" != name)):
        pairs = zip(seconds[name], seconds[baseline], strict=True)
        ratios = sorted(mine / other if is_bare else other / mine for mine, other in pairs)
        milliseconds = 1000 * statistics.median(seconds[name]) / (LAST - FIRST)
        rows[name] = {"ms": milliseconds, "ratios": ratios}
        middle = statistics.median(ratios)
        print(f"| {name} | {milliseconds:.2f} | {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |")
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
