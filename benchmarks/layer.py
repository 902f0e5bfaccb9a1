"""The cost of one layer on CPU, forward and backward, compared with torch's local layer and with bare collectives.

torchrun --nproc-per-node 2 benchmarks/layer.py [--quick] [--json FILE]
python benchmarks/layer.py --device cuda [--quick] [--json FILE]           is benchmarks/gpu.py layers
python benchmarks/layer.py --memory                                        counts bytes instead, on one rank

On CPU, both ranks run every row at the same time, one thread each, so that all rows share the machine in the same way.
Rows take turns in random order, in five runs; of each run the lower quartile counts. Printed is the median ratio to the
local layer, with minimum and maximum over the five runs in brackets. "Local again" repeats "local" with the same code:
a ratio within its brackets is noise. "fused / unfused" compares a layer that does the ReLU (and the addition) itself
with one that is followed by them; "lean / not" compares memory="lean" with the default.

With --memory, two sizes are counted, as multiples of one activation: what one convolution, normalization and activation
save for backward, and the peak memory of a step of a chain of eight of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from syncbn import SyncBatchNorm
from syncbn.nn import groups
from syncbn.nn.collectives import all_reduce_sum, sum_over_ranks

SHAPES = [(32, 64, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14), (32, 64, 16, 16), (8, 512, 4, 4), (256, 128),
          (2, 32, 64, 64, 64)]  # fmt: skip
LOCAL = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Pairs of rows, unfused and fused, whose ratio is printed on a line of its own.
FUSED = {
    "ReLU, one rank": ("ours, then ReLU, one rank", "ours with ReLU, one rank"),
    "ReLU, two ranks": ("ours, then ReLU, two ranks", "ours with ReLU, two ranks"),
    "add, ReLU, one rank": ("ours, then add, ReLU, one rank", "ours with add, ReLU, one rank"),
    "add, ReLU, two ranks": ("ours, then add, ReLU, two ranks", "ours with add, ReLU, two ranks"),
}
# The same for the time of memory="lean", default and lean: without an activation, and with one that it inverts.
LEAN = {
    "one rank": ("ours, one rank", "ours lean, one rank"),
    "two ranks": ("ours, two ranks", "ours lean, two ranks"),
    "leaky ReLU, one rank": ("ours with leaky ReLU, one rank", "ours lean with leaky ReLU, one rank"),
    "leaky ReLU, two ranks": ("ours with leaky ReLU, two ranks", "ours lean with leaky ReLU, two ranks"),
}
RUNS = 5
SECONDS = 0.25  # approximate time for each row in each run


class Composed(nn.Module):
    """Synchronized batch normalization composed of autograd operators, as one writes it in ten lines."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes with the statistics of all ranks; no running statistics."""
        dims = [0, *range(2, input.dim())]
        wide = input.float()
        local = torch.cat([wide.mean(dims), (wide * wide).mean(dims)])
        mean, square = (all_reduce_sum(local, dist.group.WORLD) / dist.get_world_size()).chunk(2)
        scale = self.weight * (square - mean * mean + 1e-5).rsqrt()
        shape = [1, -1, *[1] * (input.dim() - 2)]
        return (wide * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(input.dtype)


def rows(input: Tensor, grad: Tensor, own_group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """The steps to measure, by name of the row."""
    channels = input.size(1)
    leaf = input.requires_grad_()

    def layer_step(layer: nn.Module, force: bool = False) -> Callable[[], object]:
        def step() -> None:
            leaf.grad = None
            groups._force_collective = force
            layer(leaf).backward(grad)

        return step

    residual = torch.randn_like(leaf).requires_grad_()

    def activated_step(name: str) -> Callable[[], object]:
        group = own_group if "one rank" in name else None
        fused, added = " with " in name, residual if "add" in name else None
        layer = SyncBatchNorm(channels, process_group=group, activation="relu" if fused else None)

        def step() -> None:
            leaf.grad = residual.grad = None
            groups._force_collective = False
            if fused:
                output = layer(leaf, residual=added)
            else:
                output = F.relu(layer(leaf) if added is None else layer(leaf) + added)
            output.backward(grad)

        return step

    def inside_step(name: str) -> Callable[[], object]:
        group = own_group if "one rank" in name else None
        activation = "leaky_relu" if "leaky" in name else None
        memory = "lean" if "lean" in name else "default"
        return layer_step(SyncBatchNorm(channels, process_group=group, activation=activation, memory=memory))

    forward, backward = (torch.zeros(size, dtype=torch.float64) for size in (4 * channels + 1, 2 * channels))

    def collectives() -> None:
        sum_over_ranks(forward, dist.group.WORLD)
        sum_over_ranks(backward, dist.group.WORLD)

    def all_reduces() -> None:
        dist.all_reduce(forward)
        dist.all_reduce(backward)

    local = LOCAL[input.dim()]
    return {
        "local": layer_step(local(channels)),
        "local again": layer_step(local(channels)),
        "ours, one rank": layer_step(SyncBatchNorm(channels, process_group=own_group)),
        "ours, one rank, collective forced": layer_step(SyncBatchNorm(channels, process_group=own_group), True),
        "ours, two ranks": layer_step(SyncBatchNorm(channels)),
        **{name: activated_step(name) for pair in FUSED.values() for name in pair},
        **{name: inside_step(name) for pair in LEAN.values() for name in pair if "leaky" in name or "lean" in name},
        "composed, two ranks": layer_step(Composed(channels)),
        "bare collectives": collectives,
        "bare all-reduces": all_reduces,
        "clone": lambda: leaf.detach().clone(),
    }


def measure(steps: dict[str, Callable[[], object]], order: random.Random) -> dict[str, list[float]]:
    """For each row the lower quartile of its times in milliseconds, one per run; every rank calls it."""
    repeats = {}
    for name, step in steps.items():
        for _ in range(2):
            dist.barrier()
            start = time.perf_counter()
            step()
            seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        repeats[name] = int(max(4, min(200, SECONDS / float(seconds))))
    results: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(RUNS):
        for name in order.sample(list(steps), len(steps)):
            times = []
            dist.barrier()
            for _ in range(repeats[name]):
                start = time.perf_counter()
                steps[name]()
                times.append(time.perf_counter() - start)
            results[name].append(1e3 * sorted(times)[len(times) // 4])
    return results


def main() -> None:
    """Measures on all ranks; rank 0 prints, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 in the contiguous layout alone")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--memory", action="store_true", help="count bytes, on one rank")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        options = [*["--quick"] * arguments.quick, *(["--json", str(arguments.json)] if arguments.json else [])]
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("gpu.py")), "layers", *options])
    torch.set_num_threads(1)
    if arguments.memory:
        show_memory()
        return
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 benchmarks/layer.py")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own_group = [dist.new_group([member]) for member in range(world_size)][rank]
    order = random.Random(0)  # the same order on both ranks
    found = []
    for dtype in (torch.float32,) if arguments.quick else (torch.float32, torch.bfloat16):
        for layout in ("contiguous",) if arguments.quick else ("contiguous", "channels_last"):
            for shape in SHAPES:
                if layout == "channels_last" and len(shape) not in CHANNELS_LAST:
                    continue
                input, grad = (torch.randn(shape).to(dtype) for _ in range(2))
                if layout == "channels_last":
                    input, grad = (t.contiguous(memory_format=CHANNELS_LAST[len(shape)]) for t in (input, grad))
                times = measure(rows(input, grad, own_group), order)
                found.append({"shape": shape, "layout": layout, "dtype": str(dtype)[6:], "milliseconds": times})
                if rank == 0:
                    show(found[-1])
    if rank == 0 and arguments.json:
        machine = {"torch": torch.__version__, "cores": os.cpu_count(), "processor": processor(), "ranks": world_size}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")
    dist.destroy_process_group()


class Link(nn.Module):
    """One link of a chain: a convolution, a normalization, an optional addition of the input, and an activation.

    Args:
        follows: the activation that follows the layer; None if there is none, or the layer does it itself.
        add: "inside", as a residual of the layer; "outside", after it; or "" for no addition.
    """

    def __init__(self, layer: nn.Module, follows: Callable[[Tensor], Tensor] | None, add: str = "") -> None:
        super().__init__()
        self.conv, self.layer, self.follows, self.add = nn.Conv2d(64, 64, 1), layer, follows, add

    def forward(self, input: Tensor) -> Tensor:
        """(N, 64, H, W) to the same shape."""
        output = self.conv(input)
        output = self.layer(output, residual=input) if self.add == "inside" else self.layer(output)
        output = output + input if self.add == "outside" else output
        return output if self.follows is None else self.follows(output)


def links() -> dict[str, Callable[[], Link]]:
    """Functions that build the links to count, by name of the row."""
    return {
        "no activation": lambda: Link(SyncBatchNorm(64), None),
        "no activation, lean": lambda: Link(SyncBatchNorm(64, memory="lean"), None),
        "torch's layer, then ReLU in place": lambda: Link(nn.BatchNorm2d(64), F.relu_),
        "then ReLU": lambda: Link(SyncBatchNorm(64), F.relu),
        "then ReLU in place": lambda: Link(SyncBatchNorm(64), F.relu_),
        "with ReLU": lambda: Link(SyncBatchNorm(64, activation="relu"), None),
        "then add, ReLU": lambda: Link(SyncBatchNorm(64), F.relu, "outside"),
        "with add, ReLU": lambda: Link(SyncBatchNorm(64, activation="relu"), None, "inside"),
        "then SiLU": lambda: Link(SyncBatchNorm(64), F.silu),
        "with SiLU": lambda: Link(SyncBatchNorm(64, activation="silu"), None),
        "then leaky ReLU": lambda: Link(SyncBatchNorm(64), F.leaky_relu),
        "then leaky ReLU in place": lambda: Link(SyncBatchNorm(64), F.leaky_relu_),
        "with leaky ReLU": lambda: Link(SyncBatchNorm(64, activation="leaky_relu"), None),
        "with leaky ReLU, lean": lambda: Link(SyncBatchNorm(64, activation="leaky_relu", memory="lean"), None),
    }


def saved_bytes(model: nn.Module, input: Tensor) -> int:
    """Bytes that the graph saves for backward, each storage once, without parameters, buffers and the input."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), input)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input)
    del output
    return sum(size for pointer, size in kept.items() if pointer not in own)


def peak_bytes(step: Callable[[], object]) -> int:
    """Peak memory of a step in bytes: the largest sum of what it has allocated and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        largest = max(largest, total)
    return largest


def count_bytes(make: Callable[[], Link], dtype: torch.dtype) -> tuple[float, float]:
    """What one link saves for backward, and the peak memory of eight links, in multiples of one activation."""
    input = torch.randn(8, 64, 28, 28).to(dtype).requires_grad_()
    size = input.numel() * input.element_size()
    first, *rest = (make() for _ in range(9))
    for link in (first, *rest):
        link.conv.to(dtype)  # statistics and parameters of the normalization stay float32
    # The next convolution saves its input, which is the output of this link and is counted once.
    kept = saved_bytes(nn.Sequential(first, nn.Conv2d(64, 64, 1).to(dtype)), input)
    chain = nn.Sequential(*rest)
    chain(input).sum().backward()  # allocates the gradients of parameters, before the peak is measured
    return kept / size, peak_bytes(lambda: chain(input).sum().backward()) / size


def show_memory() -> None:
    """Prints the table of saved bytes and peak memory."""
    print("| layer | kept, float32 | kept, bfloat16 | peak of eight, float32 | peak of eight, bfloat16 |")
    print("|---|---|---|---|---|")
    for name, make in links().items():
        counted = [count_bytes(make, dtype) for dtype in (torch.float32, torch.bfloat16)]
        kept, peaks = zip(*counted, strict=True)
        print(f"| {name} | {' | '.join(f'{number:.2f}' for number in (*kept, *peaks))} |", flush=True)


def median(values: list[float]) -> float:
    """The median of an odd number of values."""
    return sorted(values)[len(values) // 2]


def show(entry: dict) -> None:
    """Prints the ratios of an entry, each with minimum and maximum."""
    times = entry["milliseconds"]
    print(f"\n{entry['shape']} {entry['layout']} {entry['dtype']}: local {median(times['local']):.3f} ms")
    for name, values in times.items():
        if name != "local":
            ratios = [value / local for value, local in zip(values, times["local"], strict=True)]
            print(f"  {name:36s} {median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    pairs = {f"fused / unfused: {what}": pair for what, pair in FUSED.items()}
    for text, (before, after) in (pairs | {f"lean / not: {what}": pair for what, pair in LEAN.items()}).items():
        ratios = [value / other for value, other in zip(times[after], times[before], strict=True)]
        print(f"  {text:36s} {median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    floor = [a + b for a, b in zip(times["bare collectives"], times["local"], strict=True)]
    ratios = [ours / least for ours, least in zip(times["ours, two ranks"], floor, strict=True)]
    text = "ours, two ranks / (collectives + local)"
    print(f"  {text:36s} {median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def processor() -> str:
    """The name of the processor, as far as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
