"""Follows a model through its modules: which one runs, what goes in and comes out, and who draws random numbers."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.auditing.parity.batches import tensors
from syncbn.nn.patterns import named_modules

LOSS = "(loss)"  # in the place of a module name


@dataclass(frozen=True, order=True)
class Place:
    """A tensor of a training step: of which kind, and where in the network."""

    kind: str
    """"input" or "output" of a module, "loss", "gradient", "parameter", "buffer"."""
    name: str
    """Dotted name of the module, parameter or buffer."""
    call: int = 0
    leaf: int = 0


OnTensor = Callable[[Place, Tensor], None]


def first_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, by its first name."""
    names: dict[str, nn.Module] = {}
    known: set[int] = set()
    for name, module in named_modules(model):
        if id(module) not in known:
            known.add(id(module))
            names[name] = module
    return names


class Recorder:
    """Hooks of a model that call `seen` for the tensors that enter and leave its modules.

    Args:
        seen: called in the order of the calls, children before their parents; None to follow the modules only.
        shows: told the module that runs, for the report of a hang.
        watches_randomness: notes which modules draw random numbers in `draws`.
    """

    def __init__(
        self,
        model: nn.Module,
        seen: OnTensor | None = None,
        *,
        shows: Callable[[str], None] = lambda name: None,
        watches_randomness: bool = False,
    ) -> None:
        self.seen, self._shows = seen, shows
        self.records = True  # False in the backward pass, where checkpointing runs modules again
        self.stack: list[str] = []
        self.order: list[str] = []  # names of the modules as they finish, each once
        self.draws: dict[str, set[str]] = {}  # for each module that draws: "torch", "python", "numpy"
        self._calls: Counter[str] = Counter()
        self._states = _random_states() if watches_randomness else None
        for name, module in first_names(model).items():
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name))

    @property
    def where(self) -> str:
        """The module that runs; the empty name, of the model, between its calls."""
        return self.stack[-1] if self.stack else ""

    def begin_step(self) -> None:
        """Counts calls from 0 again."""
        self._calls.clear()
        self.stack.clear()
        self.records = True
        if self._states is not None:
            self._states = _random_states()

    def look(self, name: str) -> None:
        """Notes whether random numbers have been drawn since it looked last, by `name`."""
        if self._states is None:
            return
        states = _random_states()
        moved = {kind for kind, state in states.items() if state != self._states.get(kind)}
        if moved:
            self.draws.setdefault(name, set()).update(moved)
        self._states = states

    def _before(self, name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.look(self.where)
            self.stack.append(name)
            self._shows(name)
            if self.records and self.seen is not None:
                for leaf, tensor in enumerate(tensors((arguments, keywords))):
                    self.seen(Place("input", name, self._calls[name], leaf), tensor)

        return before

    def _after(self, name: str) -> Callable[..., None]:
        def after(_: nn.Module, __: Any, outputs: Any) -> None:
            self.look(name)
            while self.stack and self.stack.pop() != name:
                pass  # a module that was left by an exception
            if not self.records:
                return
            if name not in self.order:
                self.order.append(name)
            if self.seen is not None:
                for leaf, tensor in enumerate(tensors(outputs)):
                    self.seen(Place("output", name, self._calls[name], leaf), tensor)
            self._calls[name] += 1

        return after


def _random_states() -> dict[str, bytes | int]:
    """The states of the generators that a model may draw from, in a form that can be compared."""
    states: dict[str, bytes | int] = {
        "torch": torch.get_rng_state().numpy().tobytes() if "numpy" in sys.modules else hash(_torch_state()),
        "python": hash(random.getstate()),
    }
    if "numpy" in sys.modules:
        state: Any = sys.modules["numpy"].random.get_state()
        states["numpy"] = hash((state[1].tobytes(), *state[2:]))
    return states


def _torch_state() -> tuple[int, ...]:
    return tuple(torch.get_rng_state().view(torch.int64).tolist())


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
