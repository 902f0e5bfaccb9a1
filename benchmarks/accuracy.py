"""The error of synchronized batch normalization, by scheme, for data whose mean is far from zero.

    python benchmarks/accuracy.py            prints the tables of benchmarks/accuracy.md

Two gloo ranks hold half of a (32, 64, 56, 56) batch each; weight 1, bias 0. The number is max |y - y_true| over the
batch. For float32 inputs y_true is float64 `nn.BatchNorm2d` on the same values; for float64 inputs it is computed in
numpy's extended precision (a 64-bit significand).
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn import SyncBatchNorm

SHAPE = (32, 64, 56, 56)
# Mean and standard deviation of the input, for each column of the tables.
COLUMNS = [(0.0, 1.0), (10.0, 1.0), (1000.0, 0.1), (1000.0, 0.01), (1e4, 1.0), (1000.123, 0.01)]
EPS = 1e-5
DIMS = (0, 2, 3)


def local_batch_norm(input: Tensor) -> Tensor:
    """torch's local batch normalization, on the whole batch in one process."""
    return F.batch_norm(input, None, None, training=True, eps=EPS)


def raw_sums(input: Tensor) -> Tensor:
    """The variance as E[x^2] - E[x]^2, from sums in the input's dtype: one all-reduce, but cancellation."""
    sums = torch.stack([torch.full((input.size(1),), input.numel() / input.size(1), dtype=input.dtype),
                        input.sum(DIMS), input.square().sum(DIMS)])  # fmt: skip
    dist.all_reduce(sums)
    mean, mean_square = sums[1] / sums[0], sums[2] / sums[0]
    return _normalize(input, mean, mean_square - mean.square())


def merged_moments(input: Tensor) -> Tensor:
    """Mean and M2 (sum of squared deviations) of each rank, merged in the input's dtype, as torch and apex do."""
    count = input.numel() // input.size(1)
    mean = input.mean(DIMS)
    local = torch.stack([mean, (input - mean[:, None, None]).square().sum(DIMS)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    (mean, m2), total = gathered[0], count
    for other_mean, other_m2 in gathered[1:]:
        delta = other_mean - mean
        m2 = m2 + other_m2 + delta.square() * (total * count / (total + count))
        mean, total = mean + delta * (count / (total + count)), total + count
    return _normalize(input, mean, m2 / total)


def ours(input: Tensor) -> Tensor:
    """syncbn.SyncBatchNorm."""
    return SyncBatchNorm(input.size(1), affine=False, dtype=input.dtype, eps=EPS)(input)


def _normalize(input: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (input - mean[:, None, None]) * (variance + EPS).rsqrt()[:, None, None]


def true_output(input: Tensor) -> Tensor:
    """The reference output as float64, computed in a wider dtype than the input's."""
    if input.dtype == torch.float32:
        return nn.BatchNorm2d(input.size(1), affine=False, dtype=torch.float64, eps=EPS)(input.double())
    wide = input.numpy().astype(np.longdouble)
    centred = wide - wide.mean(axis=DIMS, keepdims=True)
    variance = np.square(centred).mean(axis=DIMS, keepdims=True)
    return torch.from_numpy((centred / np.sqrt(variance + np.longdouble(EPS))).astype(np.float64))


def measure(dtype: torch.dtype) -> dict[str, list[float]]:
    """The largest absolute error of each scheme in each column, over both ranks; infinite if an output is NaN."""
    rank = dist.get_rank()
    schemes: dict[str, Callable[[Tensor], Tensor]] = {
        "`F.batch_norm`, one process": local_batch_norm,
        "raw sums, one all-reduce": raw_sums,
        "local mean and M2, merged": merged_moments,
        "syncbn": ours,
    }
    table: dict[str, list[float]] = {name: [] for name in schemes}
    for mean, std in COLUMNS:
        generator = torch.Generator().manual_seed(0)
        input = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
        truth = true_output(input)
        for name, scheme in schemes.items():
            sees_all = scheme is local_batch_norm
            part, expected = (input, truth) if sees_all else (input.chunk(2)[rank], truth.chunk(2)[rank])
            error = (scheme(part).double() - expected).abs().nan_to_num(nan=torch.inf).max()
            dist.all_reduce(error, dist.ReduceOp.MAX)
            table[name].append(error.item())
    return table


def print_table(title: str, table: dict[str, list[float]]) -> None:
    """Prints the table as Markdown; `nan` stands for a negative variance."""
    print(f"\n{title}\n")
    print("| mean / std | " + " | ".join(f"{mean:g} / {std:g}" for mean, std in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, errors in table.items():
        cells = ["nan" if error == float("inf") else f"{error:.1e}" for error in errors]
        print(f"| {name} | " + " | ".join(cells) + " |")


def run_rank(rank: int, store: str) -> None:
    """The program of one of the two ranks; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        for dtype in (torch.float32, torch.float64):
            table = measure(dtype)
            if rank == 0:
                print_table(f"{str(dtype).removeprefix('torch.')} inputs", table)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {platform.machine()}, two gloo ranks, one thread each")
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(run_rank, (str(Path(directory) / "store"),), nprocs=2)
