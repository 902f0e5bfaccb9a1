"""How far the ranks of a trial are from one process, and which tensor is the first that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from syncbn.auditing.parity.recorder import Place
from syncbn.auditing.parity.steps import Measure, Outcome
from syncbn.auditing.parity.worker import Failure

# Relative differences above which a tensor differs. Measured on right models over four steps: at most 5e-14 in float64,
# while planted faults begin at 4e-3 (docs/parity.md). In float32 the gradients of biases in front of a normalization,
# which are rounding alone, need the room.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}
_SMALLEST_RMS = 1e-4  # tensors of smaller values (a sum that cancels) are compared with this
_SMALLEST_GRADIENT = 1e-2  # and gradients (of a bias in front of a normalization) with this fraction of the largest
# What training leads to. Other tensors say where a difference begins; alone, they do not change what is trained.
_DECIDING = ("loss", "gradient", "parameter", "buffer")


@dataclass(frozen=True)
class Difference:
    """A tensor that is not that of one process."""

    step: int
    place: Place
    size: float
    """The norm of the difference relative to that of the tensor."""


class Comparison:
    """The differences of all ranks together, in the order of the network.

    Args:
        outcomes: by rank.
    """

    def __init__(self, outcomes: Sequence[Outcome], dtype: torch.dtype) -> None:
        self.outcomes = outcomes
        self.sizes = _sizes([outcome.measures for outcome in outcomes])
        self.differences = [one for one in self.sizes if not one.size <= LIMITS[dtype]]

    @property
    def is_clean(self) -> bool:
        """Whether loss, gradients, parameters and buffers are those of one process, in every step."""
        return not any(one.place.kind in _DECIDING for one in self.differences)

    @property
    def first(self) -> Difference | None:
        """The first tensor that differs, in the order of the network; None if the model trains the same."""
        return None if self.is_clean else self.differences[0]

    def size_at(self, kind: str, name: str) -> float:
        """The largest difference of a module's output, or of a parameter or buffer; 0 if it does not differ."""
        return max((one.size for one in self.sizes if (one.place.kind, one.place.name) == (kind, name)), default=0.0)


def _sizes(by_rank: Sequence[Sequence[Measure]]) -> list[Difference]:
    merged: list[Measure] = []
    for measures in zip(*by_rank, strict=True):
        first = measures[0]
        if first.place.kind == "output":  # each rank has its samples
            squares = sum(one.difference for one in measures), sum(one.reference for one in measures)
        else:
            squares = max(one.difference for one in measures), first.reference
        merged.append(Measure(first.step, first.place, *squares, first.numel))
    steepest: dict[int, float] = {}
    for one in merged:
        if one.place.kind == "gradient":
            steepest[one.step] = max(steepest.get(one.step, 0.0), one.reference**0.5)
    return [Difference(one.step, one.place, _relative(one, steepest)) for one in merged]


def _relative(one: Measure, steepest: dict[int, float]) -> float:
    if one.place.kind == "gradient":
        floor = _SMALLEST_GRADIENT * steepest[one.step]
    else:
        floor = _SMALLEST_RMS * one.numel**0.5
    scale = max(one.reference**0.5, floor)
    return one.difference**0.5 / scale if scale else one.difference**0.5


@dataclass(frozen=True)
class SizeResult:
    """What came out at one world size, without any remedy."""

    world_size: int
    cut: tuple[int, ...]
    """Samples of the ranks."""
    first: str | None
    """The first tensor that differs, in words; None if the model trains the same."""
    difference: float | None
    """Its relative difference."""

    def in_words(self) -> str:
        """What came out."""
        if self.first is None:
            return "the same as one process"
        return f"differs, first {self.first}" + ("" if self.difference is None else f" ({self.difference:.2g})")

    def __str__(self) -> str:
        return f"world size {self.world_size}, samples {list(self.cut)}: {self.in_words()}"


def in_words(one: Difference) -> str:
    """Which tensor of which step."""
    name = one.place.name or "the model"
    what = "the loss" if one.place.kind == "loss" else f"the {one.place.kind} of {name}"
    return f"{what} in step {one.step}"


def result_of(cut: tuple[int, ...], base: Comparison | Failure) -> SizeResult:
    """The result of a world size without remedies."""
    if isinstance(base, Failure):
        return SizeResult(len(cut), cut, f"an error on rank {base.rank} in {base.where or 'the model'}", None)
    first = base.first
    if first is None:
        return SizeResult(len(cut), cut, None, None)
    return SizeResult(len(cut), cut, in_words(first), first.size if isfinite(first.size) else None)
