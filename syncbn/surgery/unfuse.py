"""Undoing `fuse`, in place."""

from __future__ import annotations

from torch import nn

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.injected import own_class, rebuilt
from syncbn.nn.patterns import named_modules, unwrapped
from syncbn.nn.subclasses import SyncSubclass
from syncbn.surgery.fusion_classes import Fused


def unfuse(module: nn.Module) -> None:
    """Undoes `fuse`, in place; `check_unfusable` has to come first."""
    for parent in module.modules():
        for layer, memory in _fused_in(parent):
            set_activation(layer, None, memory)
        parent.__dict__.pop("_fused_activation", None)  # of a subclass's own forward
        parent.__dict__.pop("_fused_layers", None)
        for name, activation in parent.__dict__.pop("_fused_activations", {}).items():
            parent._modules[name] = activation.train(parent.training)
        if isinstance(parent, Fused):
            cls = type(parent)
            parent.__class__ = rebuilt(cls, own_class(cls).__dict__["_original_class"])


def check_unfusable(module: nn.Module) -> None:
    """Raises an error where `unfuse` would lose what was done to a fused module after `fuse`; changes nothing.

    Raises:
        ValueError: a fused module whose class or forward was exchanged, or in which an activation that `fuse` has taken
            out would replace a module that was put in its place; the message names it.
    """
    for name, parent in named_modules(module):
        reason = _why_not(parent)
        if reason is not None:
            raise ValueError(f"{name or 'the module'} was changed after fuse: {reason}; undo that first")


def fused_layers(module: nn.Module) -> list[nn.Module]:
    """The layers that `fuse` has given an activation, which `unfuse` would remove."""
    called = [layer for parent in module.modules() for layer, _ in _fused_in(parent)]
    return [*called, *(layer for layer in module.modules() if "_fused_activation" in layer.__dict__)]


def set_activation(layer: SyncBatchNorm, kind: str | None, memory: str) -> None:
    """Sets a layer's activation and memory setting; subclasses may have attributes of these names, of their own."""
    if not isinstance(layer, SyncSubclass):
        layer.activation, layer.memory = kind, memory
    elif kind is None:
        layer.__dict__.pop("_fused_activation", None)
    else:
        layer.__dict__["_fused_activation"] = kind


def _fused_in(parent: nn.Module) -> list[tuple[SyncBatchNorm, str]]:
    """The layers that `fuse` has changed in a module, each with its memory setting from before."""
    found = []
    for name, memory in parent.__dict__.get("_fused_layers", {}).items():
        layer = parent
        for part in name.split("."):
            child = layer._modules.get(part)
            layer = nn.Identity() if child is None else unwrapped(child)
        if isinstance(layer, SyncBatchNorm):  # not one that was removed since
            found.append((layer, memory))
    return found


def _why_not(parent: nn.Module) -> str | None:
    if isinstance(parent, Fused):
        if "_original_class" not in vars(own_class(type(parent))):
            return f"its class is now {type(parent).__name__}"
        if "forward" in parent.__dict__:
            return "its forward was replaced on the instance"
    for name in parent.__dict__.get("_fused_activations", {}):
        child = parent._modules.get(name)
        if child is None or type(unwrapped(child)) is not nn.Identity:
            return f"{name} is no longer the Identity that took the place of its activation"
    return None
