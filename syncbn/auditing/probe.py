"""Running a model once to see what its batch normalization layers are given, and leaving no trace of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.auditing.dropout import DropoutTrace
from syncbn.nn.batchnorm import width_of
from syncbn.nn.call_stack import is_inside
from syncbn.nn.modes import restored_modes
from syncbn.nn.moments import Moments
from syncbn.nn.patterns import unwrapped
from syncbn.stats.calls import counted, has_lazy_layers, input_of


@dataclass
class Seen:
    """What one layer was given: one forward of the batch of all ranks."""

    moments: Moments
    """Of this rank until `_pool` has run, then of all."""
    rows_here: float
    """Samples (size of dimension 0) per call on this rank."""
    rows: float
    """The same over all ranks."""
    num_calls: int
    dtype: torch.dtype
    max_abs: float
    """On this rank; not finite if any value is not."""
    dropout: float
    """The rate of a dropout in front of it, with nothing that normalizes between; 0 for none."""
    under_checkpoint: bool

    @property
    def mean(self) -> Tensor:
        """(C,) float64."""
        return self.moments.mean

    @property
    def var(self) -> Tensor:
        """(C,) float64, biased."""
        return self.moments.var

    @property
    def values_per_row(self) -> float:
        """Values per channel that a sample has."""
        total = self.rows * self.num_calls
        return float(self.moments.count) / total if total else 0.0

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite, on every rank."""
        return bool(self.mean.isfinite().all() and self.var.isfinite().all())


def probe(model: nn.Module, layers: dict[str, _BatchNorm], batch: Any) -> dict[str, Seen]:
    """Runs the model in its present mode, with gradients enabled in training but without a backward pass.

    Buffers, modes and torch's random numbers are afterwards what they were; tensors that are no buffers and change in
    forward cannot be guarded. In a distributed job every rank has to call it.

    Returns:
        What each of the layers was given; those that did not run are left out.
    """
    model = unwrapped(model)
    if has_lazy_layers(model):
        raise ValueError(
            "batch: the model has lazy layers that have not seen their width; run it once before the audit"
        )
    seen: dict[str, Seen] = {}
    trace = DropoutTrace()
    with ExitStack() as stack:
        stack.enter_context(_guarded(model))
        for name, layer in layers.items():
            stack.enter_context(_watched(name, layer, seen, trace))
        # The model's own warnings are for its own runs; reentrant checkpointing has one about inputs without gradient.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.set_grad_enabled(model.training))
        if "torch._dynamo" in sys.modules:  # hooks have to run; what was never imported has compiled nothing
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(trace)
        try:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
        except ValueError:
            # A single value per channel is an error of the layer, and what the audit is there to name.
            if not any(float(one.moments.count) == 1 for one in seen.values()):
                raise
    _pool(layers, seen)
    return {name: one for name, one in seen.items() if one.num_calls}


@contextmanager
def _watched(name: str, layer: _BatchNorm, seen: dict[str, Seen], trace: DropoutTrace) -> Iterator[None]:
    @torch.no_grad()
    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = input_of(arguments, keywords)
        if given is None or given.dim() < 2:
            return
        input, mask = counted(layer, arguments, keywords)
        moments, rows = Moments.of(input, mask), float(len(input))
        last = seen.get(name)
        seen[name] = Seen(
            moments if last is None else last.moments + moments,
            rows if last is None else last.rows_here,
            rows if last is None else last.rows,
            1 if last is None else last.num_calls + 1,
            input.dtype,
            max(float(input.abs().max()) if input.numel() else 0.0, 0.0 if last is None else last.max_abs),
            max(trace.rate(given), 0.0 if last is None else last.dropout),
            is_inside("torch.utils.checkpoint") or (last is not None and last.under_checkpoint),
        )

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            trace.forget(output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pool(layers: dict[str, _BatchNorm], seen: dict[str, Seen]) -> None:
    """Sums the moments over all ranks, with one collective for all layers together."""
    if not layers or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    device = next((one.moments.packed.device for one in seen.values()), None)
    parts = []
    for name, layer in layers.items():
        nothing = torch.zeros(4 * width_of(layer) + 2, dtype=torch.float64, device=device)
        one = seen.get(name)
        parts.append(
            nothing if one is None else torch.cat([one.moments.packed, one.moments.packed.new_tensor([one.rows])])
        )
    total = torch.cat(parts)
    dist.all_reduce(total)
    for name, part in zip(layers, total.split([len(part) for part in parts]), strict=True):
        if name in seen:
            seen[name].moments, seen[name].rows = Moments(part[:-1]), float(part[-1])


@contextmanager
def _guarded(model: nn.Module) -> Iterator[None]:
    """Forward passes meet copies of all buffers; modes and torch's random numbers are put back."""
    modules = list(model.modules())
    buffers = {module: dict(module._buffers) for module in modules}
    copies: dict[int, Tensor] = {}
    for module in modules:
        for name, buffer in buffers[module].items():
            if buffer is not None:  # one that is shared stays shared
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    # A monitor that watches meanwhile must not see this.
    records = {module: module.__dict__.pop("_record") for module in modules if "_record" in module.__dict__}
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"}
    try:
        with restored_modes(model), torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module in modules:
            module._buffers.clear()
            module._buffers.update(buffers[module])
        for module, its_record in records.items():
            module.__dict__["_record"] = its_record
