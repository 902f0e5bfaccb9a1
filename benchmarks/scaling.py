"""Bytes that one synchronized layer communicates as the world grows, and its times with gloo on this machine.

python benchmarks/scaling.py [--quick] [--json FILE]        takes two minutes, mostly to start processes

The first table counts, for 1, 2, 4 and 8 ranks and some widths C, the bytes that a rank gives to a collective and
receives from it, forward and backward, by intercepting the collectives. The second one gives the time of the forward
collective: an all-reduce of our payload, the same sum as the layer does it on CPU, and the all-gather of 2C+1 float32
per rank that torch's layer does on CUDA. Both tables can go into docs/scaling.md as they are.

Next to the times are the predictions of the model of docs/scaling.md: a latency a and a time per byte b, fitted to the
times of two ranks (so at two ranks the model is a fit and no prediction), and gloo's rings for more. Ranks share the
machine's cores: with more ranks than cores, each round also waits for a core, which the model does not include, and the
times say nothing about a network. The counts are exact everywhere.
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
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from syncbn import SyncBatchNorm
from syncbn.nn.collectives import sum_over_ranks

WORLDS = (1, 2, 4, 8)
WIDTHS = (64, 512, 2048, 16384)  # the last one, wider than real layers, makes the time per byte visible
RUNS, CALLS = 5, 10  # timed runs of each collective, and calls in each run
ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"
Row = dict[str, Any]


class Traffic:
    """Counts of this rank's collectives: calls, bytes given to them, bytes received from them."""

    def __init__(self) -> None:
        self.calls = self.given = self.received = 0

    def add(self, given: Tensor, received: int) -> None:
        """Counts one collective that gives a tensor and receives `received` tensors of its size."""
        size = given.numel() * given.element_size()
        self.calls, self.given, self.received = self.calls + 1, self.given + size, self.received + size * received


def counted(work: Callable[[], object]) -> Traffic:
    """Runs `work` and counts its all-reduces and all-gathers."""
    traffic = Traffic()
    all_reduce, all_gather = dist.ProcessGroup.allreduce, dist.ProcessGroup.allgather

    def reduce(group: dist.ProcessGroup, tensors: list[Tensor], *args: object, **kwargs: object) -> object:
        for tensor in tensors:
            traffic.add(tensor, 1)
        return all_reduce(group, tensors, *args, **kwargs)

    def gather(
        group: dist.ProcessGroup, outputs: list[list[Tensor]], tensors: list[Tensor], *args: object, **kwargs: object
    ) -> object:
        for received, tensor in zip(outputs, tensors, strict=True):
            traffic.add(tensor, len(received))
        return all_gather(group, outputs, tensors, *args, **kwargs)

    # Where `dist.all_reduce` and the layer's own call meet.
    with (
        mock.patch.object(dist.ProcessGroup, "allreduce", reduce),
        mock.patch.object(dist.ProcessGroup, "allgather", gather),
    ):
        work()
    return traffic


def milliseconds(work: Callable[[], object], runs: int, calls: int) -> float:
    """Milliseconds per call, of several in a row (the collectives keep the ranks in step); lower quartile of runs."""
    times = []
    for _ in range(runs + 1):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls)
    return statistics.quantiles(times[1:], n=4, method="inclusive")[0] * 1e3  # the first run also connects the ranks


def measure(rank: int, world: int, directory: str, runs: int, calls: int) -> None:
    """The program of one rank; rank 0 writes its rows to `directory`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    rows = []
    for channels in WIDTHS:
        layer = SyncBatchNorm(channels)
        # Values that differ by rank, as data does.
        input = torch.randn(4, channels, 2, 2, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        output: list[Tensor] = []
        forward = counted(lambda layer=layer, input=input, output=output: output.append(layer(input)))  # type: ignore[misc]
        backward = counted(lambda output=output: output[0].sum().backward())  # type: ignore[misc]
        row: Row = {"world": world, "channels": channels}
        for name, traffic in (("forward", forward), ("backward", backward)):
            row[name] = {"calls": traffic.calls, "given": traffic.given, "received": traffic.received}
        sums = torch.zeros(4 * channels + 1, dtype=torch.float64)
        theirs, gathered = torch.zeros(2 * channels + 1), torch.zeros(world, 2 * channels + 1)
        works = {
            ALL_REDUCE: lambda sums=sums: dist.all_reduce(sums),
            "layer": lambda sums=sums: sum_over_ranks(sums, dist.group.WORLD),
            ALL_GATHER: lambda gathered=gathered, theirs=theirs: dist.all_gather(list(gathered.unbind()), theirs),
        }
        row["bytes"] = {ALL_REDUCE: sums.nbytes, ALL_GATHER: theirs.nbytes}
        row["ms"] = {name: milliseconds(work, runs, calls) for name, work in works.items()}  # type: ignore[arg-type]
        rows.append(row)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps(rows))


def terms(collective: str, world: int, size: int) -> tuple[float, float]:
    """Factors of a and b in the model, for `size` bytes n from each of W ranks and gloo's rings (docs/scaling.md).

    An all-reduce takes 2(W-1) a + 2(W-1)/W n b, an all-gather (W-1) a + (W-1) n b.
    """
    if collective == ALL_REDUCE:
        return 2.0 * (world - 1), 2.0 * (world - 1) / world * size
    return world - 1.0, (world - 1.0) * size


def fit(collective: str, rows: list[Row]) -> tuple[float, float]:
    """Fits a and b, in milliseconds, to the times of two ranks by least squares of the relative errors."""
    pairs = [(terms(collective, 2, row["bytes"][collective]), row["ms"][collective])
             for row in rows if row["world"] == 2]  # fmt: skip
    scaled = torch.tensor([[latencies / ms, size / ms] for (latencies, size), ms in pairs], dtype=torch.float64)
    ones = torch.ones(len(pairs), 1, dtype=torch.float64)
    latency, byte = torch.linalg.lstsq(scaled, ones).solution.flatten().tolist()
    if byte < 0:  # too small against the noise: only a is fitted
        return float(torch.linalg.lstsq(scaled[:, :1], ones).solution), 0.0
    return latency, byte


def show(rows: list[Row]) -> None:
    """Prints the table of counts, the fitted model, and the table of times with its predictions."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo, one thread per rank\n")
    print("| ranks | C | collectives forward / backward | bytes given | bytes received |\n|" + "---|" * 5)
    for row in rows:
        f, b = row["forward"], row["backward"]
        print(f"| {row['world']} | {row['channels']:,} | {f['calls']} / {b['calls']} | {f['given']:,} / {b['given']:,}"
              f" | {f['received']:,} / {b['received']:,} |")  # fmt: skip
    models = {collective: fit(collective, rows) for collective in (ALL_REDUCE, ALL_GATHER)}
    print("\nFitted to two ranks: " + "; ".join(
        f"{name} a = {1e3 * a:.0f} us, b = " + (f"1 / ({1e-6 / b:.2f} GB/s)" if b else "too small to see")
        for name, (a, b) in models.items()))  # fmt: skip
    print("\n| ranks | C | all-reduce of ours, ms | model | as the layer on CPU, ms"
          " | all-gather of torch's, ms | model |\n|" + "---|" * 7)  # fmt: skip
    for row in rows:
        if row["world"] == 1:  # no collective
            continue
        predicted = {}
        for collective, (latency, byte) in models.items():
            latencies, size = terms(collective, row["world"], row["bytes"][collective])
            predicted[collective] = latency * latencies + byte * size
        ms = row["ms"]
        print(f"| {row['world']} | {row['channels']:,} | {ms[ALL_REDUCE]:.2f} | {predicted[ALL_REDUCE]:.2f}"
              f" | {ms['layer']:.2f} | {ms[ALL_GATHER]:.2f} | {predicted[ALL_GATHER]:.2f} |")  # fmt: skip


def main() -> None:
    """Measures all world sizes, prints, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few calls of each, worlds up to 2")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    worlds, runs, calls = (WORLDS[:2], 2, 2) if arguments.quick else (WORLDS, RUNS, CALLS)
    rows: list[Row] = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as directory:
            multiprocessing.spawn(measure, (world, directory, runs, calls), nprocs=world)  # raises if a rank fails
            rows += json.loads(Path(directory, "rows.json").read_text())
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
