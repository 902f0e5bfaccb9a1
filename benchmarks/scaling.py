"""What synchronizing one layer sends as the world grows, counted, and how long it takes on gloo ranks of this machine.

python benchmarks/scaling.py [--quick] [--json FILE]

For 1, 2, 4, 8 ranks and some widths C: the bytes that a rank gives to a collective and receives from it, forward and
backward, taken from the collectives themselves; and the time of each against its neighbours: an all-reduce of what we
send, and the all-gather of 2C+1 numbers per rank and all-reduce that torch's layer does on CUDA. Ranks share the
machine's cores, so beyond their number the times say nothing about a network; the counts are exact everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from syncbn import SyncBatchNorm
from syncbn.nn import groups

WORLDS = (1, 2, 4, 8)
WIDTHS = (64, 512, 2048)
CALLS = 40


class Traffic:
    """Collectives of this rank: how many, bytes given, bytes received."""

    def __init__(self) -> None:
        self.calls = self.given = self.received = 0

    def add(self, given: Tensor, received: int) -> None:
        """One collective."""
        size = given.numel() * given.element_size()
        self.calls, self.given, self.received = self.calls + 1, self.given + size, self.received + size * received


def counted(work: Callable[[], object]) -> Traffic:
    """What `work` sends."""
    traffic = Traffic()
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        traffic.add(tensor, 1)
        return all_reduce(tensor, *args, **kwargs)

    def gather(outputs: list[Tensor], tensor: Tensor, *args: object, **kwargs: object) -> object:
        traffic.add(tensor, len(outputs))
        return all_gather(outputs, tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", reduce), mock.patch.object(dist, "all_gather", gather):
        work()
    return traffic


def milliseconds(work: Callable[[], object], calls: int) -> float:
    """The lower quartile of so many calls, all ranks beginning together."""
    times = []
    for _ in range(calls):
        dist.barrier()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=4)[0] * 1e3


def measure(rank: int, world: int, store: str, calls: int, results: object) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    for channels in WIDTHS:
        layer = SyncBatchNorm(channels)
        # Values that differ by rank, as data does.
        input = torch.randn(4, channels, 2, 2, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        output: list[Tensor] = []
        forward = counted(lambda layer=layer, input=input, output=output: output.append(layer(input)))  # type: ignore[misc]
        backward = counted(lambda output=output: output[0].sum().backward())  # type: ignore[misc]
        row: dict[str, object] = {"world": world, "channels": channels}
        for name, traffic in (("forward", forward), ("backward", backward)):
            row[name] = {"calls": traffic.calls, "given": traffic.given, "received": traffic.received}
        sums = torch.zeros(4 * channels + 1, dtype=torch.float64)
        theirs, gathered = torch.zeros(2 * channels + 1), torch.zeros(world, 2 * channels + 1)
        works = {
            "all_reduce": lambda sums=sums: dist.all_reduce(sums),
            "sum_over_ranks": lambda sums=sums: groups.sum_over_ranks(sums, dist.group.WORLD),
            "all_gather": lambda gathered=gathered, theirs=theirs: dist.all_gather(list(gathered.unbind()), theirs),
        }
        row["ms"] = {name: milliseconds(work, calls) for name, work in works.items()}  # type: ignore[arg-type]
        if rank == 0:
            results.put(row)  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few calls of each, worlds up to 2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    worlds, calls = (WORLDS[:2], 4) if arguments.quick else (WORLDS, CALLS)
    rows = []
    for world in worlds:
        results = multiprocessing.get_context("spawn").Queue()
        with tempfile.TemporaryDirectory() as directory:
            args = (world, f"{directory}/store", calls, results)
            running = multiprocessing.spawn(measure, args, nprocs=world, join=False)
            rows += [results.get(timeout=120) for _ in WIDTHS]
            while not running.join():  # returns at every rank that ends
                pass
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread per rank\n")
    print("| ranks | C | collectives forward / backward | bytes given | bytes received"
          " | ms all_reduce | ms as the layer | ms all_gather as torch |\n|" + "---|" * 8)  # fmt: skip
    for row in rows:
        f, b, ms = row["forward"], row["backward"], row["ms"]
        print(f"| {row['world']} | {row['channels']} | {f['calls']} / {b['calls']} | {f['given']} / {b['given']}"
              f" | {f['received']} / {b['received']} | {ms['all_reduce']:.2f} | {ms['sum_over_ranks']:.2f}"
              f" | {ms['all_gather']:.2f} |")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
