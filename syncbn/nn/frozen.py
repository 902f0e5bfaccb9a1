"""Freezing and unfreezing of parameters: shared by the frozen affine parameters of layers and frozen weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# Attribute of a frozen module: requires_grad before freezing, by parameter name. Absent if the module is not frozen.
_MEMORY = "_thawed_requires_grad"
_num_changes = 0


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

    Args:
        root: the model. If given, a parameter that is tied to an already frozen one records the `requires_grad` that
            the frozen one had before.
    """
    global _num_changes
    free = [module for module in modules if not has_frozen_parameters(module)]
    remembered = {
        id(parameter): getattr(held, _MEMORY).get(name, parameter.requires_grad)
        for held in (root.modules() if root is not None else ())
        if has_frozen_parameters(held)
        for name, parameter in own_parameters(held).items()
    }
    # Record all before freezing any: of two tied parameters, the second must not record that the first is frozen.
    for module in free:
        before = {name: remembered.get(id(p), p.requires_grad) for name, p in own_parameters(module).items()}
        setattr(module, _MEMORY, before)
    for module in free:
        _num_changes += 1
        for parameter in own_parameters(module).values():
            parameter.requires_grad_(False)
            parameter.grad = None


def unfreeze_parameters(modules: Iterable[nn.Module], root: nn.Module | None = None) -> None:
    """Restores `requires_grad` from before `freeze_parameters`, except for parameters tied to frozen ones in `root`."""
    global _num_changes
    for module in modules:
        if not has_frozen_parameters(module):
            continue
        _num_changes += 1
        before = getattr(module, _MEMORY)
        delattr(module, _MEMORY)
        for name, parameter in own_parameters(module).items():
            parameter.requires_grad_(before.get(name, parameter.requires_grad))
    for held in root.modules() if root is not None else ():
        if has_frozen_parameters(held):
            for parameter in own_parameters(held).values():
                parameter.requires_grad_(False)
