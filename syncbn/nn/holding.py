"""Holding parameters still and letting them go again: what frozen affine and frozen weights have in common."""

from torch import nn

_MEMORY = (
    "_thawed_requires_grad"  # on the module: requires_grad as it was, by parameter name; absent or None while free
)


_num_changes = 0


def num_changes() -> int:
    """How often anything has been held or released in this process: lets others notice that they should look again."""
    return _num_changes


def is_held(module: nn.Module) -> bool:
    """Whether the module's own parameters are held."""
    return getattr(module, _MEMORY, None) is not None


def hold(module: nn.Module) -> None:
    """Takes the gradient, present and future, from the module's own parameters (not its children's); idempotent.

    Without a gradient (`grad is None`) torch's optimizers skip a parameter altogether: weight decay and momentum too.
    """
    if is_held(module):
        return
    global _num_changes
    _num_changes += 1
    parameters = dict(module.named_parameters(recurse=False))
    setattr(module, _MEMORY, {name: parameter.requires_grad for name, parameter in parameters.items()})
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None


def release(module: nn.Module) -> None:
    """Gives `requires_grad` back as it was before `hold`."""
    if not is_held(module):
        return
    global _num_changes
    _num_changes += 1
    before = getattr(module, _MEMORY)
    for name, parameter in module.named_parameters(recurse=False):
        parameter.requires_grad_(before.get(name, parameter.requires_grad))
    delattr(module, _MEMORY)
