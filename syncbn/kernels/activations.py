"""The activations that a normalization can end with: what they are, and their gradient.

`z` is what goes into the activation. The gradients of ReLU and leaky ReLU ask for its sign alone, which their output
has too: the functions that take a gradient back may be given either. SiLU needs z itself.
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
    """Whether the gradient can be had from the output."""
    return activation != "silu"


def apply_in_place(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(output + residual) in the memory of `output`, whose type the residual has to have."""
    if residual is not None:
        output.add_(residual)
    return output if activation is None else IN_PLACE[activation](output)


def backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z from that of activation(z); a differentiable function of both while gradients are enabled."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0.0)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(grad, z, LEAKY_SLOPE, False)
    if torch.is_grad_enabled():  # torch's own has no derivative
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
