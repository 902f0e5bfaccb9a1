"""Fusing a model's batch normalization with the addition and the activation that follow it, in place.

In an `nn.Sequential` the activation becomes an `nn.Identity`. Any other module that calls the layer is traced by
`torch.fx`, its children as they are, and gets a class made for it: a subclass of its own, whose `forward` is the traced
one with the addition and the activation left to the layer. Nothing is copied and no name changes: parameters, buffers,
state dict keys, hooks and an optimizer built before stay what they were.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from syncbn.kernels.activations import LEAKY_SLOPE
from syncbn.nn import lean as restoring
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.patterns import Patterns, named_modules, select

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.leaky_relu: "leaky_relu", F.silu: "silu",
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")
# Names whose values differ from call to call without the input saying so.
_UNSTEADY = {"rand", "randn", "randint", "random", "uniform", "bernoulli", "is_grad_enabled", "is_autocast_enabled"}
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` has made of one layer."""

    name: str
    activation: str | None
    """What the layer does now; None: it was left as it is."""
    residual: bool
    """Whether it also does the addition."""
    reason: str
    """Why it was left; "" for a layer that was fused."""
    memory: str = "default"
    """What the layer keeps now: "default", or "lean" (see `SyncBatchNorm`)."""
    memory_reason: str = ""
    """Why a layer that was fused keeps its input although "lean" was asked for."""


_Outcome = tuple[Any, ...]  # the fields of a report, less the name


@dataclass(frozen=True)
class _Site:
    """A layer, and what follows it in the forward pass of its parent."""

    layer: fx.Node
    addition: fx.Node | None
    residual: fx.Node | None
    activation: fx.Node
    kind: str


def fuse(
    module: nn.Module, *, match: Patterns = "*", exclude: Patterns | None = (), memory: str = "default"
) -> list[FusionReport]:
    """Lets every selected `SyncBatchNorm` of `module` do the activation that follows it, and an addition between them,
    in its own pass over the activation; in place.

    Fused are ReLU, leaky ReLU (slope 0.01) and SiLU, as modules or as functions, in an `nn.Sequential` and in every
    other module whose `forward` `torch.fx` can trace and that does the same in training and evaluation. The numbers
    stay the same. Everything else is left, and reported with the reason: layers of another class (convert them first),
    that are used twice or whose output is; activations and layers with hooks, which would see something else.

    A residual of another shape, which broadcasts, is an error of the layer at its first forward: exclude it then. Code
    that calls a layer of a fused module by itself gets the activation too. Every rank has to fuse alike.
    `revert_sync_batchnorm` undoes it.

    Args:
        module: any model, wrapped in DDP or not.
        match: patterns of the layers: shell globs over dotted names; a plain name selects all below it.
        exclude: patterns of the layers to leave.
        memory: "lean" makes lean, too, what it can of the layers that it fuses (see `SyncBatchNorm`): those with a
            leaky ReLU and without an addition. The others keep their input, and the report says why.

    Returns:
        A report for each selected layer of torch's or ours.

    Raises:
        ValueError: a pattern that selects nothing; another word for `memory`.

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
    graphs = [_traced(parent) for parent in parents]
    targets = [
        id(_target(parent, node))
        for parent, graph in zip(parents, graphs, strict=True)
        for node in (graph.nodes if isinstance(graph, fx.Graph) else ())
    ]
    places, calls = Counter(map(id, modules)), Counter(targets)
    found: dict[int, _Outcome] = {}
    for layer in layers.values():
        reason = _why_not(layer, max(places[id(layer)], calls[id(layer)]))
        if reason is not None:
            found[id(layer)] = None, False, reason
    wanted = {id(layer) for layer in layers.values()} - found.keys()
    for parent, graph in zip(parents, graphs, strict=True):
        if isinstance(graph, fx.Graph):
            found |= _fuse_in(parent, graph, wanted, memory)
        elif graph is not None:
            found |= {id(child): (None, False, graph) for child in parent.children() if id(child) in wanted}
    default = (None, False, "no module was found that calls it")
    return [FusionReport(name, *found.get(id(layer), default)) for name, layer in layers.items()]


def unfuse(module: nn.Module) -> None:
    """Undoes `fuse`, in place."""
    for parent in module.modules():
        for name, before in parent.__dict__.pop("_fused_layers", {}).items():
            parent.get_submodule(name).__dict__.update(activation=None, memory=before)
        for name, activation in parent.__dict__.pop("_fused_activations", {}).items():
            parent._modules[name] = activation.train(parent.training)
        if isinstance(parent, _Fused):
            parent.__class__ = type(parent).__dict__["_original_class"]


def fused_layers(module: nn.Module) -> list[nn.Module]:
    """The layers whose activation `unfuse` takes away again."""
    parents = module.modules()
    return [parent.get_submodule(name) for parent in parents for name in parent.__dict__.get("_fused_layers", ())]


def _why_not(layer: nn.Module, num_uses: int) -> str | None:
    """Why a layer cannot be fused wherever it is; None where it can."""
    if isinstance(layer, SyncBatchNorm) and type(layer) is not SyncBatchNorm:
        return f"is a {type(layer).__name__}, which has a forward of its own"
    if type(layer) is not SyncBatchNorm:
        return f"is a {type(layer).__name__}; convert_sync_batchnorm comes first"
    if layer._activation_name() is not None:
        return f"has an activation already: {layer.activation}"
    if num_uses > 1:
        return "is used in several places"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "has hooks, which would see the activation's output"
    return None


def _has_layers(parent: nn.Module) -> bool:
    """Whether its forward may call a layer."""
    return any(isinstance(child, SyncBatchNorm) for child in parent.modules() if child is not parent)


def _target(parent: nn.Module, node: fx.Node) -> nn.Module | None:
    return parent.get_submodule(node.target) if node.op == "call_module" and isinstance(node.target, str) else None


def _fuse_in(parent: nn.Module, graph: fx.Graph, wanted: set[int], memory: str) -> dict[int, _Outcome]:
    """Fuses what can be among the direct children of one module; what became of each, by the id of the layer."""
    found: dict[int, _Outcome] = {}
    sites: list[_Site] = []
    for node in list(graph.nodes):
        layer = _target(parent, node)
        if layer is None or id(layer) not in wanted:
            continue
        if "." in str(node.target):
            found[id(layer)] = None, False, "is called by another module than the one that it is part of"
            continue
        site = _site_of(parent, node, [other.layer for other in sites])
        if isinstance(site, str):
            found[id(layer)] = None, False, site
            continue
        assert isinstance(layer, SyncBatchNorm)
        found[id(layer)] = _outcome(layer, site, memory)
        if found[id(layer)][0] is not None:
            sites.append(site)
    if not sites:
        return found
    activations = {}
    before = dict(parent.__dict__.get("_fused_layers", {}))
    for site in sites:
        layer = _target(parent, site.layer)
        assert isinstance(layer, SyncBatchNorm)
        before[str(site.layer.target)] = layer.__dict__.get("memory", "default")
        layer.activation, layer.memory = site.kind, found[id(layer)][3]
        if type(parent).forward is nn.Sequential.forward:
            activations[str(site.activation.target)] = _target(parent, site.activation)
        else:
            _rewrite(graph, site)
    parent.__dict__["_fused_layers"] = before
    if activations:
        for name in activations:
            parent._modules[name] = nn.Identity()
        parent.__dict__["_fused_activations"] = parent.__dict__.get("_fused_activations", {}) | activations
    else:
        code = graph.python_code("self")
        used = {name: value for name, value in code.globals.items() if name in code.src}
        parent.__class__ = _fused_class(type(parent), code.src, used)
    return found


def _outcome(layer: SyncBatchNorm, site: _Site, memory: str) -> _Outcome:
    """What a layer at this site becomes."""
    wanted = memory == "lean" or layer._is_lean()
    reason = _why_not_lean(layer, site) if wanted else ""
    if reason and layer._is_lean():
        return None, False, f"is lean, and {reason}"
    return site.kind, site.residual is not None, "", "lean" if wanted and not reason else "default", reason


def _why_not_lean(layer: SyncBatchNorm, site: _Site) -> str:
    """Why the output of what a layer becomes will not tell its input; "" where it will."""
    if site.residual is not None:
        return "its output does not tell what was added"
    if site.kind not in restoring.INVERTIBLE:
        return f"its output does not tell what went into {site.kind}"
    found = restoring.conditions(layer.weight, layer.bias, site.kind, torch.float32)
    if found is not None and not found.is_meta and bool(restoring.are_too_many(found, torch.float32)):
        return "too many of its weights are 0, or small against the bias"
    return ""


def _changes_in_place(parent: nn.Module, node: fx.Node) -> bool:
    is_method = node.op == "call_method" and str(node.target).endswith("_")
    has_option = bool(node.kwargs.get("inplace") or getattr(_target(parent, node), "inplace", False))
    return is_method or has_option or node.target in _IN_PLACE_ADDITIONS


def _site_of(parent: nn.Module, node: fx.Node, taken: list[fx.Node]) -> _Site | str:
    """What follows a layer, or why it cannot be fused with it."""
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
    module = _target(parent, user)
    if module is not None and any(getattr(module, hooks) for hooks in (*_HOOKS, "_forward_pre_hooks")):
        return f"the activation {user.target} has hooks"
    if kind == "leaky_relu" and any(_changes_in_place(parent, other) for other in user.users):
        return "the activation's output is changed in place, which backward would go by"
    return _Site(node, addition, residual, user, kind)


def _kind(parent: nn.Module, node: fx.Node) -> str | None:
    """The activation that a node is, by the name that the layer knows it by."""
    module = _target(parent, node)
    if module is not None:
        if type(module) is nn.ReLU:
            return "relu"
        if type(module) is nn.SiLU:
            return "silu"
        return "leaky_relu" if type(module) is nn.LeakyReLU and module.negative_slope == LEAKY_SLOPE else None
    kind = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    options = {**node.kwargs}
    options.pop("inplace", None)
    if kind == "leaky_relu" and options.pop("negative_slope", LEAKY_SLOPE) != LEAKY_SLOPE:
        return None
    return kind if len(node.args) <= 1 and not (options.keys() - {"input"}) else None


def _rewrite(graph: fx.Graph, site: _Site) -> None:
    """Leaves the addition and the activation to the layer, at the place of the activation."""
    with graph.inserting_before(site.activation):
        options: dict[str, Any] = {} if site.residual is None else {"residual": site.residual}
        fused = graph.call_module(str(site.layer.target), site.layer.args, options)
    site.activation.replace_all_uses_with(fused)
    for node in (site.activation, site.addition, site.layer):
        if node is not None:
            graph.erase_node(node)


class _Tracer(fx.Tracer):
    """Traces one module; its children are called as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(parent: nn.Module) -> fx.Graph | str | None:
    """What a module's forward does, or why that cannot be told; None for a container, which has none."""
    forward = type(parent).forward
    if forward is nn.Module.forward:
        return None
    if isinstance(parent, _Fused):
        return "its module is fused already"
    if isinstance(parent, nn.Sequential) and forward is nn.Sequential.forward:
        return _graph_of_sequential(parent)
    if "forward" in parent.__dict__:
        return "the forward of its module was replaced on the instance"
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(parameter.kind not in plain or parameter.default is not parameter.empty for parameter in parameters):
        return "the forward of its module has optional arguments, which a trace would fix"
    reason = _not_the_same_every_time(parent, forward, set())
    if reason is not None:
        return reason
    before = set(parent.__dict__)
    try:
        graph = _Tracer().trace(parent)
    except Exception as error:  # whatever a forward does with what is not a tensor
        return f"the forward of {type(parent).__name__} cannot be traced: {next(iter(str(error).splitlines()), '')}"
    finally:
        for name in set(parent.__dict__) - before:  # constants that the trace has hung there
            parent.__dict__.pop(name)
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        return "the forward of its module makes tensors, which a trace would fix"
    if _loses_a_change_in_place(forward, graph):
        return "the forward of its module changes a tensor in place that is used elsewhere, too"
    return graph


def _loses_a_change_in_place(forward: Any, graph: fx.Graph) -> bool:
    """Whether `a += b`, which a trace takes for `a = a + b`, may be seen by others who have `a`."""
    codes = _codes(forward.__code__)
    instructions = [instruction for code in codes for instruction in dis.get_instructions(code)]
    if not any(one.opname.startswith("BINARY_OP") and one.argrepr.endswith("=") for one in instructions):
        return False
    lefts = [node.args[0] for node in graph.nodes if getattr(node.target, "__module__", "") == "_operator"]
    return any(isinstance(left, fx.Node) and (left.op == "placeholder" or len(left.users) > 1) for left in lefts)


def _graph_of_sequential(parent: nn.Sequential) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in parent._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _not_the_same_every_time(parent: nn.Module, function: Any, seen: set[Any]) -> str | None:
    """Why a trace of a function might not be what it does next time, by a look at its code; None where it will."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen or hasattr(function, "__wrapped__"):
        known = code is not None and code in seen
        return None if known else f"{type(parent).__name__} wraps its forward, which a trace would lose"
    seen.add(code)
    for instruction in (one for inner in _codes(code) for one in dis.get_instructions(inner)):
        reason, called = None, []
        name = instruction.argval
        if instruction.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"):
            reason = f"sets {name}"
        elif instruction.opname == "WITH_EXCEPT_START":
            reason = "has a with statement, which a trace would lose"
        elif name in _UNSTEADY:
            reason = f"calls {name}, whose result a trace would fix"
        elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
            own = [cls.__dict__.get(name) for cls in type(parent).__mro__ if cls not in (nn.Module, object)]
            called = [method for method in own if isinstance(method, types.FunctionType)]
            if parent.__dict__.get(name) is not None or any(isinstance(method, property) for method in own):
                reason = f"reads self.{name}, which a trace would fix"
        elif instruction.opname == "LOAD_GLOBAL":
            helper = function.__globals__.get(name)
            if isinstance(helper, types.FunctionType) and not helper.__module__.startswith("torch"):
                called = [helper]
        if reason is not None:
            return f"the forward of {type(parent).__name__} {reason}"
        for inner in called:
            reason = _not_the_same_every_time(parent, inner, seen)
            if reason is not None:
                return reason
    return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


class _Fused(nn.Module):
    """What the classes made here share; after the original class in the method order."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process alone: pickle what makes it.
        members = type(self).__dict__
        names = {
            name: (value.__name__,) if isinstance(value, types.ModuleType) else value
            for name, value in members["_globals"].items()
        }
        return _rebuild, (members["_original_class"], members["_source"], names), self.__getstate__()


def _rebuild(original: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    used = {name: _import(value[0]) if isinstance(value, tuple) else value for name, value in names.items()}
    cls = _fused_class(original, source, used)
    return cls.__new__(cls)


def _import(name: str) -> types.ModuleType:
    return importlib.import_module(name)


_classes: dict[tuple[type, str], type[nn.Module]] = {}


def _fused_class(original: type[nn.Module], source: str, used: dict[str, Any]) -> type[nn.Module]:
    """The subclass of a module's class with this forward; the same at every call."""
    if (original, source) not in _classes:
        space = dict(used)
        exec(compile(source, f"<fused {original.__name__}>", "exec"), space)  # torch.fx's own
        forward: Callable[..., Any] = space["forward"]
        members = {
            "forward": forward,
            "__reduce_ex__": _Fused.__reduce_ex__,
            "__module__": original.__module__,
            "_original_class": original,
            "_source": source,
            "_globals": used,
        }
        bases = (original, _Fused)
        name = f"Fused{original.__name__}"
        _classes[original, source] = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(members))
    return _classes[original, source]
