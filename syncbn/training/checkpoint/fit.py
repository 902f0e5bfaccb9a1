"""Whether the state of a checkpoint fits the object that it is loaded into, where that object does not look itself.

torch checks the names and shapes of a model, but drops imaginary parts; of an optimizer and a schedule it takes over
whatever the state has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# State of torch's optimizers that has the shape of its parameter; of any other (a step, factors of a matrix) nothing is
# said, and nothing of optimizers from elsewhere.
_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def fitted(part: Any, content: Any) -> Any:
    """The state to load into the part, out of the state in a checkpoint.

    Raises:
        ValueError: it does not fit; the message says what.
    """
    if isinstance(part, Optimizer):
        return _fitted_to_optimizer(part, content)
    if isinstance(part, LRScheduler):
        return _fitted_to_schedule(part, content)
    _require_same_kinds(content, part.state_dict())
    return content


def of_same_form(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two state dicts of a model have the same names, and tensors of the same shapes."""
    return state.keys() == other.keys() and all(_shape(value) == _shape(other[name]) for name, value in state.items())


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _require_same_kinds(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        stored = state.get(name)
        if isinstance(value, Tensor) and isinstance(stored, Tensor) and stored.is_complex() and not value.is_complex():
            raise ValueError(f"{name} is complex in it, and real here")


def _fitted_to_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Numbers such as the learning rate are those of the state; how the optimizer computes is its own."""
    own, stored = optimizer.state_dict()["param_groups"], state["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in stored]:
        raise ValueError("its optimizer has other groups of parameters")
    groups = [_fitted_group(*pair) for pair in zip(own, stored, strict=True)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in stored for number in group["params"]]
    if len(set(numbers)) < len(numbers) or not state["state"].keys() <= set(numbers):
        raise ValueError("its optimizer has the state of parameters that it does not list, or lists one twice")
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    for number, parameter in zip(numbers, parameters, strict=True) if of_torch else ():
        for name, value in state["state"].get(number, {}).items():
            if name in _LIKE_PARAMETER and value is not None and not _is_like(value, parameter):
                raise ValueError(f"the {name} of parameter {number} in its optimizer is no tensor like the parameter")
    return {"state": state["state"], "param_groups": groups}


def _is_like(value: Any, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.is_complex() == parameter.is_complex()
        and value.is_floating_point() == parameter.is_floating_point()
    )


def _fitted_group(own: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    group = {**own, "params": stored["params"]}
    for name, value in own.items():
        if name == "params" or not _is_number(value):
            continue
        if not _is_number(stored.get(name)):
            raise ValueError(f"its optimizer has no number for {name}")
        group[name] = stored[name]
    return group


def _fitted_to_schedule(schedule: LRScheduler, state: dict[str, Any]) -> dict[str, Any]:
    """Its entries alone: torch would set any other as an attribute, also in place of a method."""
    own = schedule.state_dict()
    for name in ("base_lrs", "lr_lambdas"):
        if len(state[name]) != len(own[name]):
            raise ValueError(f"its schedule has {len(state[name])} {name}, expected {len(own[name])}")
    return {name: state[name] for name in own if name in state}


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and value.numel() == 1
    )
