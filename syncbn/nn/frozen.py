"""Freezing and unfreezing of parameters: shared by the frozen affine parameters of layers and frozen weights.

`requires_grad` from before is remembered by the parameter itself, not only by its name: pruning, parametrizations,
`weight_norm` and their removal rename or replace parameters while they are frozen.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Attribute of a frozen module: the `_Before` of its parameters. Absent if the module is not frozen.
_MEMORY = "_thawed_requires_grad"
# Names that torch.nn.utils gives to the parameters behind a tensor: those of parametrizations, and the suffixes of
# pruning and spectral_norm (_orig) and of weight_norm (_g, _v).
_DERIVED = re.compile(r"parametrizations\.(?P<parametrized>.+)\.original\d*|(?P<renamed>.+)_(?:orig|g|v)")
_num_changes = 0


class _Before:
    """`requires_grad` of a module's parameters before they were frozen.

    It holds weak references, so that no parameter is kept alive. A copy or an unpickled one refers to the parameters of
    the copied module.
    """

    def __init__(self, entries: Iterable[tuple[str, bool, nn.Parameter | None]]) -> None:
        self._entries = [(name, needed, _reference_to(parameter)) for name, needed, parameter in entries]

    def of(self, name: str, parameter: nn.Parameter) -> bool | None:
        """Whether a parameter that the module has now needs a gradient; None if it stands for none that it had then."""
        for _, needed, reference in self._entries:
            if reference is not None and reference() is parameter:
                return needed
        for name_then, needed, _ in self._entries:
            if name_then == name:
                return needed or parameter.requires_grad
        same_tensor = [needed for name_then, needed, _ in self._entries if _tensor_of(name_then) == _tensor_of(name)]
        return any(same_tensor) or parameter.requires_grad if same_tensor else None

    def elsewhere(self, here: Iterable[nn.Parameter]) -> Iterator[tuple[str, bool, nn.Parameter]]:
        """The remembered parameters that still exist, but are none of the module's present ones."""
        present = {id(parameter) for parameter in here}
        for name, needed, parameter in self._parameters():
            if parameter is not None and id(parameter) not in present:
                yield name, needed, parameter

    def tensors(self) -> set[str]:
        """Names of the tensors behind which some parameter needed a gradient."""
        return {_tensor_of(name) for name, needed, _ in self._entries if needed}

    def _parameters(self) -> Iterator[tuple[str, bool, nn.Parameter | None]]:
        for name, needed, reference in self._entries:
            yield name, needed, None if reference is None else reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Before:
        return _Before((name, needed, copy.deepcopy(parameter, memo)) for name, needed, parameter in self._parameters())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Before, (list(self._parameters()),)


def _reference_to(parameter: nn.Parameter | None) -> weakref.ref[nn.Parameter] | None:
    """None where torch may swap the contents of two tensors, which it refuses for those with weak references.

    It does for subclasses such as DTensor, and for all with `torch.__future__.set_swap_module_params_on_conversion`.
    """
    if type(parameter) is not nn.Parameter or torch.__future__.get_swap_module_params_on_conversion():
        return None
    return weakref.ref(parameter)


def _tensor_of(name: str) -> str:
    """The name of the tensor that a parameter stands for: "weight" for "parametrizations.weight.original0"."""
    found = _DERIVED.fullmatch(name)
    return name if found is None else found["parametrized"] or found["renamed"]


def num_changes() -> int:
    """Number of times a module was frozen or unfrozen in this process; callers compare it to detect changes."""
    return _num_changes


def has_frozen_parameters(module: nn.Module) -> bool:
    """Whether the module's own parameters are frozen by `freeze_parameters`."""
    return getattr(module, _MEMORY, None) is not None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters, not its children's; includes the originals of parametrizations (weight_norm, ...)."""
    parameters = dict(module.named_parameters(recurse=False))
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None:
        parameters |= {f"parametrizations.{name}": p for name, p in parametrizations.named_parameters()}
    return parameters


def freeze_parameters(modules: Iterable[nn.Module], root: nn.Module | None = None) -> None:
    """Sets `requires_grad=False` and `grad=None` on the modules' own parameters; idempotent.

    torch's optimizers skip a parameter without a gradient (`grad is None`) altogether, weight decay and momentum too.
    On a module that is frozen already, it freezes what has been added, or set free by hand, since.

    Args:
        root: the model. If given, a parameter that is tied to an already frozen one records the `requires_grad` that
            the frozen one had before.
    """
    global _num_changes
    modules = list(modules)
    remembered: dict[int, bool] = {}
    for holder in {id(one): one for one in (*modules, *(root.modules() if root is not None else ()))}.values():
        if has_frozen_parameters(holder):
            for name, parameter in own_parameters(holder).items():
                needed = _before(holder).of(name, parameter)
                if needed is not None:
                    remembered.setdefault(id(parameter), needed)
    # Record all before freezing any: of two tied parameters, the second must not record that the first is frozen.
    for module in modules:
        here = own_parameters(module)
        if has_frozen_parameters(module) and not any(parameter.requires_grad for parameter in here.values()):
            continue
        gone = _before(module).elsewhere(here.values()) if has_frozen_parameters(module) else ()
        entries = [(name, remembered.get(id(p), p.requires_grad), p) for name, p in here.items()]
        setattr(module, _MEMORY, _Before([*entries, *gone]))
        _num_changes += 1
    for module in modules:
        for parameter in own_parameters(module).values():
            parameter.requires_grad_(False)
            parameter.grad = None


def unfreeze_parameters(modules: Iterable[nn.Module], root: nn.Module | None = None) -> None:
    """Restores `requires_grad` from before `freeze_parameters`, except for parameters tied to frozen ones in `root`.

    A parameter that has been renamed or moved to another module since comes back too, and one that has replaced those
    behind the same tensor (`weight_norm`) needs a gradient if any of them did. A tensor that the removal of a
    parametrization has left as a buffer, because it needed no gradient, becomes a parameter again.

    Warns:
        UserWarning: parameters that need no gradient, and were not there when the module was frozen.
    """
    global _num_changes
    unknown = []
    thawed: set[int] = set()
    for module in modules:
        if not has_frozen_parameters(module):
            continue
        _num_changes += 1
        before = _before(module)
        delattr(module, _MEMORY)
        _make_parameters_of_buffers(module, before)
        here = own_parameters(module)
        for name, parameter in here.items():
            needed = before.of(name, parameter)
            if needed is not None:
                parameter.requires_grad_(needed)
                thawed.add(id(parameter))
            elif not parameter.requires_grad:
                unknown.append(f"{_name_in(root, module)}.{name}")
        for _, needed, parameter in before.elsewhere(here.values()):
            if needed:
                parameter.requires_grad_(True)
                thawed.add(id(parameter))
    for holder in root.modules() if root is not None else ():
        if has_frozen_parameters(holder):
            for parameter in own_parameters(holder).values():
                if id(parameter) in thawed:
                    parameter.requires_grad_(False)
    if unknown:
        warnings.warn(
            f"unfreeze: {', '.join(unknown)} needs no gradient (requires_grad=False), and was not there at freeze: if"
            " it is to be trained, call requires_grad_(True) on it",
            stacklevel=3,
        )


def _before(module: nn.Module) -> _Before:
    before = getattr(module, _MEMORY)
    if isinstance(before, dict):  # a module pickled by version 0.1.0: requires_grad by name
        here = own_parameters(module)
        before = _Before((name, needed, here.get(name)) for name, needed in before.items())
        setattr(module, _MEMORY, before)
    assert isinstance(before, _Before)
    return before


def _make_parameters_of_buffers(module: nn.Module, before: _Before) -> None:
    """Undoes what `remove_parametrizations` does to a frozen tensor with several originals: it becomes a buffer."""
    taken = {_tensor_of(name) for name in own_parameters(module)}
    for name in sorted(before.tensors() - taken):
        buffer = module._buffers.get(name)
        if isinstance(buffer, Tensor) and buffer.is_floating_point():
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer))


def _name_in(root: nn.Module | None, module: nn.Module) -> str:
    names = (name for name, one in root.named_modules() if one is module) if root is not None else ()
    return next((name for name in names if name), type(module).__name__)
