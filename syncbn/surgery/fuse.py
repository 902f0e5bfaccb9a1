"""Fusing a model's batch normalization with the addition and the activation that follow it, in place.

In an `nn.Sequential` the activation is replaced by an `nn.Identity`. Any other module that calls the layer is traced by
`torch.fx`, with its children as leaves, and gets a generated class: a subclass of its original class, whose `forward`
is the traced one without the addition and the activation, which the layer performs. Nothing is copied and no name
changes: parameters, buffers, state dict keys, hooks and an existing optimizer stay valid.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from syncbn.nn import lean
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.injected import own_class, rebuilt
from syncbn.nn.patterns import Patterns, named_modules, select
from syncbn.nn.subclasses import SyncSubclass
from syncbn.surgery.fusion_classes import fused_class
from syncbn.surgery.fusion_own import fuse_own_activation, has_own_forward
from syncbn.surgery.fusion_sites import HOOKS, Site, is_changed_in_place, rewrite, site_of, target_of
from syncbn.surgery.fusion_tracing import traced
from syncbn.surgery.unfuse import set_activation


@dataclass(frozen=True)
class FusionOutcome:
    """Outcome of `fuse` for one layer."""

    name: str
    activation: str | None
    """Name of the activation fused into the layer; None if the layer was left unchanged."""
    residual: bool
    """Whether the addition of a residual was fused too."""
    reason: str
    """Why the layer was left unchanged; "" for a layer that was fused."""
    memory: str = "default"
    """The memory setting of a fused layer: "default" or "lean" (see `SyncBatchNorm`)."""
    memory_reason: str = ""
    """Why a fused layer saves its input for backward although "lean" was requested; "" otherwise."""


_Outcome = tuple[Any, ...]  # the fields of a FusionOutcome that follow `name`


def fuse(
    module: nn.Module, *, match: Patterns = "*", exclude: Patterns | None = (), memory: str = "default"
) -> list[FusionOutcome]:
    """Fuses every selected `SyncBatchNorm` of `module` with the activation that follows it, in place.

    An addition between the two (a residual connection) is fused as well: the layer then normalizes, adds and activates
    in one pass over the data. Fusible activations are ReLU, leaky ReLU (slope 0.01) and SiLU, as modules or as
    functions, in an `nn.Sequential` and in every other module whose `forward` can be traced by `torch.fx` and does the
    same in training and evaluation. The results do not change. Everything else is left unchanged and reported with the
    reason: layers of another class (convert them first), layers that are used several times or whose output is, and
    layers or activations with hooks, which would be called with other tensors. A layer of a converted subclass that
    applies an activation in a forward of its own (timm's `BatchNormAct2d`) is fused with that one, if its forward does
    nothing else.

    A residual of another shape, which would have to broadcast, raises at the first forward of the layer: exclude such a
    layer. Code outside of the traced `forward` that calls a fused layer gets the activation too. Every rank has to fuse
    the same layers. `revert_sync_batchnorm` undoes the fusion; it has to come before functions that fold the layer into
    a convolution, which raise.

    Args:
        module: any model, wrapped in DDP or not.
        match: patterns of the layers: shell globs over dotted names; a plain name also selects all layers below it.
        exclude: patterns of the layers to leave unchanged.
        memory: "lean" also sets `memory="lean"` (see `SyncBatchNorm`) on the fused layers that support it: those with a
            leaky ReLU and without an addition. The others save their input for backward as before, and
            `memory_reason` says why.

    Returns:
        An outcome for each selected batch normalization layer, of this package's class or another.

    Raises:
        ValueError: a pattern that selects nothing; an unknown value of `memory`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), SyncBatchNorm(8), nn.ReLU())
        >>> fuse(model)[0].activation
        'relu'
    """
    if memory not in ("default", "lean"):
        raise ValueError(f"memory: expected default or lean, got {memory!r}")
    layers = {
        name: layer
        for name, layer in select(module, match, exclude).items()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }
    modules = [child for _, child in named_modules(module)]
    parents = [child for child in {id(child): child for child in modules}.values() if _has_layers(child)]
    graphs = [traced(parent) for parent in parents]
    targets = [
        id(target_of(parent, node))
        for parent, graph in zip(parents, graphs, strict=True)
        for node in (graph.nodes if isinstance(graph, fx.Graph) else ())
    ]
    places, calls = Counter(map(id, modules)), Counter(targets)
    found: dict[int, _Outcome] = {}
    for layer in layers.values():
        reason = _why_not(layer, max(places[id(layer)], calls[id(layer)]))
        if reason is not None:
            found[id(layer)] = None, False, reason
        elif isinstance(layer, SyncSubclass) and has_own_forward(layer):
            found[id(layer)] = _fuse_own(layer, parents, graphs, memory)
    wanted = {id(layer) for layer in layers.values()} - found.keys()
    for parent, graph in zip(parents, graphs, strict=True):
        if isinstance(graph, fx.Graph):
            found |= _fuse_in(parent, graph, wanted, memory)
        elif graph is not None:
            found |= {id(child): (None, False, graph) for child in parent.children() if id(child) in wanted}
    default = (None, False, "no module was found that calls it")
    return [FusionOutcome(name, *found.get(id(layer), default)) for name, layer in layers.items()]


def _why_not(layer: nn.Module, num_uses: int) -> str | None:
    """Why a layer cannot be fused, whatever follows it; None if the layer itself does not prevent fusion."""
    if not isinstance(layer, SyncBatchNorm):
        return f"is a {type(layer).__name__}; convert_sync_batchnorm comes first"
    if type(layer).forward not in (SyncBatchNorm.forward, SyncSubclass.forward):
        return f"is a {type(layer).__name__}, which has a forward of its own"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if layer._activation_name() is not None:
        return f"has an activation already: {layer._activation_name()}"
    if has_own_forward(layer):
        return None
    if num_uses > 1:
        return "is used in several places"
    if any(getattr(layer, hooks) for hooks in HOOKS):
        return "has hooks, which would see the activation's output"
    return None


def _fuse_own(
    layer: SyncSubclass, parents: list[nn.Module], graphs: list[fx.Graph | str | None], memory: str
) -> _Outcome:
    """Fuses a layer with the activation that it applies itself; the outcome."""
    calls = [
        is_changed_in_place(parent, node)
        for parent, graph in zip(parents, graphs, strict=True)
        for node in (graph.nodes if isinstance(graph, fx.Graph) else ())
        if target_of(parent, node) is layer
    ]
    try:
        kind = fuse_own_activation(layer, is_changed_in_place=not calls or any(calls))
    except ValueError as reason:
        return None, False, str(reason)
    return kind, False, "", "default", "it has a forward of its own" if memory == "lean" else ""


def _has_layers(parent: nn.Module) -> bool:
    """Whether a module contains a `SyncBatchNorm` that its forward may call."""
    return any(isinstance(child, SyncBatchNorm) for child in parent.modules() if child is not parent)


def _fuse_in(parent: nn.Module, graph: fx.Graph, wanted: set[int], memory: str) -> dict[int, _Outcome]:
    """Fuses those of the `wanted` layers that `parent` calls; returns outcomes by the id of the layer."""
    found: dict[int, _Outcome] = {}
    sites: list[Site] = []
    for node in list(graph.nodes):
        layer = target_of(parent, node)
        if layer is None or id(layer) not in wanted:
            continue
        if "." in str(node.target):
            found[id(layer)] = None, False, "is called by another module than the one that it is part of"
            continue
        site = site_of(parent, node, [other.layer for other in sites])
        if isinstance(site, str):
            found[id(layer)] = None, False, site
            continue
        assert isinstance(layer, SyncBatchNorm)
        found[id(layer)] = _outcome(layer, site, memory)
        if found[id(layer)][0] is not None:
            sites.append(site)
    if not sites:
        return found
    is_sequential = type(parent).forward is nn.Sequential.forward
    activations, before = {}, {}
    for site in sites:
        layer = target_of(parent, site.layer)
        assert isinstance(layer, SyncBatchNorm)
        before[str(site.layer.target)] = layer.__dict__.get("memory", "default")
        if is_sequential:
            activations[str(site.activation.target)] = target_of(parent, site.activation)
        else:
            rewrite(graph, site)
    if not is_sequential:
        code = graph.python_code("self")
        used = {name: value for name, value in code.globals.items() if name in code.src}
        cls = type(parent)
        parent.__class__ = rebuilt(cls, fused_class(own_class(cls), code.src, used))
    for site in sites:  # after all that can fail
        layer = target_of(parent, site.layer)
        assert isinstance(layer, SyncBatchNorm)
        set_activation(layer, site.kind, found[id(layer)][3])
    parent.__dict__["_fused_layers"] = parent.__dict__.get("_fused_layers", {}) | before
    if activations:
        for name in activations:
            parent._modules[name] = nn.Identity()
        parent.__dict__["_fused_activations"] = parent.__dict__.get("_fused_activations", {}) | activations
    return found


def _outcome(layer: SyncBatchNorm, site: Site, memory: str) -> _Outcome:
    """The outcome that fusing a layer at this site will have; changes nothing."""
    wanted = memory == "lean" or layer._is_lean()
    reason = _why_not_lean(layer, site) if wanted else ""
    if memory == "lean" and isinstance(layer, SyncSubclass):
        return site.kind, site.residual is not None, "", "default", f"it is a {type(layer).__name__}"
    if reason and layer._is_lean():
        return None, False, f"is lean, and {reason}"
    return site.kind, site.residual is not None, "", "lean" if wanted and not reason else "default", reason


def _why_not_lean(layer: SyncBatchNorm, site: Site) -> str:
    """Why the input of the fused layer could not be recovered from its output; "" if it could."""
    if site.residual is not None:
        return "its output does not tell what was added"
    if site.kind not in lean.INVERTIBLE_ACTIVATIONS:
        return f"its output does not tell what went into {site.kind}"
    found = lean.conditions(layer.weight, layer.bias, site.kind, torch.float32)
    if found is not None and not found.is_meta and bool(lean.are_too_many(found, torch.float32)):
        return "too many of its weights are 0, or small against the bias"
    return ""
