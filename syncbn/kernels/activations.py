"""The activations that can be fused into a normalization, and their gradients.

`z` is the input of the activation. The gradients of ReLU and leaky ReLU depend on the sign of z only, which the output
shares: for these two, the backward functions accept the output in place of z. SiLU needs z itself.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": F.leaky_relu_,
    "silu": torch.ops.aten.silu_.default,
}


def output_tells(activation: str) -> bool:
    """Whether the gradient of the activation can be computed from its output alone."""
    return activation != "silu"


def apply_in_place(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Overwrites `output` with activation(output + residual) and returns it; the residual must have the same type."""
    if residual is not None:
        output.add_(residual)
    return output if activation is None else IN_PLACE[activation](output)


def backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z, given that of activation(z); differentiable in both arguments while gradients are enabled."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0.0)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(grad, z, LEAKY_SLOPE, False)
    if torch.is_grad_enabled():  # aten::silu_backward has no derivative
        sigmoid = z.sigmoid()
        return grad * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return torch.ops.aten.silu_backward(grad, z)


def backward_out(grad: Tensor, z: Tensor, activation: str, out: Tensor) -> Tensor:
    """`backward`, written to `out`."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, z, 0.0, grad_input=out)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward.grad_input(grad, z, LEAKY_SLOPE, False, grad_input=out)
    return torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=out)
