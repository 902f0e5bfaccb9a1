"""What a layer step costs the host on a GPU, measured without one: the CUDA path with everything on the device stubbed.

python benchmarks/host.py [--before CHECKOUT]   this checkout, and another one beside it

The CUDA path runs on small CPU tensors. Triton kernels, their compilation and the current stream are stubbed where
they are called; the process group is torch's `fake` one, of two ranks, whose collectives do nothing. So the numbers
that come out are not those of a batch normalization, but the host does all that it does on a GPU, except for two
things: on a GPU the backward pass runs in a thread of its own, and memory comes from the caching allocator. Launching a
kernel costs nothing here.

A model of 53 layers whose shapes differ, one with a ragged batch and one with a misaligned input, each forward and
backward; printed is the time per layer. Rows:

    clone        an autograd.Function in Python that clones, forward and backward: the floor of any such layer
    local        nn.BatchNorm2d, which computes (little: 2 x 2 positions)
    torch sync   the function behind torch.nn.SyncBatchNorm, its kernels stubbed
    ours         in a group of one; "ours, 2 ranks" with its collectives

Each process measures all rows of one checkout, in random order; processes of the checkouts take turns. "Again" repeats
a row with the same code and shows the noise. Launches, collectives and Python frames of files in syncbn/ are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncFunction

ROOT = Path(__file__).parents[1]
NUM_LAYERS = 53
ROUNDS = 3  # processes per checkout
RUNS, REPEATS = 9, 5  # timings of a row in a process, passes through the model in each
COLLECTIVES = [name for name in ("allreduce", "allgather", "_allgather_base", "all_gather_single")
               if hasattr(dist.ProcessGroup, name)]  # fmt: skip
Step = Callable[[], object]


class Clone(torch.autograd.Function):
    """Clones its input, and the gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """The input, copied."""
        return input.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient, copied."""
        return grad.clone(), None, None, None


class CloningLayer(nn.BatchNorm2d):
    """Calls `Clone` instead of normalizing."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, copied."""
        return Clone.apply(input, self.weight, self.bias, self.eps)


class TorchSync(nn.BatchNorm2d):
    """Calls torch's synchronized function as `torch.nn.SyncBatchNorm` does, over two ranks."""

    def forward(self, input: Tensor) -> Tensor:
        """Meaningless numbers of the right shape."""
        self.num_batches_tracked.add_(1)
        return TorchSyncFunction.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
            dist.group.WORLD, 2,
        )  # fmt: skip


class Program:
    """Stands for a Triton kernel: compiles to one that counts its launches in `started` and does nothing."""

    def __init__(self, name: str, arg_names: list[str], started: list[str]) -> None:
        self.name, self.arg_names, self.pre_run_hooks, self.started = name, arg_names, [], started

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> Any:
        launcher = SimpleNamespace(
            global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
            launch=self._start,
        )  # fmt: skip
        self.started.append(self.name)
        return SimpleNamespace(run=launcher, function=0, packed_metadata=(4, 1, 0))

    def _start(self, *_: Any) -> None:
        self.started.append(self.name)


@contextmanager
def stubbed_device() -> Iterator[list[str]]:
    """Context in which our CUDA path runs on CPU tensors; yields the names of the kernels started so far."""
    import syncbn.kernels.triton.programs as programs
    from syncbn.kernels import cuda, operators

    started: list[str] = []
    stubs = {
        name: Program(name, program.arg_names, started)
        for name, program in vars(programs).items()
        if hasattr(program, "arg_names")
    }
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        if hasattr(operators, "IMPLEMENTATIONS"):
            from syncbn.kernels import cuda_step
            from syncbn.kernels.triton import launch, launch_plan

            stubs["launch"] = launch.launch
            patch(launch, "_is_direct", True)
            patch(launch, "current_cuda_stream", lambda _: 0)
            patch(cuda_step, "_kinds", {})
            patch(operators, "IMPLEMENTATIONS", {"cpu": cuda})
            for forget in (launch_plan.plan_sums.cache_clear, launch_plan.plan_passes.cache_clear,
                           *(blocks.kernels.clear for blocks in cuda.FINISH)):  # fmt: skip
                forget()
                stack.callback(forget)
        patch(cuda, "_import_programs", lambda: SimpleNamespace(**stubs))
        multiprocessors = "multiprocessors" if hasattr(cuda, "multiprocessors") else "_multiprocessors"
        patch(cuda, multiprocessors, lambda _: 132)
        yield started


@contextmanager
def stubbed_collectives() -> Iterator[None]:
    """Context with a fake process group of two ranks, and all-reduces on CPU as on a GPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from syncbn.nn import collectives

    name = "GATHER_UP_TO" if hasattr(collectives, "GATHER_UP_TO") else "_GATHER_UP_TO"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with mock.patch.object(collectives, name, 0):
            yield
    finally:
        dist.destroy_process_group()


def stub_torch_sync() -> None:
    """Replaces the CUDA operators of torch's synchronized function by ones that make tensors of the right shapes."""

    def elementwise(input: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(input)

    def vectors(number: int) -> Callable[..., tuple[Tensor, ...]]:
        return lambda input, *_: tuple(input.new_empty(input.size(1)) for _ in range(number))

    # The fake group cannot gather tensors of torch's shapes.
    for name in {"_allgather_base", "all_gather_single"} & set(COLLECTIVES):
        setattr(dist.ProcessGroup, name, lambda *_: None)
    torch.batch_norm_stats = vectors(2)
    torch.batch_norm_gather_stats_with_counts = vectors(2)
    torch.batch_norm_elemt = elementwise
    torch.batch_norm_backward_elemt = lambda grad, *_: torch.empty_like(grad)
    torch.batch_norm_backward_reduce = lambda grad, *_: vectors(4)(grad)


def register_before() -> None:
    """Has a checkout without `IMPLEMENTATIONS`, not imported yet, register its CUDA operators for CPU tensors."""
    impl = torch.library.Library.impl

    def swapped(library: Any, name: Any, function: Any, key: str = "", **options: Any) -> Any:
        if library.ns == "syncbn" and key in ("CPU", "CUDA"):
            key = "CPU" if key == "CUDA" else "CUDA"
        return impl(library, name, function, key, **options)

    torch.library.Library.impl = swapped


def inputs(number: int) -> list[Tensor]:
    """One input for each layer, no two of them of one shape."""
    made = [torch.randn(2, 8 + channel, 2, 2) for channel in range(number)]
    made[1] = torch.randn(1, *made[1].shape[1:])  # ragged
    made[2] = torch.randn(made[2].numel() + 1)[1:].view(made[2].shape)  # not aligned
    return [input.requires_grad_() for input in made]


def model_step(layer_class: type[nn.Module], num_layers: int = NUM_LAYERS) -> Step:
    """A forward and backward pass of each layer."""
    leaves = inputs(num_layers)
    gradients = [torch.randn_like(leaf) for leaf in leaves]
    layers = [layer_class(leaf.size(1)) for leaf in leaves]
    wanted = [(leaf, layer.weight, layer.bias) for leaf, layer in zip(leaves, layers, strict=True)]

    def step() -> None:
        for layer, leaf, grad, needed in zip(layers, leaves, gradients, wanted, strict=True):
            torch.autograd.grad(layer(leaf), needed, grad, allow_unused=True)

    return step


def frames_of(step: Step, folder: Path) -> int:
    """Python frames of files in a folder that a step enters."""
    prefix, count = f"{folder}{os.sep}", 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(prefix)

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def collectives_of(step: Step) -> int:
    """Collectives that a step calls."""
    count = 0
    with ExitStack() as stack:
        for name in COLLECTIVES:
            original = getattr(dist.ProcessGroup, name)

            def counting(*arguments: Any, _original: Any = original, **options: Any) -> Any:
                nonlocal count
                count += 1
                return _original(*arguments, **options)

            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, counting))
        step()
    return count


def measure(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Microseconds of processor time per layer step of each row, and their ratio to `clone`.

    The lower quartiles of runs in random order: others on the machine make a run slower, never quicker.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(RUNS):
        for name in random.sample(list(steps), len(steps)):
            start = time.process_time()
            for _ in range(REPEATS):
                steps[name]()
            times[name].append((time.process_time() - start) / REPEATS / NUM_LAYERS * 1e6)
    micros = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}
    return {name: {"us": value, "to clone": value / micros["clone"]} for name, value in micros.items()}


def run_checkout(checkout: Path) -> dict[str, dict[str, float]]:
    """Measures all rows with the package of a checkout; in a process of its own."""
    torch.set_num_threads(1)
    if not (checkout / "syncbn/kernels/cuda_step.py").exists():
        register_before()
    from syncbn import SyncBatchNorm

    package = checkout / "syncbn"
    results: dict[str, dict[str, float]] = {}
    stub_torch_sync()
    with stubbed_device() as started:
        for name, rows in {
            "ours": {"clone": CloningLayer, "clone again": CloningLayer, "local": nn.BatchNorm2d,
                     "ours": SyncBatchNorm},
            "2 ranks": {"clone": CloningLayer, "torch sync": TorchSync, "ours, 2 ranks": SyncBatchNorm},
        }.items():  # fmt: skip
            with stubbed_collectives() if "ranks" in name else ExitStack():
                steps = {row: model_step(layer_class) for row, layer_class in rows.items()}
                for row, times in measure(steps).items():
                    results.setdefault(row, times)
                for row, step in steps.items():
                    started.clear()
                    results[row]["frames"] = frames_of(step, package) / NUM_LAYERS
                    results[row]["launches"] = len(started) / NUM_LAYERS
                    results[row]["collectives"] = collectives_of(step) / NUM_LAYERS
    return results


def main() -> None:
    """Prints a table for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout to measure beside this one")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(run_checkout(arguments.worker)))
        return
    checkouts = {"this checkout": ROOT}
    if arguments.before is not None:
        checkouts = {f"before ({arguments.before})": arguments.before.resolve(), **checkouts}
    found: dict[str, list[Any]] = {name: [] for name in checkouts}
    for _ in range(ROUNDS):
        for name, checkout in checkouts.items():
            environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, __file__, "--worker", str(checkout)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found[name].append(json.loads(done.stdout))
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}; us of processor time per layer step")
    for name, rounds in found.items():
        print(f"\n{name}\n\n| row | us | to clone | launches | collectives | frames |\n" + "|---" * 6 + "|")
        for row in rounds[0]:
            show(row, rounds)


def show(row: str, rounds: list[dict[str, dict[str, float]]]) -> None:
    """Prints a line of the table; ratios are taken within each process."""
    micros, ratio = (statistics.median(one[row][key] for one in rounds) for key in ("us", "to clone"))
    counts = [rounds[0][row][key] for key in ("launches", "collectives", "frames")]
    print(f"| {row} | {micros:.1f} | {ratio:.2f} | " + " | ".join(f"{number:.1f}" for number in counts) + " |")


if __name__ == "__main__":
    main()
