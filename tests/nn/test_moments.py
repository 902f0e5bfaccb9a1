"""Moments add over batches without losing what cancellation would take."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncbn.nn.moments import Moments


def exact_moments(values):
    """Mean and biased variance in rational arithmetic, which does not round."""
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    return mean, sum((value - mean) ** 2 for value in exact) / len(exact)


@pytest.mark.parametrize("ratio", [0.0, 1e1, 1e4, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pooled_variance_is_exact_where_the_mean_is_far_from_zero(ratio, dtype):
    input = (torch.randn(60, 1, 7, dtype=torch.float64) * 0.37 + 0.37 * ratio).to(dtype)
    pooled = sum((Moments.of(part) for part in input.split([1, 40, 0, 19])[1:]), Moments.of(input[:1]))
    mean, variance = exact_moments(input.flatten().tolist())
    assert pooled.count == 420
    assert abs(Fraction(pooled.mean.item()) - mean) <= abs(mean) * Fraction(2) ** -52
    assert abs(Fraction(pooled.var.item()) - variance) <= variance * Fraction(1, 10**11)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
)
def test_any_cut_of_any_values_pools_to_the_same_moments(values, cut, offset):
    input = torch.tensor(values, dtype=torch.float64).view(-1, 1) + offset
    pooled = Moments.of(input[:cut]) + Moments.of(input[cut:])
    mean, variance = exact_moments(input.flatten().tolist())
    largest = max(abs(value) for value in input.flatten().tolist())
    assert pooled.count == len(values)
    assert pooled.var >= 0
    assert abs(Fraction(pooled.mean.item()) - mean) <= Fraction(largest) * Fraction(2) ** -50
    assert (
        abs(Fraction(pooled.var.item()) - variance)
        <= variance * Fraction(1, 10**9) + Fraction(largest) ** 2 * Fraction(2) ** -90
    )


def test_counts_are_exact_beyond_two_to_the_24():
    many = Moments(Moments.of(torch.zeros(1, 1)).packed * 2.0**40)
    one = Moments.of(torch.ones(1, 1))
    assert (many + one).count == 2**40 + 1


def test_no_samples_have_no_mean_and_no_variance():
    empty = Moments.of(torch.empty(0, 3, 4))
    assert empty.count == 0
    assert torch.equal(empty.mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(empty.var, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 12345.678, -1e18])
def test_a_constant_channel_has_its_value_as_mean_and_no_variance(value):
    moments = Moments.of(torch.full((1000, 1), value))
    assert moments.mean.item() == torch.tensor(value).item()
    assert 0 <= moments.var.item() <= value**2 * 1e-28
