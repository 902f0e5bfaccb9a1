"""The forward pass of one process on the CPU has the bits of the operators, and calls fewer of ATen."""

import pytest
import torch

from syncbn import SyncBatchNorm
from syncbn.kernels import cpu, cpu_step, operators
from syncbn.kernels.step import Statistics
from tests.kernels.test_cpu import as_layout, operators_of


def statistics(num_channels, dtype=torch.float32, momentum=0.1):
    buffers = torch.linspace(-1, 1, num_channels).to(dtype), torch.linspace(0.5, 2, num_channels).to(dtype)
    return Statistics(*buffers, torch.tensor(3), momentum, 1e-5)


def by_operators(input, weight, bias, residual, activation, moving):
    mean, invstd, count = cpu.finish(cpu.moments(input), *moving, cpu.reference.compute_dtype(input.dtype))
    return cpu.normalize(input, mean, invstd, weight, bias, residual, activation), mean, invstd, count


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(32, 32, 8, 8), (8, 70, 4, 4), (6, 4, 9, 7), (2, 3, 600, 601), (5, 1, 1, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.1, 3.0, 1000.0])
def test_the_same_bits_as_by_operators(shape, layout, dtype, mean):
    input = as_layout((torch.randn(shape, dtype=torch.float64) + mean).to(dtype), layout)
    weight, bias = torch.linspace(0.5, 1.5, shape[1]), torch.linspace(-1, 1, shape[1])
    for momentum, vectors, activation in ((0.1, (weight, bias), None), (None, (None, bias), "relu")):
        residual = None if activation is None else input.flip(0)
        one, other = (statistics(shape[1], momentum=momentum) for _ in range(2))
        done = cpu_step.forward(input, *vectors, residual, activation, one)
        assert done is not None
        for ours, theirs in zip(done, by_operators(input, *vectors, residual, activation, other), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_what_the_kernels_do_not_support_is_left_to_the_operators():
    for input in (torch.randn(4, 3, 5, 5)[:, :, ::2], torch.randn(0, 3, 5, 5)):
        moving = statistics(3)
        assert cpu_step.forward(input, None, None, None, None, moving) is None
        assert moving[2] == 3  # nothing has moved


def test_a_step_is_few_operators(monkeypatch):
    input, grad = torch.randn(8, 64, 14, 14, requires_grad=True), torch.randn(8, 64, 14, 14)
    layer = SyncBatchNorm(64)
    for module in (cpu_step, operators):  # the profiler that counts would have torch.ops.syncbn called
        monkeypatch.setattr(module, "INTERCEPTORS", ())
    counts, _ = operators_of(lambda: layer(input).backward(grad))
    assert not [name for name in counts if name.startswith("syncbn::")]
    assert sum(number for name, number in counts.items() if name.startswith("aten::")) < 160
