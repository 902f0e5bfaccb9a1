"""Tries an optimizer on small copies of parameters: does it work, and can it leave a step out on the device?

Flags do not tell. torch's NAdam takes `found_inf` and does not look at it, and its Adam does so only with `fused=True`,
which not every device and type has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.torch_compat import takes_grad_scale
from syncbn.training.config.errors import ConfigError, one_line
from syncbn.training.optim.groups import ParameterGroup

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer over parameter groups."""

_LOSS_SCALE = 4.0  # a power of two, which changes no bit


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zero-initializes the momentum of SGD for parameters that have a gradient and no momentum yet.

    torch's fused SGD would leave momentum uninitialized if the first step is skipped, and does not accept a parameter
    that joins later. Starting from zeros gives the same sums. Other optimizers initialize their state themselves, and
    only where there is none: a momentum that they find would keep RMSprop from making the rest.
    """
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def require_steps(make: Make, groups: Sequence[ParameterGroup], name: str) -> None:
    """Takes some steps as the trainer does.

    Args:
        name: what errors begin with.

    Raises:
        ConfigError: the optimizer needs a closure, cannot step with dense gradients, moves parameters without a
            gradient, or has a state that a checkpoint cannot hold.
    """
    probe = _Probe(make, groups)
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in _arguments_of_step(probe)):
        raise ConfigError(f"{name}: its step needs a closure, to run the model again within a step, which train.py"
                          " does not do; choose another optimizer")  # fmt: skip
    try:
        probe.run(1, 2)
    except Exception as error:
        raise ConfigError(f"{name}: cannot take a step: {one_line(error)}") from None
    if not probe.is_idle_unchanged():
        raise ConfigError(f"{name}: moves parameters without a gradient, so that nothing can be frozen; choose another")
    if (content := _why_not_storable(probe.optimizer.state_dict())) is not None:
        raise ConfigError(f"{name}: a checkpoint cannot hold its state, which has {content}; choose another")


def skips_on_device(make: Make, groups: Sequence[ParameterGroup], *, scaled: bool) -> bool:
    """Whether the optimizer leaves a step out, without a trace, where `found_inf` is 1, and takes it where it is 0.

    Args:
        scaled: gradients are scaled, as with float16: it has to take `grad_scale` too.
    """
    try:
        taken, left_out = _Probe(make, groups), _Probe(make, groups, found_inf=True, scaled=scaled)
        if scaled and not takes_grad_scale(left_out.optimizer):
            return False  # torch's GradScaler asks this flag which way to go
        left_out.run(0)
        if not left_out.is_at_start():
            return False
        for number in (1, 0, 2):
            left_out.run(number)
        taken.run(1, 2)
        if not left_out.equals(taken):
            return False
        left_out.join()
        left_out.run(3)
        return all(parameter.isfinite().all() for parameter in left_out.parameters)
    except Exception:  # of the optimizer: it does not know what it is given
        return False


class _Probe:
    """An optimizer over copies of some parameters: of each group the smallest of each dimension and type.

    One more has no gradient, as a frozen one.

    Args:
        found_inf: steps are taken with `found_inf`.
        scaled: and with a loss scale.
    """

    def __init__(
        self, make: Make, groups: Sequence[ParameterGroup], *, found_inf: bool = False, scaled: bool = False
    ) -> None:
        self._found_inf, self._scaled = found_inf, scaled
        nodes = [_node(group, [_copy(one) for one in _samples(group)]) for group in groups]
        self.parameters: list[nn.Parameter] = [parameter for node in nodes for parameter in node["params"]]
        self._idle = _copy(self.parameters[0])
        nodes[0]["params"].append(self._idle)
        self._start = [parameter.detach().clone() for parameter in (*self.parameters, self._idle)]
        self.optimizer = make(nodes)

    def run(self, *steps: int) -> None:
        """Takes steps; in step 0 gradients are NaN, and with `found_inf` it is left out."""
        for step in steps:
            scale = _LOSS_SCALE if self._scaled else 1.0
            for number, parameter in enumerate(self.parameters):
                gradient = torch.full_like(parameter, torch.nan) if step == 0 else _values(parameter, step + number)
                parameter.grad = gradient * scale
            if self._found_inf:
                zero_momentum(self.optimizer)
                self.optimizer.found_inf = self._scalar(float(step == 0))  # type: ignore[attr-defined]
                if self._scaled:
                    self.optimizer.grad_scale = self._scalar(scale)  # type: ignore[attr-defined]
            self._seed(step)  # of what it draws
            self.optimizer.step()

    def join(self) -> None:
        """The parameter without a gradient has one from now on."""
        self.parameters.append(self._idle)

    def is_at_start(self) -> bool:
        return all(map(torch.equal, (*self.parameters, self._idle), self._start))

    def is_idle_unchanged(self) -> bool:
        return torch.equal(self._idle, self._start[-1])

    def equals(self, other: _Probe) -> bool:
        return all(map(torch.equal, self.parameters, other.parameters)) and _is_same(
            self.optimizer.state_dict(), other.optimizer.state_dict()
        )

    def _seed(self, seed: int) -> None:
        """Seeds as `torch.manual_seed`, which takes far longer; the caller has forked the generators."""
        torch.default_generator.manual_seed(seed)
        if self._idle.is_cuda:
            torch.cuda.manual_seed(seed)

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self._idle.device)


def node_of(group: ParameterGroup) -> dict[str, Any]:
    """The group as torch's optimizers take it, without a learning rate of its own."""
    return _node(group, [*group.parameters.values()])


def _node(group: ParameterGroup, parameters: list[nn.Parameter]) -> dict[str, Any]:
    return {"params": parameters} | ({} if group.weight_decay is None else {"weight_decay": group.weight_decay})


def _samples(group: ParameterGroup) -> list[nn.Parameter]:
    smallest: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for parameter in group.parameters.values():
        kind = (parameter.dim(), parameter.dtype)
        if kind not in smallest or parameter.numel() < smallest[kind].numel():
            smallest[kind] = parameter
    return [*smallest.values()]


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same form with values of its own."""
    return nn.Parameter(_values(parameter, 1))


def _values(like: Tensor, number: int) -> Tensor:
    """Numbers between -1 and 1, without a draw."""
    numbers = torch.arange(like.numel(), dtype=torch.float64).add_(1).mul_(number).cos_()
    return torch.empty_like(like, requires_grad=False).copy_(numbers.view(like.shape))


def _arguments_of_step(probe: _Probe) -> list[inspect.Parameter]:
    try:
        return [*inspect.signature(probe.optimizer.step).parameters.values()]
    except (TypeError, ValueError):
        return []


def _is_same(one: Any, other: Any) -> bool:
    """Whether two nested states have the same values, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(type(one) is type(other) and one == other)


def _why_not_storable(state: dict[str, Any]) -> str | None:
    """What in the state dict of an optimizer a checkpoint cannot hold, in words; None if nothing."""
    if others := [key for key in state["state"] if not isinstance(key, int)]:
        return f"an entry {others[0]!r} that belongs to no parameter"
    pending: list[Any] = [state]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, Tensor):
            if value.layout is not torch.strided:
                return "a sparse tensor"
        elif not (value is None or isinstance(value, bool | int | float | str)):
            return f"a {type(value).__name__}"
    return None
