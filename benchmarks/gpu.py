"""The cost of the layer on a GPU, compared with torch's synchronized layer, torch's local layer, and a copy.

python benchmarks/gpu.py layers [--quick] [--json FILE]   the shapes of ResNet-50's layers, forward and backward
python benchmarks/gpu.py models [--quick] [--json FILE]   whole training steps of a ResNet-50 and a segmentation model

One process. "Collective forced" is our layer with an NCCL all-reduce in forward and in backward, in a world of one;
"torch sync" is the autograd function behind `torch.nn.SyncBatchNorm` in the same world, with its collectives. "Graph"
replays the whole step from a CUDA graph; its peak is the memory that the graph keeps. "Local again" repeats "local"
with the same code and shows the noise. The copy moves as many bytes as a step has to (eight times the activation), so
1.00 is the bandwidth of the device.

Device times of layers are the sums of their kernels in the profiler, so launch overhead does not count. Host times last
until the calls return. Whole training steps are timed as they run: where the host is slower than the device, its time
counts, as it does for a user. The rows take turns in random order; printed are medians of the runs, with minimum and
maximum.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncFunction
from torch.profiler import ProfilerActivity, profile

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.kernels import cuda_step, operators
from syncbn.nn import groups
from syncbn.torch_compat import INTERCEPTORS

# Channels, and height and width, of the inputs of ResNet-50's batch normalization layers at 224 pixels.
LAYERS = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
          (512, 7), (2048, 7)]  # fmt: skip
SAMPLES = [2, 16, 64]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RUNS = 5
Step = Callable[[], object]


class TorchSync(nn.BatchNorm2d):
    """torch's synchronized path in a world of one, where `torch.nn.SyncBatchNorm` itself would take the local path."""

    def forward(self, input: Tensor) -> Tensor:
        """Calls the autograd function as the module does."""
        self.num_batches_tracked.add_(1)
        return TorchSyncFunction.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
            dist.group.WORLD, 1,
        )  # fmt: skip


@contextmanager
def forced_collective(force: bool) -> Iterator[None]:
    """Context in which our layers call their collectives in a world of one too, if `force`."""
    groups._force_collective = force
    try:
        yield
    finally:
        groups._force_collective = False


def layer_rows(input: Tensor, grad: Tensor) -> dict[str, Step]:
    """A forward and backward pass of each layer, and the copy, by name of the row."""
    leaf = input.requires_grad_()
    channels = input.size(1)

    def step(layer: nn.Module, force: bool = False) -> Step:
        inputs = (leaf, layer.weight, layer.bias)

        def run() -> None:
            with forced_collective(force):
                torch.autograd.grad(layer(leaf), inputs, grad)

        return run

    source, target = input.detach(), torch.empty_like(input)

    def copy() -> None:
        for _ in range(4):  # one read and one write each: eight in all, as in a step
            target.copy_(source)

    return {
        "local": step(nn.BatchNorm2d(channels, device="cuda")),
        "local again": step(nn.BatchNorm2d(channels, device="cuda")),
        "torch sync": step(TorchSync(channels, device="cuda")),
        "ours": step(SyncBatchNorm(channels, device="cuda")),
        "ours, collective forced": step(SyncBatchNorm(channels, device="cuda"), force=True),
        "copy": copy,
    }


@contextmanager
def _unwatched() -> Iterator[None]:
    """Context in which our layers launch what they launch without a profiler, under which they call their operators."""
    others = tuple(active for active in INTERCEPTORS if active is not torch.autograd._profiler_enabled)
    cuda_step.INTERCEPTORS = operators.INTERCEPTORS = others
    try:
        yield
    finally:
        cuda_step.INTERCEPTORS = operators.INTERCEPTORS = INTERCEPTORS


def device_time(step: Step, repeats: int) -> float:
    """Milliseconds per step on the device: the sum of its kernels, copies and fills, by the profiler.

    Steps cannot be launched ahead of the device and timed by events: torch's synchronized path waits for it inside.
    """
    with _unwatched(), profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in events if not event.is_user_annotation) / repeats / 1e3


def step_time(step: Step, repeats: int) -> float:
    """Milliseconds per step, of several in a row, including the time to launch them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def host_time(step: Step, repeats: int) -> float:
    """Milliseconds per step until its calls return on the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * seconds / repeats


def in_turns(steps: dict[str, Step], measure: Callable[[Step], float], order: random.Random) -> dict[str, list[float]]:
    """Measures each step RUNS times, in random order, after a warm-up."""
    results: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(RUNS):
        for name in order.sample(list(steps), len(steps)):
            results[name].append(measure(steps[name]))
    return results


def run_layers(quick: bool) -> list[dict[str, Any]]:
    """Measures and prints every shape, dtype and layout; returns an entry for each."""
    found = []
    order = random.Random(0)
    for type_name, dtype in list(TYPES.items())[: 1 if quick else None]:
        for layout, memory_format in FORMATS.items():
            for samples in SAMPLES:
                for channels, size in LAYERS[1::5] if quick else LAYERS:
                    shape = (samples, channels, size, size)
                    input, grad = (
                        torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(2)
                    )
                    steps = layer_rows(input, grad)
                    repeats = 20 if input.nbytes < 2**26 else 10
                    times = in_turns(steps, lambda step, n=repeats: device_time(step, n), order)
                    host = in_turns(steps, lambda step: host_time(step, 20), order)
                    found.append({"shape": shape, "layout": layout, "dtype": type_name, "bytes": input.nbytes,
                                  "device": times, "host": host})  # fmt: skip
                    show_layer(found[-1])
    show_goals(found)
    return found


def show_layer(entry: dict[str, Any]) -> None:
    """Prints device time, its ratio to torch's synchronized path, bandwidth relative to the copy, and host time."""
    times = entry["device"]
    print(f"\n{entry['shape']} {entry['layout']} {entry['dtype']}: {entry['bytes'] / 1e6:.1f} MB,"
          f" copy {8 * entry['bytes'] / median(times['copy']) / 1e9:.2f} TB/s")  # fmt: skip
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times["torch sync"], strict=True)]
        print(
            f"  {name:26s} {median(values):8.4f} ms  {median(ratios):5.2f} of torch sync ({min(ratios):.2f} to"
            f" {max(ratios):.2f})  {median(times['copy']) / median(values):5.2f} of the copy's bandwidth"
            f"  host {median(entry['host'][name]):.3f} ms",
            flush=True,
        )


def show_goals(entries: list[dict[str, Any]]) -> None:
    """Prints the lines of benchmarks/gpu.md about a layer, over all layers of a size; of the host, over all."""
    classes = {"under 4 MB": lambda size: size < 4e6, "above 64 MB": lambda size: size > 64e6}
    print("\n| layers | how many | ours to torch sync: median (worst) | bandwidth next to the copy: median (worst) |\n"
          + "|---" * 4 + "|")  # fmt: skip
    for name, belongs in classes.items():
        times = [entry["device"] for entry in entries if belongs(entry["bytes"])]
        if not times:
            continue
        to_torch = [median(found["ours"]) / median(found["torch sync"]) for found in times]
        to_copy = [median(found["copy"]) / median(found["ours"]) for found in times]
        print(f"| {name} | {len(times)} | {median(to_torch):.2f} ({max(to_torch):.2f})"
              f" | {median(to_copy):.2f} ({min(to_copy):.2f}) |")  # fmt: skip
    print("\n| host time | median (worst) |\n|---|---|")
    for name, base in (
        ("ours", "local"),
        ("ours, collective forced", "local"),
        ("ours, collective forced", "torch sync"),
    ):
        ratios = [median(entry["host"][name]) / median(entry["host"][base]) for entry in entries]
        print(f"| {name}, to {base} | {median(ratios):.2f} ({max(ratios):.2f}) |")


class Bottleneck(nn.Module):
    """ResNet's bottleneck block of three convolutions; the second one has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, input: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 * width, H / stride, W / stride)."""
        return torch.relu(self.body(input) + self.shortcut(input))


def resnet50() -> nn.Sequential:
    """ResNet-50 for 1,000 classes."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
                              nn.MaxPool2d(3, 2, 1)]  # fmt: skip
    channels = 64
    for stage, depth in enumerate([3, 4, 6, 3]):
        width = 64 * 2**stage
        for block in range(depth):
            parts.append(Bottleneck(channels, width, 2 if stage > 0 and block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class Unet(nn.Module):
    """A segmentation model: an encoder and a decoder of four levels with skip connections, 19 classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(
            [_two_convolutions(inputs, outputs) for inputs, outputs in zip([3, *sizes], sizes, strict=False)]
        )
        self.up = nn.ModuleList(
            [_two_convolutions(deep + skip, skip) for deep, skip in zip(sizes[:0:-1], sizes[-2::-1], strict=True)]
        )
        self.head = nn.Conv2d(width, 19, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 19, H, W); H and W are multiples of 8."""
        skips = []
        for level, block in enumerate(self.down):
            input = block(input if level == 0 else nn.functional.max_pool2d(input, 2))
            skips.append(input)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            input = block(torch.cat([nn.functional.interpolate(input, scale_factor=2.0), skip], 1))
        return self.head(input)


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for size in (inputs, outputs):
        parts += [nn.Conv2d(size, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def with_torch_sync(model: nn.Module) -> nn.Module:
    """Makes every `nn.BatchNorm2d` take torch's synchronized path, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = TorchSync
    return model


def run_models(quick: bool) -> list[dict[str, Any]]:
    """Measures and prints whole training steps: time and peak memory; returns an entry for each case."""
    found = []
    order = random.Random(0)
    cases = [
        ("ResNet-50", resnet50, (64, 3, 224, 224), (64,), 1000),
        ("U-Net", Unet, (4, 3, 512, 512), (4, 512, 512), 19),
    ]
    for name, build, shape, labels_shape, classes in cases:
        for autocast in (None,) if quick else (None, torch.bfloat16):
            for layout, memory_format in FORMATS.items():
                input = torch.randn(shape, device="cuda").to(memory_format=memory_format)
                labels = torch.randint(classes, labels_shape, device="cuda")
                steps, peaks = {}, {}
                variants: dict[str, Callable[[nn.Module], nn.Module]] = {
                    "local": lambda model: model,
                    "local again": lambda model: model,
                    "torch sync": with_torch_sync,
                    "ours": convert_sync_batchnorm,
                    "ours, collective forced": convert_sync_batchnorm,
                }
                for variant, change in variants.items():
                    torch.manual_seed(0)
                    model = change(build()).cuda().to(memory_format=memory_format)
                    steps[variant] = model_step(model, input, labels, autocast, "forced" in variant)
                    peaks[variant] = peak_memory(steps[variant])
                    if variant in ("local", "ours", "ours, collective forced"):  # torch sync waits for the device
                        name = f"{variant}, graph"
                        model = copy.deepcopy(model)
                        steps[name], peaks[name] = graphed(
                            model_step(model, input, labels, autocast, "forced" in variant)
                        )
                times = in_turns(steps, lambda step: step_time(step, 5), order)
                found.append({"model": name, "layout": layout, "autocast": str(autocast), "samples": shape[0],
                              "milliseconds": times, "peak_bytes": peaks})  # fmt: skip
                show_model(found[-1])
    return found


def model_step(
    model: nn.Module, input: Tensor, labels: Tensor, autocast: torch.dtype | None, force: bool
) -> Step:  # fmt: skip
    """A training step of the model: forward, backward and optimizer update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with forced_collective(force):
            with torch.autocast("cuda", autocast) if autocast is not None else nullcontext():
                loss = nn.functional.cross_entropy(model(input), labels)
            loss.backward()
        optimizer.step()

    return step


def graphed(step: Step) -> tuple[Step, int]:
    """The step as a CUDA graph, as `graph=true` has it, and the bytes that are reserved for the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, torch.cuda.memory_reserved() - before


def peak_memory(step: Step) -> int:
    """Peak memory of a step in bytes, beyond what is allocated before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def show_model(entry: dict[str, Any]) -> None:
    """Prints samples per second, the ratio of the time to that with local layers, and peak memory."""
    times = entry["milliseconds"]
    print(f"\n{entry['model']}, {entry['samples']} samples, {entry['layout']}, autocast {entry['autocast']}")
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times["local"], strict=True)]
        print(
            f"  {name:26s} {1e3 * entry['samples'] / median(values):8.1f} samples/s  {median(ratios):5.3f} of local"
            f" ({min(ratios):.3f} to {max(ratios):.3f})  peak {entry['peak_bytes'][name] / 1e9:.3f} GB",
            flush=True,
        )


def median(values: list[float]) -> float:
    """The median, the upper one of an even number of values."""
    return sorted(values)[len(values) // 2]


def main() -> None:
    """Measures, prints, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "models"])
    parser.add_argument("--quick", action="store_true", help="float32 and a few shapes alone")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; benchmarks/layer.py measures on CPU")
    import triton

    torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    driver = os.popen("nvidia-smi --query-gpu=driver_version --format=csv,noheader").read().strip()
    machine = {
        "device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__,
    }  # fmt: skip
    print(*(f"{key} {value}" for key, value in machine.items()), sep="  ")
    rows = {"layers": run_layers, "models": run_models}[arguments.what](arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
