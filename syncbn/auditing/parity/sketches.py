"""Sketches of tensors: what is kept of the outputs of all modules, small, and as different as the tensors are.

A sample's values are multiplied by fixed random signs and added up in 512 places. Differences and norms survive, in
the mean over such signs exactly (a count sketch; Charikar, Chen and Farach-Colton 2002), and it is linear.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WIDTH = 512


@cache
def _signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1


def sketch(tensor: Tensor, num_rows: int = 1) -> Tensor:
    """A sketch per row, (num_rows, at most 512) float64; the values themselves where they are few."""
    values = tensor.detach()
    if values.is_sparse or values.layout != torch.strided:
        values = values.to_dense()
    if values.is_complex():
        values = torch.view_as_real(values)
    flat = values.to(torch.float64).reshape(num_rows, values.numel() // max(num_rows, 1))
    size = flat.shape[1]
    if size <= WIDTH:
        return flat.clone()
    signed = torch.nn.functional.pad(flat * _signs(size), (0, -size % WIDTH))
    return signed.view(num_rows, -1, WIDTH).sum(1)


def by_sample(tensor: Tensor, dim: int, num: int) -> list[Tensor]:
    """Sketches by sample, (num, K), of a tensor whose dimension `dim` has one or several entries for each sample.

    Where there are several, their order is not known: (all of sample 0, all of sample 1, ...), as a reshape gives it,
    or (first of all samples, second of all samples, ...), as concatenated views do. Both readings are returned.
    """
    moved = tensor.detach().movedim(dim, 0)
    several = moved.shape[0] // num if num else 1
    if several == 1 or num == 0:
        return [sketch(moved, num)]
    by_view = moved.reshape(several, num, *moved.shape[1:]).transpose(0, 1)
    return [sketch(moved.reshape(num, -1), num), sketch(by_view.reshape(num, -1), num)]


def squares(mine: Tensor, reference: Tensor) -> tuple[float, float]:
    """Sums of squares of the difference and of the reference; infinite where only one of two values is finite."""
    finite = mine.isfinite(), reference.isfinite()
    if not torch.equal(*finite):
        return float("inf"), 1.0
    kept = reference[finite[1]]
    return float((mine[finite[0]] - kept).square().sum()), float(kept.square().sum())
