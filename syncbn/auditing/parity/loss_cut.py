"""The cut of a batch over ranks, as a loss sees it: with what weights the ranks' losses make that of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.auditing.parity.batches import loss_of, tensors
from syncbn.auditing.parity.probes import Probe
from syncbn.auditing.parity.randomness import Silenced
from syncbn.auditing.parity.recorder import LOSS, Place, seed_everything
from syncbn.auditing.parity.subject import Facts, Subject
from syncbn.torch_compat import pytree

# The part of the whole batch's gradient, relative, that weighted losses of the ranks may leave: rounding, by dtype.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class LossCut:
    """What the cut of the batch over ranks does to a loss."""

    weights: tuple[float, ...] | None
    """Weights by rank with which the ranks' losses add up to the loss of the whole batch; None: there are none."""
    difference: float
    """Relative difference of the gradient that DDP makes of the ranks' losses from that of the whole batch."""
    is_known: bool = True
    """False where the outputs cannot be cut, and the weights are those of the samples, on trial."""


class _Batch(NamedTuple):
    """The whole batch, as one process sees it; the lists have an item for each tensor of the outputs."""

    outputs: Any
    dims: list[int | None]
    """The dimension of the samples; None for a tensor without one."""
    gradients: list[Tensor | None]
    """Gradients of the loss; None where the loss does not use the tensor."""


def cut_loss(subject: Subject, facts: Facts, cuts: Sequence[tuple[int, ...]]) -> list[LossCut]:
    """Compares, for every cut, the gradients of the loss on the ranks' outputs with that on all outputs."""
    inputs, targets = subject.shard(0, subject.num, facts.dtype)
    outputs = Probe(subject, facts.dtype, is_neutral=False).forward(inputs)
    dims = [facts.dims.get(Place("output", "", 0, leaf)) for leaf in range(len(tensors(outputs)))]
    batch = _Batch(outputs, dims, _loss_gradients(subject, outputs, targets))
    fits = [dim is not None and one.shape[dim] == subject.num for one, dim in zip(tensors(outputs), dims, strict=True)]
    is_cut = all(ok or gradient is None for ok, gradient in zip(fits, batch.gradients, strict=True)) and any(fits)
    if not is_cut:
        return [LossCut(tuple(size / subject.num for size in sizes), 0.0, is_known=False) for sizes in cuts]
    return [_cut_loss(subject, facts, batch, sizes) for sizes in cuts]


def _cut_loss(subject: Subject, facts: Facts, batch: _Batch, sizes: tuple[int, ...]) -> LossCut:
    weights = list[float]()
    # Sums of squares over ranks: of the whole batch's gradient, and of what it has that the ranks' gradients have not,
    # once weighted and once averaged by DDP.
    total, left, difference, start = 0.0, 0.0, 0.0, 0
    for size in sizes:
        expected, own = _shard_gradients(subject, facts.dtype, batch, start, size)
        is_empty = not bool(own.isfinite().all())  # the mean over nothing
        own = torch.zeros_like(own) if is_empty else own
        weight = 1.0 if facts.has_count else _weight(expected, own, 0.0 if is_empty else size / subject.num)
        averaged = own if facts.has_count else own / len(sizes)
        weights.append(weight)
        total += float(expected.square().sum())
        left += float((expected - weight * own).square().sum())
        difference += float("inf") if is_empty else float((expected - averaged).square().sum())
        start += size
    has_weights = _relative(left, total) <= _LIMITS[facts.dtype]
    return LossCut(tuple(weights) if has_weights else None, _relative(difference, total))


def _weight(expected: Tensor, own: Tensor, default: float) -> float:
    """The factor by which a rank's gradient comes closest to its part of the whole batch's, by least squares."""
    square = float(own.square().sum())
    return float(own @ expected) / square if square else default


def _relative(square: float, total: float) -> float:
    return (square / total) ** 0.5 if total else square**0.5


def _shard_gradients(
    subject: Subject, dtype: torch.dtype, batch: _Batch, start: int, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to a rank's part of the outputs: of the batch's loss and of the rank's; (n,) float64."""
    dims = iter(batch.dims)

    def part(leaf: Tensor) -> Tensor:
        dim = next(dims)
        return leaf if dim is None else leaf.narrow(dim, start, size)

    _, targets = subject.shard(start, start + size, dtype)
    gradients = _loss_gradients(subject, pytree.tree_map_only(Tensor, part, batch.outputs), targets)
    of_batch, of_rank = [], []
    for whole, own, dim in zip(batch.gradients, gradients, batch.dims, strict=True):
        if dim is not None and whole is not None:
            cut = whole.narrow(dim, start, size)
            of_batch.append(cut.reshape(-1))
            of_rank.append(torch.zeros_like(cut).reshape(-1) if own is None else own.reshape(-1))
    return torch.cat(of_batch).double(), torch.cat(of_rank).double()


def _loss_gradients(subject: Subject, outputs: Any, targets: Any) -> list[Tensor | None]:
    """The gradient of the loss (its sum, if it has a count) for each output tensor; None for those it does not use."""
    leaves = pytree.tree_map_only(Tensor, lambda one: one.detach().clone(), outputs)
    wanted = [one.requires_grad_() for one in tensors(leaves) if one.is_floating_point()]
    seed_everything(0)
    with Silenced(lambda: LOSS):
        total = loss_of(subject.loss, leaves, targets).total
    if not total.requires_grad:
        return [None for _ in tensors(leaves)]
    gradients = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    return [next(gradients) if one.is_floating_point() else None for one in tensors(leaves)]
