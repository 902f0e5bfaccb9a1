"""Questions to one process on the whole batch: what has samples, what draws random numbers, what mixes samples."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.auditing.parity.batches import call, loss_of, tensors
from syncbn.auditing.parity.errors import ParityError, type_and_message
from syncbn.auditing.parity.normalization import Neutral, neutralize
from syncbn.auditing.parity.randomness import Silenced
from syncbn.auditing.parity.recorder import LOSS, Place, Recorder, first_names, seed_everything
from syncbn.auditing.parity.sketches import by_sample, squares
from syncbn.auditing.parity.subject import Facts, Subject, state_of
from syncbn.torch_compat import pytree

_MOVED = 1e-9  # relative difference above which something has moved; forwards on the same samples agree to the bit


def describe(subject: Subject) -> Facts:
    """What is to be known before any comparison.

    Raises:
        ParityError: model or loss fail in one process, in float32 too.
    """
    refusal = None
    for dtype in (torch.float64, torch.float32):
        try:
            recorder, has_count, layers = _first_step(subject, dtype)
            break
        except ParityError:
            raise
        except Exception as error:
            refusal = refusal or type_and_message(error)
            (subject.directory / "initial.pt").unlink(missing_ok=True)  # in the other dtype
            if dtype == torch.float32:
                raise
    return Facts(dtype, refusal if dtype == torch.float32 else None, _sample_dims(subject, dtype), has_count,
                 recorder.order, layers, recorder.draws, _try_empty_shard(subject, dtype))  # fmt: skip


def _first_step(subject: Subject, dtype: torch.dtype) -> tuple[Recorder, bool, frozenset[str]]:
    """One forward, loss and backward; whether the loss has a count, and the batch normalization layers."""
    model = subject.fresh(dtype)
    layers = frozenset(name for name, module in first_names(model).items() if isinstance(module, _BatchNorm))
    recorder = Recorder(model, shows=subject.shows, watches_randomness=True)
    inputs, targets = subject.shard(0, subject.num, dtype)
    seed_everything(0)
    recorder.begin_step()
    outputs = call(model, inputs)
    recorder.look("")
    value = loss_of(subject.loss, outputs, targets)
    recorder.look(LOSS)
    recorder.records = False
    if not value.total.requires_grad:
        raise ParityError("loss: does not depend on the model's parameters, so that there is nothing to train")
    value.total.backward()
    return recorder, value.count is not None, layers


class Probe:
    """Forward passes of one model on which no sample sees another one by way of batch normalization.

    Args:
        is_neutral: False to normalize with the batch all the same, as in training.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, *, is_neutral: bool = True) -> None:
        self.model = subject.fresh(dtype)
        if is_neutral:
            neutralize(self.model)
        self.is_neutral = is_neutral
        self.seen: dict[Place, Tensor] = {}
        self.recorder = Recorder(self.model, self._see, shows=subject.shows)
        self._buffers = [(buffer, buffer.detach().clone()) for _, _, buffer in self._named_buffers()]

    def _named_buffers(self) -> list[tuple[str, str, Tensor]]:
        return [one for one in state_of(self.model) if one[0] == "buffer"]

    def _see(self, place: Place, tensor: Tensor) -> None:
        self.seen.setdefault(place, tensor.detach())

    def restore(self) -> None:
        """Gives the buffers their initial values."""
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)

    def forward(self, inputs: Any, *, spared: str | None = None, seed: int = 0) -> Any:
        """The outputs, without a graph; `seen` is then what went in and out of all modules."""
        self.seen = {}
        self.recorder.begin_step()
        seed_everything(seed)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(Silenced(lambda: self.recorder.where, spared))
            if self.is_neutral:
                stack.enter_context(Neutral(lambda: self.recorder.where))
            return call(self.model, inputs)


def _sample_dims(subject: Subject, dtype: torch.dtype) -> dict[Place, int]:
    """The dimension of each tensor between modules that grows with the number of samples, found with fewer of them."""
    num, fewer = subject.num, subject.num // 2 + 1
    probe = Probe(subject, dtype)
    probe.forward(subject.shard(0, num, dtype)[0])
    whole = {place: tensor.shape for place, tensor in probe.seen.items()}
    probe.restore()
    try:
        probe.forward(subject.shard(0, fewer, dtype)[0])
    except Exception:  # it cannot take fewer: reported when a rank has fewer
        return {place: 0 for place, shape in whole.items() if shape[:1] == (num,)}
    dims = {}
    for place, tensor in probe.seen.items():
        shape, small = whole.get(place, ()), tensor.shape
        if len(shape) != len(small):
            continue
        grown = [dim for dim in range(len(shape)) if shape[dim] != small[dim]]
        if grown and shape[grown[0]] % num == 0 and shape[grown[0]] * fewer == small[grown[0]] * num:
            dims[place] = grown[0]
    return dims


def _try_empty_shard(subject: Subject, dtype: torch.dtype) -> tuple[str, str] | None:
    probe = Probe(subject, dtype)
    try:
        probe.forward(subject.shard(0, 0, dtype)[0])
    except Exception as error:
        return probe.recorder.where, type_and_message(error)
    return None


def find_random(subject: Subject, facts: Facts) -> dict[str, float]:
    """The modules whose random numbers change what the model computes, with the relative change of their output."""
    inputs, targets = subject.shard(0, subject.num, facts.dtype)
    probe = Probe(subject, facts.dtype)

    def run(spared: str | None, seed: int) -> dict[Place, Tensor]:
        probe.restore()
        outputs = probe.forward(inputs, spared=spared, seed=seed)
        with torch.no_grad(), Silenced(lambda: LOSS, spared):
            seen = {**probe.seen, Place("output", LOSS): loss_of(subject.loss, outputs, targets).total}
        return seen

    still, found = run(None, 0), {}
    for name in facts.draws:
        drawn = run(name, 1)
        own = [_difference(drawn[place], still[place]) for place in still.keys() & drawn.keys()
               if (place.kind, place.name) == ("output", name)]  # fmt: skip
        if _difference(drawn[Place("output", LOSS)], still[Place("output", LOSS)]) > _MOVED:
            found[name] = max(own, default=0.0)
    return found


def find_mixing(subject: Subject, facts: Facts, steps: int) -> dict[str, float]:
    """The modules that let one sample move the outputs of others, with the relative size of that.

    One sample is replaced by another one in the first of `steps` forward passes; without updates and with batch
    normalization that looks at no batch, nothing may move but its own outputs in that pass.
    """
    inputs, _ = subject.shard(0, subject.num, facts.dtype)
    other = _other_sample(inputs, subject.num)
    if other is None:
        return {}
    replaced = pytree.tree_map_only(Tensor, lambda leaf: _with_first(leaf, other, subject.num), inputs)
    probes = [Probe(subject, facts.dtype), Probe(subject, facts.dtype)]
    culprits: dict[str, float] = {}
    for step in range(steps):
        for probe, given in zip(probes, (inputs, replaced if step == 0 else inputs), strict=True):
            probe.forward(given)
        moved_inputs = set()
        for place, tensor in probes[0].seen.items():
            dim, peer = facts.dims.get(place), probes[1].seen.get(place)
            if dim is None or peer is None or tensor.shape != peer.shape:
                continue
            size = _difference_of_others(tensor, peer, dim, subject.num, skip=1 if step == 0 else 0)
            if not size > _MOVED:
                continue
            if place.kind == "input":
                moved_inputs.add((place.name, place.call))
            elif (place.name, place.call) not in moved_inputs and not _has_below(culprits, place.name):
                culprits[place.name] = max(size, culprits.get(place.name, 0.0))
    return culprits


def _has_below(names: dict[str, float], parent: str) -> bool:
    return any(name != parent and (parent == "" or name.startswith(parent + ".")) for name in names)


def _other_sample(inputs: Any, num: int) -> int | None:
    """The first sample that is not the same as sample 0; None if all are."""
    leaves = [leaf for leaf in tensors(inputs) if leaf.dim() and len(leaf) == num]
    return next((row for row in range(1, num) if any(not torch.equal(leaf[0], leaf[row]) for leaf in leaves)), None)


def _with_first(leaf: Tensor, row: int, num: int) -> Tensor:
    if not (leaf.dim() and len(leaf) == num):
        return leaf
    changed = leaf.clone()
    changed[0] = leaf[row]
    return changed


def _difference_of_others(one: Tensor, other: Tensor, dim: int, num: int, skip: int) -> float:
    """Relative difference of the rows from `skip` on; of two readings of the rows, that in which fewer move."""
    pairs = zip(by_sample(one, dim, num), by_sample(other, dim, num), strict=True)
    return min(_relative(*squares(b[skip:], a[skip:])) for a, b in pairs)


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return _relative(*squares(one.detach().double().reshape(-1), other.detach().double().reshape(-1)))


def _relative(difference: float, size: float) -> float:
    return (difference / size) ** 0.5 if size else difference**0.5
