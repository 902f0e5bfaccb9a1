"""Holding parameters still and letting them go again: what frozen affine and frozen weights have in common."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_MEMORY = "_thawed_requires_grad"  # on the module: requires_grad as it was, by parameter name; absent while free
_num_changes = 0


def num_changes() -> int:
    """How often anything has been held or released in this process: lets others notice that they should look again."""
    return _num_changes


def has_frozen_parameters(module: nn.Module) -> bool:
    """Whether the module's own parameters are held."""
    return getattr(module, _MEMORY, None) is not None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters, not its children's; of a parametrized one (weight_norm, ...) the originals."""
    parameters = dict(module.named_parameters(recurse=False))
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None:
        parameters |= {f"parametrizations.{name}": p for name, p in parametrizations.named_parameters()}
    return parameters


def freeze_parameters(modules: Iterable[nn.Module], root: nn.Module | None = None) -> None:
    """Takes the gradient, present and future, from the modules' own parameters; idempotent.

    Without a gradient (`grad is None`) torch's optimizers skip a parameter altogether: weight decay and momentum too.

    Args:
        root: the model, in which a parameter may be tied to one that is held already: its memory is then shared.
    """
    global _num_changes
    free = [module for module in modules if not has_frozen_parameters(module)]
    remembered = {
        id(parameter): getattr(held, _MEMORY).get(name, parameter.requires_grad)
        for held in (root.modules() if root is not None else ())
        if has_frozen_parameters(held)
        for name, parameter in own_parameters(held).items()
    }
    # All memories first: of two tied parameters, the second must not remember that the first was frozen.
    for module in free:
        before = {name: remembered.get(id(p), p.requires_grad) for name, p in own_parameters(module).items()}
        setattr(module, _MEMORY, before)
    for module in free:
        _num_changes += 1
        for parameter in own_parameters(module).values():
            parameter.requires_grad_(False)
            parameter.grad = None


def unfreeze_parameters(modules: Iterable[nn.Module], root: nn.Module | None = None) -> None:
    """Gives `requires_grad` back as it was before `freeze_parameters`, but for what is frozen elsewhere in `root`."""
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
