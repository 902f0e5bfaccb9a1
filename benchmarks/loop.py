"""The cost of a step of the trainer, compared with a bare loop, and the cost of logging.

torchrun --nproc-per-node 2 benchmarks/loop.py [--rounds 20] [--overrides data=fashion_mnist ...] [--json FILE]
torchrun --nproc-per-node 2 benchmarks/loop.py --compare bn.fuse=true bn.fuse=false [--overrides ...] [--json FILE]
torchrun --nproc-per-node 2 benchmarks/loop.py --compare bn.sync=true bn.sync=false --collectives

The bare loop has the same model, data, augmentation, DDP, optimizer and schedule, and nothing else: no check whether
the loss is finite, no totals over ranks, no logging. All loops run in the same processes and take turns of 50 steps, in
random order, so that other load on the machine slows them alike. A turn of the trainer contains one logging step
(log_every=50), in its middle; wandb's process may still work on it during the next turn. Printed are ratios to the bare
loop of the same round: the median, with the quartiles in brackets. "Bare again" repeats the bare loop and shows the
noise.

With --compare, the trainer runs in the same way with the first setting and, twice, with the second one; printed are
ratios of samples per second to the second. A setting may be several overrides in quotes, or "" for none. With
--collectives there is a third: the second setting, and beside each batch normalization the collectives of a
synchronized one, with the sizes that those have, of numbers that nobody needs.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import shlex
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import wandb
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from syncbn import SyncBatchNorm
from syncbn.nn.collectives import sum_over_ranks
from syncbn.torch_compat import ddp_without_buffer_sync
from syncbn.training.config.parsing import parse
from syncbn.training.config.schema import Config
from syncbn.training.data import registry
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.distributed.stopping import StopRequest
from syncbn.training.launch import resolvers
from syncbn.training.losses import losses
from syncbn.training.optim import optimizers, schedules
from syncbn.training.tasks import train
from syncbn.training.trainer.build import build_model
from syncbn.training.trainer.trainer import Trainer

ROOT = Path(__file__).parents[1]
TURN = 50  # steps, the default of log_every: each turn of a trainer logs once
WARM_UP = TURN // 2  # steps before the first turn, so that the logging step is in the middle of each turn
COLLECTIVES = " and the bare collectives"  # ends the name of a loop that has them
# The trainers to measure without --compare: overrides by name.
LOGGING = {
    "trainer": [],
    "trainer, no logging": ["tracker=none", "log_every=1000000"],
    "trainer, logging every step": ["log_every=1"],
}


class Loop(threading.Thread):
    """A thread with a training loop that runs one turn at a time, while the other loops wait."""

    def __init__(self, train: Callable[[Loop], None], with_collectives: bool = False) -> None:
        super().__init__(daemon=True)
        self.with_collectives = with_collectives
        self.seconds: list[float] = []  # durations of its turns
        self._train = train
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._began: float | None = None
        self._failure: BaseException | None = None
        self.start()

    def take_turn(self) -> None:
        """Lets the loop run one turn, and returns after it; raises the exception of the loop if it fails.

        The first call runs the warm-up instead; a call after the last turn runs the rest of the loop.
        """
        self._mine.release()
        self._others.acquire()
        if self._failure is not None:
            raise self._failure

    def at_step(self, step: int) -> None:
        """Ends a turn at its boundary and waits for the next one; the loop's thread calls it before each step."""
        if step < WARM_UP or (step - WARM_UP) % TURN != 0:
            return
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
        self._others.release()
        self._mine.acquire()
        self._began = time.perf_counter()

    def run(self) -> None:
        """The thread: waits for the first turn, then runs the training."""
        self._mine.acquire()
        try:
            self._train(self)
        except BaseException as error:
            self._failure = error
        self._others.release()


def configure(overrides: list[str], num_steps: int) -> Config:
    """The configuration of train.py for this number of steps, without evaluation before the last."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse(compose("train", [f"duration={num_steps}", f"eval_every={num_steps}", *overrides]))


def bare_loop(loop: Loop, config: Config, context: RankContext, num_steps: int) -> None:
    """A training loop as one would write it by hand."""
    data = registry.load_data(config.data)
    model = build_model(config, data, context)
    sampler = Sampler(len(data.train), config.batch_size, 1, config.seed, context.rank, context.world_size)
    wrapped = ddp_without_buffer_sync(model, gradient_as_bucket_view=True)
    optimizer = optimizers.build_optimizer(config.optimizer, model).optimizer
    schedule = LambdaLR(optimizer, schedules.build_schedule(config.schedule, num_steps, sampler.steps_per_epoch))
    loss = losses.build_loss(config.loss, data)
    model.train()
    for step in range(num_steps):
        loop.at_step(step)
        [shard] = sampler.shards(step)
        images, labels = data.train_batch(shard.index, config.seed, sampler.epoch_of(step), context.dtype)
        optimizer.zero_grad(set_to_none=True)
        total, _ = loss(wrapped(images), labels)
        (total * (context.world_size / shard.num_global)).backward()
        optimizer.step()
        schedule.step()


def trainer_loop(_: Loop, config: Config, context: RankContext, directory: Path) -> None:
    """The training that train.py runs."""
    directory.mkdir(exist_ok=True)
    with ExitStack() as tracking:
        train.train(config, directory, context, [], tracking)


def add_collectives(model: nn.Module) -> None:
    """Lets each batch normalization sum packed moments in its forward, and packed gradients in its backward pass."""
    group = dist.group.WORLD
    assert group is not None

    def after_forward(layer: nn.Module, _: object, output: Tensor) -> None:
        num_channels = output.size(1)
        sum_over_ranks(torch.zeros(4 * num_channels + 1, dtype=torch.float64), group)
        if output.requires_grad:
            output.register_hook(lambda _: sum_over_ranks(torch.zeros(2 * num_channels, dtype=torch.float64), group))

    for layer in model.modules():
        if isinstance(layer, (SyncBatchNorm, nn.BatchNorm2d)):
            layer.register_forward_hook(after_forward)


def trainers_in_threads() -> ExitStack:
    """Patches that let several trainers run, each in the thread of a `Loop`.

    Each step waits for the turn of its loop. Signal handlers, which need the main thread, are left out, and wandb
    starts a new run for each trainer instead of its usual one per process.
    """
    train_step = Trainer._train_step

    def in_turn(trainer: Trainer, step: int) -> None:
        loop = threading.current_thread()
        assert isinstance(loop, Loop)
        if step == 0 and loop.with_collectives:
            add_collectives(trainer.model)
        loop.at_step(step)
        train_step(trainer, step)

    patches = ExitStack()
    patches.enter_context(mock.patch.object(Trainer, "_train_step", in_turn))
    patches.enter_context(mock.patch.object(train, "deferred", nullcontext))
    patches.enter_context(mock.patch.object(StopRequest, "listen", return_value=nullcontext()))
    patches.enter_context(mock.patch.object(wandb, "init", partial(wandb.init, reinit="create_new")))
    return patches


def main() -> None:
    """Measures all loops on all ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--compare", nargs=2, metavar="SETTING")
    parser.add_argument("--collectives", action="store_true", help="with --compare, see above")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.collectives and arguments.compare is None:
        parser.error("--collectives: goes with --compare")
    if arguments.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    torch.set_num_threads(1)
    resolvers.register_resolvers()
    dist.init_process_group("gloo")
    context = RankContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), torch.float32)
    scratch = [tempfile.mkdtemp() if context.is_first else ""]
    dist.broadcast_object_list(scratch)
    num_steps = WARM_UP + TURN * arguments.rounds + 1
    plain = configure(arguments.overrides, num_steps)

    trained = LOGGING if arguments.compare is None else settings(*arguments.compare, arguments.collectives)
    loops: dict[str, Loop] = {}
    with trainers_in_threads():
        if arguments.compare is None:
            for name in ("bare", "bare again"):
                loops[name] = Loop(partial(bare_loop, config=plain, context=context, num_steps=num_steps))
        for number, (name, overrides) in enumerate(trained.items()):
            config = configure([*arguments.overrides, *overrides], num_steps)
            loops[name] = Loop(
                partial(trainer_loop, config=config, context=context, directory=Path(scratch[0], str(number))),
                with_collectives=name.endswith(COLLECTIVES),
            )
        order = list(loops.values())
        for round_ in range(1 + arguments.rounds + 1):  # first the warm-up, and last the rest of each loop
            random.Random(round_).shuffle(order)  # the same on every rank
            for loop in order:
                dist.barrier()
                loop.take_turn()
    if context.is_first:
        seconds = {name: loop.seconds for name, loop in loops.items()}
        report(seconds, "bare" if arguments.compare is None else list(trained)[1], plain, arguments.json)
    gc.collect()
    dist.destroy_process_group()


def settings(first: str, second: str, with_collectives: bool) -> dict[str, list[str]]:
    """Overrides by name: of the first setting, of the second, of the second again, and of it with collectives."""
    names = [first or "as it is", second or "as it is"]
    again = [f"{names[1]} again", *([f"{names[1]}{COLLECTIVES}"] if with_collectives else [])]
    return {names[0]: shlex.split(first), names[1]: shlex.split(second), **dict.fromkeys(again, shlex.split(second))}


def report(seconds: dict[str, list[float]], baseline: str, config: Config, path: Path | None) -> None:
    """Prints the table, the baseline first; writes JSON if asked to."""
    print(f"torch {torch.__version__}, {platform.machine()}, {dist.get_world_size()} ranks, data={config.data.name}, "
          f"batch_size={config.batch_size}")  # fmt: skip
    is_bare = baseline == "bare"  # ratios of time to the bare loop, else of throughput
    print(f"| loop | ms per step | {'to the bare loop' if is_bare else f'samples per second, to {baseline}'} |")
    print("|---|---|---|")
    rows = {}
    for name in sorted(seconds, key=lambda name: (name != baseline, f"{baseline} again" != name)):
        pairs = zip(seconds[name], seconds[baseline], strict=True)
        ratios = sorted(mine / other if is_bare else other / mine for mine, other in pairs)
        milliseconds = 1000 * statistics.median(seconds[name]) / TURN
        rows[name] = {"ms": milliseconds, "ratios": ratios}
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {milliseconds:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
