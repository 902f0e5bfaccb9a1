"""Every number of the layer against float64, where rounding hurts most: far means, tiny spreads, half precision.

The data is cut over two ranks; the reference is float64 `nn.BatchNorm` of one process on the same values.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.nn.moments import Moments
from tests.reference import expected_step, make_batch, max_error, run_step, set_affine

COLUMNS = [(0.0, 1.0), (10.0, 1.0), (1000.0, 0.1), (1000.0, 0.01), (1e4, 1.0), (1000.123, 0.01)]


def check_column(mean, std, dtype, bound):
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    input = (torch.randn(16, 8, 24, 24, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
    grad = torch.randn(input.shape, generator=generator, dtype=torch.float64).to(dtype)
    expected = expected_step(input, grad, affine=False)
    layer = SyncBatchNorm(8, affine=False, dtype=dtype)
    actual = run_step(layer, input.chunk(2)[rank], grad.chunk(2)[rank])
    assert max_error(actual.output, expected.output.chunk(2)[rank]) < bound
    scale = float(expected.grad_input.abs().max())
    assert max_error(actual.grad_input, expected.grad_input.chunk(2)[rank]) < bound * scale
    # Buffers are of the input's type: half a unit in their last place, twice.
    assert max_error(actual.running_mean / expected.running_mean.abs().clamp(min=1.0),
                     expected.running_mean / expected.running_mean.abs().clamp(min=1.0)) < bound  # fmt: skip
    assert max_error(actual.running_var, expected.running_var) < bound * max(1.0, std**2)


@pytest.mark.parametrize(("mean", "std"), COLUMNS)
def test_float32_is_within_a_millionth_of_float64_wherever_the_mean_is(ranks, mean, std):
    ranks(2, check_column, mean, std, torch.float32, 1e-6)


# `nn.BatchNorm2d` in float64 is itself off by up to 3e-9 in these columns (benchmarks/accuracy.md), so it cannot be the
# reference for 1e-10: the truth here is computed with the exact mean, in numpy's extended precision.
def check_float64_column(mean, std):
    import numpy as np

    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(16, 4, 24, 24, generator=generator, dtype=torch.float64) * std + mean
    wide = input.numpy().astype(np.longdouble)
    centred = wide - wide.mean(axis=(0, 2, 3), keepdims=True)
    variance = np.square(centred).mean(axis=(0, 2, 3), keepdims=True)
    truth = torch.from_numpy((centred / np.sqrt(variance + np.longdouble(1e-5))).astype(np.float64))
    output = SyncBatchNorm(4, affine=False, dtype=torch.float64)(input.chunk(2)[rank])
    assert max_error(output, truth.chunk(2)[rank]) < 1e-12


@pytest.mark.parametrize(("mean", "std"), COLUMNS)
def test_float64_inputs_keep_twelve_digits(ranks, mean, std):
    ranks(2, check_float64_column, mean, std)


def check_tiny_variance(variance, mean):
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(64, 3, 9, generator=generator, dtype=torch.float64) * variance**0.5 + mean
    eps = variance / 100  # so that the variance decides, not eps
    truth = (input - input.mean((0, 2), keepdim=True)) / (input.var((0, 2), correction=0, keepdim=True) + eps).sqrt()
    layer = SyncBatchNorm(3, eps=eps, affine=False, dtype=torch.float64)
    assert max_error(layer(input.chunk(2)[rank]), truth.chunk(2)[rank]) < 1e-9
    assert max_error(layer.running_var, 0.9 + 0.1 * input.var((0, 2))) < 1e-15


@pytest.mark.parametrize("variance", [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("mean", [0.0, 0.01])
def test_a_tiny_variance_is_neither_lost_nor_negative(ranks, variance, mean):
    ranks(2, check_tiny_variance, variance, mean)


def check_constant(value, dtype):
    layer = SyncBatchNorm(2, dtype=dtype)
    set_affine(layer)
    input = torch.full((3 + dist.get_rank(), 2, 5), value, dtype=dtype, requires_grad=True)
    output = layer(input)
    output.sum().backward()
    assert torch.equal(output, layer.bias.detach().view(1, -1, 1).expand_as(output))
    assert input.grad.isfinite().all()
    assert (layer.running_var >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-4, 60000.0])
def test_a_constant_channel_gives_the_bias(ranks, value, dtype):
    ranks(2, check_constant, value, dtype)


HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff


def check_half(dtype, parameter_dtype):
    rank = dist.get_rank()
    input, grad = (tensor.to(dtype) for tensor in make_batch((12, 4, 6, 6), mean=2.0))
    sizes = (5, 7)
    expected = expected_step(input, grad)
    layer = SyncBatchNorm(4, dtype=parameter_dtype)
    set_affine(layer)
    if parameter_dtype == dtype:  # the reference has to see the rounded parameters
        reference = nn.BatchNorm2d(4, dtype=torch.float64)
        reference.weight.data, reference.bias.data = layer.weight.data.double(), layer.bias.data.double()
        expected = run_step(reference, input.double(), grad.double())
    actual = run_step(layer, input.split(sizes)[rank], grad.split(sizes)[rank])
    roundoff = HALF[dtype]
    assert actual.output.dtype == actual.grad_input.dtype == dtype
    # One rounding of the result, no more: everything before it is wider.
    assert max_error(actual.output, expected.output.split(sizes)[rank]) <= 1.02 * roundoff * float(
        expected.output.abs().max()
    )
    assert max_error(actual.grad_input, expected.grad_input.split(sizes)[rank]) <= 1.02 * roundoff * float(
        expected.grad_input.abs().max()
    )
    assert layer.weight.grad.dtype == layer.running_mean.dtype == parameter_dtype
    statistics = 2 * roundoff if parameter_dtype == dtype else 1e-6
    assert max_error(layer.running_mean, expected.running_mean) <= statistics * float(expected.running_mean.abs().max())
    assert max_error(layer.running_var, expected.running_var) <= statistics * float(expected.running_var.abs().max())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide_parameters", [True, False], ids=["float32 parameters", "half module"])
def test_half_precision_rounds_once(ranks, dtype, wide_parameters):
    ranks(2, check_half, dtype, torch.float32 if wide_parameters else dtype)


def check_autocast():
    rank = dist.get_rank()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4))
    input = make_batch((8, 3, 5, 5))[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[0](input)
        output = model(input.chunk(2)[rank])
    expected = expected_step(hidden, torch.zeros_like(hidden), affine=False)
    assert output.dtype == torch.bfloat16
    assert max_error(output, expected.output.chunk(2)[rank]) < 4 * 2.0**-8
    assert max_error(model[1].running_mean, expected.running_mean) < 1e-6
    output.sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


def test_autocast_feeds_half_inputs_to_wide_statistics(ranks):
    ranks(2, check_autocast)


def check_large_counts():
    # 2^24 + 1 values per channel on rank 0 and one on rank 1: float32 cannot count them, and half not even 2,049.
    moments = (
        Moments.of(torch.ones(1, 1, 1))
        if dist.get_rank()
        else Moments(Moments.of(torch.zeros(1, 1)).packed * (2.0**24 + 1))
    )
    total = moments.all_reduce()
    assert total.count == 2**24 + 2
    assert abs(total.mean.item() * (2**24 + 2) - 1.0) < 1e-12


def test_counts_are_exact_beyond_what_float32_can_count(ranks):
    ranks(2, check_large_counts)


def check_uneven_counts():
    # A rank with one far-away sample beside a rank with many: weights by count, not by rank.
    rank = dist.get_rank()
    sizes = (4000, 1)
    input = torch.cat([make_batch((4000, 2))[0], torch.full((1, 2), 1e6, dtype=torch.float64)])
    expected = expected_step(input, torch.ones_like(input), affine=False)
    actual = run_step(
        SyncBatchNorm(2, affine=False, dtype=torch.float64), input.split(sizes)[rank], torch.ones(sizes[rank], 2)
    )
    assert max_error(actual.output, expected.output.split(sizes)[rank]) < 1e-10
    assert max_error(actual.running_var / expected.running_var, torch.ones(2).double()) < 1e-12


def test_ranks_are_weighted_by_their_counts(ranks):
    ranks(2, check_uneven_counts)
