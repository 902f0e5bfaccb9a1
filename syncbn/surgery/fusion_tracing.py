"""Tracing the forward of a module with `torch.fx`, and detecting forwards that a trace would not reproduce."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import fx, nn

from syncbn.nn.bytecode import has_in_place_operator, instructions
from syncbn.surgery.fusion_classes import Fused

# Functions whose results vary between calls with the same input: random numbers, and modes of autograd and autocast.
UNSTEADY = {"rand", "randn", "randint", "random", "uniform", "bernoulli", "is_grad_enabled", "is_autocast_enabled"}


class _Tracer(fx.Tracer):
    """Traces one module with its children as leaves: each becomes a single call in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traced(parent: nn.Module) -> fx.Graph | str | None:
    """The graph of a module's forward, or why it cannot be traced; None for a container without a forward."""
    forward = type(parent).forward
    if forward is nn.Module.forward:
        return None
    if isinstance(parent, Fused):
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
    except Exception as error:  # a forward may raise anything when it gets a proxy
        return f"the forward of {type(parent).__name__} cannot be traced: {next(iter(str(error).splitlines()), '')}"
    finally:
        for name in set(parent.__dict__) - before:  # tensor constants that the tracer has stored on the module
            parent.__dict__.pop(name)
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        return "the forward of its module makes tensors, which a trace would fix"
    if _loses_a_change_in_place(forward, graph):
        return "the forward of its module changes a tensor in place that is used elsewhere, too"
    return graph


def _loses_a_change_in_place(forward: Any, graph: fx.Graph) -> bool:
    """Whether an `a += b`, which a trace records as `a = a + b`, may change a tensor that is used elsewhere, too."""
    if not has_in_place_operator(forward.__code__):
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
    """Why a trace of `function` might not reproduce its next call, judged by its bytecode; None if it will.

    The methods and helper functions that it calls are examined too.

    Args:
        seen: the code objects that have been examined already; updated.
    """
    code = getattr(function, "__code__", None)
    if code is None or code in seen or hasattr(function, "__wrapped__"):
        known = code is not None and code in seen
        return None if known else f"{type(parent).__name__} wraps its forward, which a trace would lose"
    seen.add(code)
    for instruction in instructions(code):
        reason, called = None, []
        name = instruction.argval
        if instruction.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"):
            reason = f"sets {name}"
        elif instruction.opname == "WITH_EXCEPT_START":
            reason = "has a with statement, which a trace would lose"
        elif name in UNSTEADY:
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
