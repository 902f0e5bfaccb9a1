"""The layer under tools that look at operators: `torch.export`, `make_fx`, `torch.jit.trace`, `torch.func`, `torch.fx`.

Their programs have to consist of ATen's operators, and what they do to an operator (batch, differentiate, record) they
know for ATen's alone. So there a forward pass that normalizes with the batch calls `F.batch_norm` in place of the
layer's own operators, as torch's layers do, with its accuracy and its errors. What sums over ranks is an error there.
(`torch.compile` takes the layer's own operators, and its sums.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from syncbn.kernels.activations import ACTIVATIONS
from syncbn.kernels.reference import compute_dtype, per_channel, reduced_dims
from syncbn.torch_compat import (
    assume_constant_result,
    forward_ad_level,
    has_tangent,
    is_exporting,
    jit_trace,
    proxy_mode,
    transforms_active,
)

if TYPE_CHECKING:
    from syncbn.kernels.step import Statistics

PROXIES: tuple[type[Any], ...] = (fx.Proxy,)  # types of the arguments that `torch.fx` traces with
_WHO = "torch.export, make_fx, torch.jit.trace and the transforms of torch.func"


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a forward pass has to consist of ATen's operators.

    Args:
        tensors: its arguments, among which forward-mode differentiation finds its dual tensors.
    """
    if torch.compiler.is_compiling():
        # Dynamo passes an autograd function under a transform by, and its gradient is then silently 0.
        return is_exporting() or (torch.compiler.is_dynamo_compiling() and _is_transformed_graph())
    if transforms_active() or jit_trace() is not None or proxy_mode() is not None:
        return True
    return forward_ad_level() != -1 and any(map(has_tangent, tensors))


@assume_constant_result  # runs while Dynamo traces, which enters transforms as they are entered in the program
def _is_transformed_graph() -> bool:
    return transforms_active()


def refuse_group(num_ranks: int) -> NoReturn:
    """Raises for a pass that would have to sum over ranks."""
    raise RuntimeError(
        f"{_WHO} do not take a SyncBatchNorm that sums over {num_ranks} ranks, because they know no sum over ranks:"
        " call model.eval(), freeze the statistics, or give the layer a group of one rank"
    )


def refuse_context() -> NoReturn:
    """Raises for a pass whose statistics are being collected."""
    raise RuntimeError(
        f"{_WHO} do not take a SyncBatchNorm while accumulate_stats, precise_bn or Monitor.watch collects its"
        " statistics: leave that context first"
    )


def normalize_by_local_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    skip_nonfinite: bool,
) -> Tensor:
    """What `normalize_by_batch` computes in a group of one, by ATen's operators and torch's own autograd."""
    running_mean, running_var, counter, momentum, eps = statistics
    if mask is not None or skip_nonfinite or (momentum is None and running_mean is not None):
        output = _composed(input, weight, bias, statistics, mask, skip_nonfinite)
    else:
        if counter is not None:  # first, as in torch: `grad` raises here, and nothing has moved
            counter.add_(1)
        rate = 0.0 if momentum is None else momentum
        try:
            output = F.batch_norm(input, running_mean, running_var, weight, bias, True, rate, eps)
        except Exception:  # `vmap` raises here
            if counter is not None:
                counter.sub_(1)
            raise
    return add_and_activate(output, residual, activation)


def add_and_activate(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(output + residual), not in place: `vmap` may have to give the sum a dimension that `output` lacks."""
    if residual is not None:
        output = output + residual
    return output if activation is None else ACTIVATIONS[activation](output)


def _composed(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    mask: Tensor | None,
    skip_nonfinite: bool,
) -> Tensor:
    """`F.batch_norm` with what it lacks: a mask, `skip_nonfinite`, a cumulative average without a number on the host.

    (Long because the formula of the running statistics stands here as well: that of the operators is one of float64.)
    """
    running_mean, running_var, counter, momentum, eps = statistics
    dims, wide = reduced_dims(input), input.to(compute_dtype(input.dtype))
    valid = torch.ones_like(input[:, :1], dtype=torch.bool) if mask is None else mask
    count = valid.expand(input.size(0), 1, *input.shape[2:]).sum(dtype=wide.dtype)
    n = count.clamp(min=1.0)
    mean = torch.where(valid, wide, 0.0).sum(dims) / n
    centred = wide - per_channel(mean, input)
    var = torch.where(valid, centred, 0.0).square().sum(dims) / n
    unbiased = var.detach() * (count / (count - 1.0).clamp(min=1.0))
    moves = count > 0
    if skip_nonfinite and running_mean is not None:
        for vector in (mean, unbiased):
            moves = moves & vector.detach().to(running_mean.dtype).isfinite().all()
    if counter is not None:
        counter.add_(moves.to(counter.dtype))
    if running_mean is not None and running_var is not None:
        if momentum is None:
            rate = torch.zeros_like(count) if counter is None else 1.0 / counter.to(wide.dtype).clamp(min=1.0)
        else:
            rate = torch.full_like(count, momentum)
        for running, new, allowed in (
            (running_mean, mean.detach(), moves),
            (running_var, unbiased, moves & (count > 1)),
        ):
            moved = (1.0 - rate) * running.to(wide.dtype) + rate * new
            running.copy_(torch.where(allowed, moved.to(running.dtype), running))
    output = centred * per_channel((var + eps).rsqrt(), input)
    if weight is not None:
        output = output * per_channel(weight.to(wide.dtype), input)
    if bias is not None:
        output = output + per_channel(bias.to(wide.dtype), input)
    return output.to(input.dtype)


def record_call(layer: nn.Module, traced: Any, *args: object, **kwargs: object) -> Any:
    """Records a call of the layer as one node `call_module` of the graph that `torch.fx` traces; returns its proxy.

    Args:
        traced: the `forward` that the tracer has entered, a function.
        args, kwargs: those of the call, the proxy of the input first.

    Raises:
        TypeError: the tracer has seen more than this call: forward hooks, or a `forward` around that of the layer.
    """
    what = None
    if layer._forward_hooks or layer._forward_pre_hooks:
        what = "with forward hooks"  # which the node would call as well
    elif type(layer).forward is not traced:
        what = "with a forward of its own"
    if what is not None:
        raise TypeError(
            f"torch.fx cannot record a {type(layer).__name__} {what} as one call: trace with a Tracer whose"
            " is_leaf_module is true for this layer"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    tracer: Any = args[0].tracer  # type: ignore[attr-defined]
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, given)
