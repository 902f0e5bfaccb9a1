"""Fusion sites: the addition and the activation that follow a layer in the traced forward of its parent."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from syncbn.kernels.activations import LEAKY_SLOPE

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.leaky_relu: "leaky_relu", F.silu: "silu",
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")
HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Site:
    """Graph nodes of a layer, of the activation that follows it, and of an addition between them (None without one).

    `residual` is the other operand of the addition, `kind` the name of the activation as in `SyncBatchNorm`.
    """

    layer: fx.Node
    addition: fx.Node | None
    residual: fx.Node | None
    activation: fx.Node
    kind: str


def target_of(parent: nn.Module, node: fx.Node) -> nn.Module | None:
    return parent.get_submodule(node.target) if node.op == "call_module" and isinstance(node.target, str) else None


def is_changed_in_place(parent: nn.Module, node: fx.Node) -> bool:
    """Whether what a node computes is changed in place by one of its users."""
    return any(_changes_in_place(parent, user) for user in node.users)


def _changes_in_place(parent: nn.Module, node: fx.Node) -> bool:
    is_method = node.op == "call_method" and str(node.target).endswith("_")
    has_option = bool(node.kwargs.get("inplace") or getattr(target_of(parent, node), "inplace", False))
    return is_method or has_option or node.target in _IN_PLACE_ADDITIONS


def site_of(parent: nn.Module, node: fx.Node, taken: list[fx.Node]) -> Site | str:
    """The fusion site of a layer, or the reason why it cannot be fused with what follows it.

    Args:
        taken: the layers of the sites that were found before. Of two layers whose outputs are added, only one can
            perform the addition.
    """
    if len(node.args) != 1 or node.kwargs:
        return "is called with more than its input"
    if len(node.users) != 1:
        return "its output is used several times" if node.users else "its output is not used"
    user = next(iter(node.users))
    addition = residual = None
    if user.op in ("call_function", "call_method") and user.target in _ADDITIONS:
        addition = user
        if len(user.args) != 2 or user.kwargs or not all(isinstance(part, fx.Node) for part in user.args):
            return "what is added is not another activation"
        left, right = user.args
        other = right if left is node else left
        assert isinstance(other, fx.Node)
        residual = other
        if residual is node:
            return "is added to itself"
        if left is not node and user.target in _IN_PLACE_ADDITIONS:
            return "is added in place to something else"
        if residual in taken:
            return "what it is added to does the addition"
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return "its input is used elsewhere, too, which may change it before the addition"
        if len(addition.users) != 1:
            return "the sum is used several times" if addition.users else "the sum is not used"
        user = next(iter(addition.users))
    kind = _kind(parent, user)
    if kind is None:
        return "no activation that could be fused follows it"
    module = target_of(parent, user)
    if module is not None and has_hooks(module):
        return f"the activation {user.target} has hooks"
    if kind == "leaky_relu" and is_changed_in_place(parent, user):
        return "the activation's output is changed in place, which backward would go by"
    return Site(node, addition, residual, user, kind)


def kind_of(module: nn.Module) -> str | None:
    """Name of the activation that a module is, as in `SyncBatchNorm`; None if it is not a fusible activation."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    return "leaky_relu" if type(module) is nn.LeakyReLU and module.negative_slope == LEAKY_SLOPE else None


def has_hooks(activation: nn.Module) -> bool:
    return any(getattr(activation, hooks) for hooks in (*HOOKS, "_forward_pre_hooks"))


def _kind(parent: nn.Module, node: fx.Node) -> str | None:
    """Name of the activation that a node computes, as in `SyncBatchNorm`; None if it is not a fusible activation."""
    module = target_of(parent, node)
    if module is not None:
        return kind_of(module)
    kind = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    options = {**node.kwargs}
    options.pop("inplace", None)
    if kind == "leaky_relu" and options.pop("negative_slope", LEAKY_SLOPE) != LEAKY_SLOPE:
        return None
    return kind if len(node.args) <= 1 and not (options.keys() - {"input"}) else None


def rewrite(graph: fx.Graph, site: Site) -> None:
    """Replaces the nodes of a site by one call of the layer, at the position of the activation."""
    with graph.inserting_before(site.activation):
        options: dict[str, Any] = {} if site.residual is None else {"residual": site.residual}
        fused = graph.call_module(str(site.layer.target), site.layer.args, options)
    site.activation.replace_all_uses_with(fused)
    for node in (site.activation, site.addition, site.layer):
        if node is not None:
            graph.erase_node(node)
