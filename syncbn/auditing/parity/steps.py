"""Trains the model for some steps on this rank's samples, as data parallel training does, and records or compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.auditing.parity.batches import LossValue, call, loss_of, tensors
from syncbn.auditing.parity.errors import ParityError
from syncbn.auditing.parity.normalization import Intercepted, Synchronized, sum_over_all_ranks
from syncbn.auditing.parity.randomness import Silenced
from syncbn.auditing.parity.recorder import LOSS, Place, Recorder, seed_everything
from syncbn.auditing.parity.sketches import by_sample, sketch, squares
from syncbn.auditing.parity.subject import Facts, Subject, owner_of, state_of

UPDATE = 0.01  # norm of an update relative to that of the parameters


@dataclass(frozen=True)
class Trial:
    """How the ranks train: the cut of the batch, and what has been remedied."""

    sizes: tuple[int, ...]
    """Samples of each rank."""
    steps: int
    synchronized: bool = False
    """Every batch normalization, wherever it is, uses the samples of all ranks."""
    silent: bool = False
    """Nothing random is drawn."""
    weights: tuple[float, ...] | None = None
    """Weights of the ranks' losses in the global loss; None: equal ones, as DDP averages."""
    left: frozenset[str] = frozenset()
    """Modules whose normalization is not synchronized, because not every rank calls them."""
    under_ddp: bool = False
    """Gradients are averaged by DDP instead of by this module."""


@dataclass(frozen=True)
class Measure:
    """Sums of squares of one tensor of one step: of its difference from the reference, and of the reference."""

    step: int
    place: Place
    difference: float
    reference: float
    numel: int


@dataclass
class Outcome:
    """What one rank has met."""

    measures: list[Measure] = field(default_factory=list)
    """Differences from the reference, in the order of the network; none for the reference itself."""
    normalizations: Counter[str] = field(default_factory=Counter)
    """Calls of `F.batch_norm` that normalized with the batch, by module."""
    moved: dict[str, tuple[float, float]] = field(default_factory=dict)
    """What synchronizing changed, and the output, as sums of squares by module."""
    sub_groups: list[str] = field(default_factory=list)
    """Layers that summed over some of the ranks, before they were synchronized."""
    without_gradient: list[str] = field(default_factory=list)
    """Trainable parameters that had no gradient in some step."""
    buffers_moved: list[str] = field(default_factory=list)
    """Buffers that have changed since the start."""


Reference = dict[tuple[int, Place], tuple[list[Tensor], int]]  # sketches, and the number of values


class Steps:
    """Some training steps of one rank.

    Args:
        reference: where the reference is; a world of one writes it, all others compare themselves with it.
    """

    def __init__(self, subject: Subject, facts: Facts, trial: Trial, reference: Path) -> None:
        self.facts, self.trial, self.loss = facts, trial, subject.loss
        self.rank, self.world_size = dist.get_rank(), len(trial.sizes)
        self.outcome = Outcome()
        self.seen: Reference = {}
        self.step = 0
        self.num_here = trial.sizes[self.rank]
        self.start = sum(trial.sizes[: self.rank])
        self.model = subject.fresh(facts.dtype)
        if trial.synchronized:
            self.outcome.sub_groups = sum_over_all_ranks(self.model)
        self.inputs, self.targets = subject.shard(self.start, self.start + self.num_here, facts.dtype)
        self.recorder = Recorder(self.model, self._see, shows=subject.shows)
        self.shows, self.path = subject.shows, reference
        self.parameters = {
            name: tensor for kind, name, tensor in state_of(self.model) if kind == "parameter" and tensor.requires_grad
        }

    def run(self) -> Outcome:
        """Trains; with several ranks, returns how far this one is from the reference."""
        before = {name: tensor.detach().clone() for kind, name, tensor in state_of(self.model) if kind == "buffer"}
        wrapped = DistributedDataParallel(self.model) if self.trial.under_ddp else self.model
        for step in range(self.trial.steps):
            self.step = step
            self._train_step(wrapped)
        after = {name: tensor for kind, name, tensor in state_of(self.model) if kind == "buffer"}
        self.outcome.buffers_moved = [
            name for name, tensor in after.items() if name in before and not _same(tensor, before[name])
        ]
        if self.world_size == 1:
            torch.save(self.seen, self.path)
        else:
            self.outcome.measures = self._compare(torch.load(self.path, weights_only=False))  # rank 0 has written it
        return self.outcome

    def _train_step(self, wrapped: nn.Module) -> None:
        own = 0 if self.trial.silent else 7919 * self.world_size + 104729 * self.rank
        seed_everything(1_000_003 * self.step + own)
        self.recorder.begin_step()
        with self._modes():
            outputs = call(wrapped, self.inputs)
            self.recorder.stack.append(LOSS)
            self.shows("the loss")
            value = loss_of(self.loss, outputs, self.targets)
            self.recorder.stack.pop()
            self.recorder.records = False
            self.shows("the backward pass")
            total = self._backward(value, outputs)
        self._keep(Place("loss", LOSS), total)
        gradients = self._reduce()
        position = {name: index for index, name in enumerate(self.facts.order)}
        backwards = sorted(gradients, key=lambda name: position.get(owner_of(name), -1), reverse=True)
        for name in backwards:
            self._keep(Place("gradient", name), gradients[name])
        self._update(gradients)
        for kind, name, tensor in state_of(self.model):
            self._keep(Place(kind, name), tensor)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        def where() -> str:
            return self.recorder.where

        synchronized = self.trial.synchronized and self.world_size > 1
        mode = Synchronized(where, self.trial.left) if synchronized else Intercepted(where)
        with ExitStack() as stack:
            if self.trial.silent:
                stack.enter_context(Silenced(where))
            stack.enter_context(mode)
            yield
        self.outcome.normalizations += mode.calls
        if isinstance(mode, Synchronized):
            for name, (difference, whole) in mode.moved.items():
                before = self.outcome.moved.get(name, (0.0, 0.0))
                self.outcome.moved[name] = (before[0] + difference, before[1] + whole)

    def _backward(self, value: LossValue, outputs: Any) -> Tensor:
        """Runs the backward pass; returns the global loss."""
        if not value.total.requires_grad:
            raise ParityError("the loss does not depend on the model's parameters here, so that it has no backward")
        if value.count is not None:
            counts = value.count.clone()
            dist.all_reduce(counts)
            weight = 1 / float(counts) if float(counts) else 0.0
        elif self.trial.weights is not None:
            weight = self.trial.weights[self.rank]
        else:
            weight = 1 / self.world_size
        share = value.total * weight
        if weight == 0 and not bool(value.total.isfinite()):  # the mean over nothing
            share = sum(one.sum() * 0 for one in tensors(outputs) if one.requires_grad) + torch.zeros_like(share)
        (share * self.world_size if self.trial.under_ddp else share).backward()
        total = share.detach().to(torch.float64)
        dist.all_reduce(total)
        if self.world_size == 1 and not bool(total.isfinite()):
            raise ParityError(f"the loss is {float(total)} in one process already, in step {self.step}")
        return total

    def _reduce(self) -> dict[str, Tensor]:
        """The gradients summed over ranks; a parameter without one on this rank adds nothing, and is noted."""
        names = [*self.parameters]
        missing = [name for name in names if self.parameters[name].grad is None]
        self.outcome.without_gradient += [name for name in missing if name not in self.outcome.without_gradient]
        gradients = {}
        for name in names:
            parameter = self.parameters[name]
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            gradients[name] = grad.to_dense() if grad.layout != torch.strided else grad
        if self.trial.under_ddp or self.world_size == 1 or not names:
            return gradients
        packed = torch.cat([gradients[name].reshape(-1) for name in names])
        dist.all_reduce(packed)
        parts = packed.split([gradients[name].numel() for name in names])
        return {name: part.view_as(gradients[name]) for name, part in zip(names, parts, strict=True)}

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor]) -> None:
        """Moves the parameters along the gradient by a hundredth of their norm."""
        size = sum(float(tensor.double().square().sum()) for tensor in self.parameters.values()) ** 0.5
        slope = sum(float(tensor.double().square().sum()) for tensor in gradients.values()) ** 0.5
        for name, tensor in self.parameters.items():
            if slope > 0:
                tensor.sub_(gradients[name], alpha=UPDATE * size / slope)
            tensor.grad = None

    def _see(self, place: Place, tensor: Tensor) -> None:
        dim = self.facts.dims.get(place)
        if place.kind != "output" or dim is None or tensor.dim() <= dim or (self.step, place) in self.seen:
            return
        if self.num_here and tensor.shape[dim] % self.num_here == 0:
            self.seen[self.step, place] = (by_sample(tensor, dim, self.num_here), tensor.numel())

    def _keep(self, place: Place, tensor: Tensor) -> None:
        self.seen[self.step, place] = ([sketch(tensor)], tensor.numel())

    def _compare(self, reference: Reference) -> list[Measure]:
        """Measures of all tensors of the reference; infinite where this rank has no such tensor."""
        measures = []
        for (step, place), (theirs, numel) in reference.items():
            mine, _ = self.seen.get((step, place), ([], 0))
            cut = [one[self.start : self.start + self.num_here] if place.kind == "output" else one for one in theirs]
            pairs = [squares(one, other) for one, other in zip(mine, cut, strict=False) if one.shape == other.shape]
            difference, size = min(pairs, default=(float("inf"), 1.0))
            measures.append(Measure(step, place, difference, size, numel))
        return measures


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
