"""One forward pass that records the inputs of a model's batch normalization layers and restores the model."""

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
class LayerInput:
    """Summary of the inputs of one layer in one forward pass of the model over the batch of all ranks."""

    moments: Moments
    """Moments of the inputs of all calls: of this rank until `_pool` has run, then of all ranks."""
    rows_here: float
    """Samples (size of dimension 0) per call on this rank."""
    rows: float
    """Samples per call over all ranks, once `_pool` has run."""
    num_calls: int
    dtype: torch.dtype
    max_abs: float
    """Largest absolute value on this rank."""
    dropout: float
    """Largest rate of the dropouts before the layer with no normalization between; 0 without any."""
    under_checkpoint: bool
    """Whether any call was made inside of `torch.utils.checkpoint`."""

    @property
    def mean(self) -> Tensor:
        """Mean per channel, (C,) float64."""
        return self.moments.mean

    @property
    def var(self) -> Tensor:
        """Variance per channel, (C,) float64, biased."""
        return self.moments.var

    @property
    def values_per_row(self) -> float:
        """Average number of values per channel in one sample."""
        total = self.rows * self.num_calls
        return float(self.moments.count) / total if total else 0.0

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite, on every rank."""
        return bool(self.mean.isfinite().all() and self.var.isfinite().all())


def probe(model: nn.Module, layers: dict[str, _BatchNorm], batch: Any) -> dict[str, LayerInput]:
    """Runs the model once in its present mode and records the inputs of its batch normalization layers.

    Gradients are enabled in training mode, but there is no backward pass. Buffers, modes and the state of torch's
    random number generators are restored afterwards; other tensors that a forward changes are not. In a distributed job
    every rank has to call it. Communication: the collectives of the forward pass, and one all-reduce.

    Args:
        layers: the layers to record, by name.
        batch: the model's input, or a tuple or list that begins with it.

    Returns:
        A summary for each of the layers, by name; layers that did not run are left out.

    Raises:
        ValueError: the model has lazy layers that are not initialized.
    """
    model = unwrapped(model)
    if has_lazy_layers(model):
        raise ValueError(
            "batch: the model has lazy layers that have not seen their width; run it once before the audit"
        )
    seen: dict[str, LayerInput] = {}
    trace = DropoutTrace()
    with ExitStack() as stack:
        stack.enter_context(_guarded(model))
        for name, layer in layers.items():
            stack.enter_context(_watched(name, layer, seen, trace))
        # Warnings of the model do not concern the audit (reentrant checkpointing warns of inputs without a gradient).
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.set_grad_enabled(model.training))
        if "torch._dynamo" in sys.modules:  # eager, so that hooks run; if absent, nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(trace)
        try:
            model(batch[0] if isinstance(batch, tuple | list) else batch)
        except ValueError:
            # A layer raises when it gets a single value per channel; the audit reports that as a finding instead.
            if not any(float(one.moments.count) == 1 for one in seen.values()):
                raise
    _pool(layers, seen)
    return {name: one for name, one in seen.items() if one.num_calls}


@contextmanager
def _watched(name: str, layer: _BatchNorm, seen: dict[str, LayerInput], trace: DropoutTrace) -> Iterator[None]:
    @torch.no_grad()
    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = input_of(arguments, keywords)
        if given is None or given.dim() < 2:
            return
        input, mask = counted(layer, arguments, keywords)
        moments, rows = Moments.of(input, mask), float(len(input))
        last = seen.get(name)
        seen[name] = LayerInput(
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


def _pool(layers: dict[str, _BatchNorm], seen: dict[str, LayerInput]) -> None:
    """Sums the moments and rows of all layers over all ranks, by one all-reduce for all layers together."""
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
    """Replaces all buffers by copies inside of the context, then restores buffers, modes and torch's random state."""
    modules = list(model.modules())
    buffers = {module: dict(module._buffers) for module in modules}
    copies: dict[int, Tensor] = {}
    for module in modules:
        for name, buffer in buffers[module].items():
            if buffer is not None:  # a shared buffer gets one shared copy
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    # A monitor that is watching must not record this forward pass.
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
