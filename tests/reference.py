"""What is right: float64 `nn.BatchNorm` of one process on the concatenated batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass
class Step:
    """One forward and backward pass: everything that a batch normalization layer computes."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: int | None


def make_batch(shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An input and an output gradient in float64; channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    scale = std * (1.0 + 0.1 * channel)
    input = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + (mean + 0.5 * std * channel)
    return input, torch.randn(shape, generator=generator, dtype=torch.float64)


def set_affine(layer: nn.Module, seed: int = 1) -> None:
    """Some weight and bias, the same for every layer of a width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def run_step(layer: nn.Module, input: Tensor, grad: Tensor) -> Step:
    """One training pass of a layer."""
    leaf = input.detach().clone().requires_grad_()
    output = layer(leaf)
    output.backward(grad.to(output.dtype))
    gradients = [None if p is None else p.grad for p in (layer.weight, layer.bias)]
    tracked = layer.num_batches_tracked
    return Step(
        output.detach(),
        leaf.grad,
        *gradients,
        layer.running_mean,
        layer.running_var,
        None if tracked is None else int(tracked),
    )


def build(layer_class: type[nn.Module], num_features: int, bias: bool = True, **options: object) -> nn.Module:
    """One of torch's batch normalizations, which have no argument `bias` before 2.13."""
    layer = layer_class(num_features, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def expected_step(input: Tensor, grad: Tensor, **options: object) -> Step:
    """The reference: float64 `nn.BatchNorm` on the whole batch."""
    layer = build(PLAIN[input.dim()], input.size(1), dtype=torch.float64, **options)
    if layer.weight is not None:
        set_affine(layer)
    return run_step(layer, input.to(torch.float64), grad.to(torch.float64))


def max_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected|; 0 for empty tensors; NaN counts as infinite."""
    if actual.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    return float((actual.detach().to(torch.float64) - expected.detach()).abs().nan_to_num(nan=float("inf")).max())
