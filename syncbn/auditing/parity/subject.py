"""What is compared, as a rank has it: builds the model again and again, always from the same start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.auditing.parity.batches import in_dtype, num_samples, rows
from syncbn.auditing.parity.errors import ParityError
from syncbn.auditing.parity.normalization import replace_torch_sync_bn
from syncbn.auditing.parity.recorder import Place, first_names, seed_everything
from syncbn.stats.calls import has_lazy_layers


@dataclass(frozen=True)
class Facts:
    """What one process on the whole batch has told about the model."""

    dtype: torch.dtype
    """float64, or float32 for a model that cannot compute in float64."""
    refusal: str | None
    """Why it cannot."""
    dims: dict[Place, int]
    """The dimension of the samples, of tensors that enter and leave modules; others have none."""
    has_count: bool
    """Whether the loss returns a sum and a count."""
    order: list[str]
    """The modules in the order in which they finish."""
    layers: frozenset[str] = frozenset()
    """Modules that are batch normalization layers, of any class."""
    draws: dict[str, set[str]] = field(default_factory=dict)
    """Modules that draw random numbers, with the generators that they use."""
    empty_shard: tuple[str, str] | None = None
    """The module and the error, where the model cannot take zero samples."""


class Subject:
    """Model, loss and batch of the user.

    Args:
        directory: shared by all ranks; holds the weights that everybody starts from.
        shows: told what runs, for the report of a hang.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: Callable[..., Any],
        batch: tuple[Any, Any],
        directory: Path,
        shows: Callable[[str], None],
    ) -> None:
        self.build, self.loss, self.directory, self.shows = build, loss, directory, shows
        self.inputs, self.targets = batch
        self.num = num_samples(self.inputs)

    def shard(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Any, Any]:
        """Inputs and targets of some samples, in a dtype."""
        cut = (rows(self.inputs, self.num, start, stop), rows(self.targets, self.num, start, stop))
        inputs, targets = in_dtype(cut, dtype)
        return inputs, targets

    def fresh(self, dtype: torch.dtype) -> nn.Module:
        """A new model with the weights that all ranks start from, on the CPU.

        Raises:
            ParityError: `build` returns no module in training mode that is complete, or another one every time.
        """
        self.shows("build")
        seed_everything(0)
        model = self.build()
        if not isinstance(model, nn.Module):
            raise ParityError(f"build: expected to get an nn.Module, got {type(model).__name__}")
        if not model.training:
            raise ParityError("build: the model is in evaluation mode, and parity compares training; leave out eval()")
        if has_lazy_layers(model):
            raise ParityError("build: the model has lazy layers that have not seen their width; run it once in build")
        model = replace_torch_sync_bn(model).to("cpu", dtype)
        if "torch._dynamo" in sys.modules:  # eager, so that hooks run
            torch.compiler.set_stance("force_eager")
        self._start(model)
        return model

    def _start(self, model: nn.Module) -> None:
        """Copies the initial weights and buffers into the model; those of the first model ever are the initial ones."""
        path = self.directory / "initial.pt"
        state = {f"{kind} {name}": tensor.detach() for kind, name, tensor in state_of(model)}
        if not path.exists():
            torch.save(state, path)
            return
        initial = torch.load(path, weights_only=True)
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in initial.items()}:
            raise ParityError("build: the models of two calls have different parameters; seed what it draws")
        with torch.no_grad():
            for key, value in state.items():
                value.copy_(initial[key])


def state_of(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Parameters and buffers, each once and by module: ("parameter" or "buffer", dotted name, tensor)."""
    found: list[tuple[str, str, Tensor]] = []
    known: set[int] = set()
    for prefix, module in first_names(model).items():
        own: list[tuple[str, str, Tensor]] = []
        own += [("parameter", name, tensor) for name, tensor in module.named_parameters(recurse=False)]
        own += [("buffer", name, tensor) for name, tensor in module.named_buffers(recurse=False)]
        for kind, name, tensor in own:
            if id(tensor) not in known:
                known.add(id(tensor))
                found.append((kind, f"{prefix}.{name}" if prefix else name, tensor))
    return found


def owner_of(name: str) -> str:
    """The module of a parameter or buffer."""
    return name.rpartition(".")[0]
