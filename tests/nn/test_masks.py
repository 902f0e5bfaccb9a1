"""Masks: what is masked counts for nothing, as if it were not there."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from syncbn import SyncBatchNorm, freeze
from tests.reference import make_batch, set_affine


def make_mask(shape, seed=3, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((shape[0], 1, *shape[2:]), generator=generator) < share


def pack(tensor, mask):
    """The unmasked positions alone, (num, C)."""
    return tensor.movedim(1, -1)[mask.squeeze(1)]


def expected(batch, grad, mask, training=True):
    """Float64 `nn.BatchNorm1d` on the unmasked positions; gradients scattered back, 0 where masked."""
    layer = nn.BatchNorm1d(batch.size(1), dtype=torch.float64).train(training)
    set_affine(layer)
    leaf = pack(batch, mask).clone().requires_grad_()
    output = layer(leaf)
    output.backward(pack(grad, mask))
    scattered = []
    for values in (output.detach(), leaf.grad):
        whole = torch.zeros_like(batch).movedim(1, -1).contiguous()
        whole[mask.squeeze(1)] = values
        scattered.append(whole.movedim(-1, 1))
    return *scattered, layer


def run(batch, grad, mask, poison=float("nan"), training=True):
    layer = SyncBatchNorm(batch.size(1)).double().train(training)
    set_affine(layer)
    leaf = torch.where(mask.bool(), batch, poison).requires_grad_()
    output = layer(leaf, mask)
    output.backward(grad)
    return output.detach(), leaf.grad, layer


def check_equal(actual, wanted):
    for one, other in zip(actual[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[2].state_dict(), wanted[2].state_dict(), rtol=1e-10, atol=1e-10)
    for one, other in zip(actual[2].parameters(), wanted[2].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 3)], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_equal_to_removing_what_is_masked_whatever_lies_there(shape, poison):
    (batch, grad), mask = make_batch(shape, mean=10.0), make_mask(shape)
    check_equal(run(batch, grad, mask, poison), expected(batch, grad, mask))


@given(kept=st.integers(0, 20), seed=st.integers(0, 1000))
def test_any_number_of_positions(kept, seed):
    batch, grad = make_batch((4, 2, 5), seed=seed)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    mask = mask.view(4, 1, 5)
    output, gradient, layer = run(batch, grad, mask)
    assert output.isfinite().all()
    assert gradient.isfinite().all()
    if kept > 1:
        check_equal((output, gradient, layer), expected(batch, grad, mask))
    if kept == 0:
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(4, 1, 1, 6), (1, 1, 5, 6), (4, 1, 1, 1)], ids=str)
def test_a_mask_broadcasts_and_may_be_of_any_type(dtype, shape):
    batch, grad = make_batch((4, 3, 5, 6))
    mask = make_mask((shape[0], 3, *shape[2:]))
    whole = mask.expand(4, 1, 5, 6)
    check_equal(run(batch, grad, mask.to(dtype)), expected(batch, grad, whole))


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_and_frozen_statistics_leave_zeros_too(frozen):
    (batch, grad), mask = make_batch((4, 3, 5)), make_mask((4, 3, 5))
    layer = SyncBatchNorm(3).double()
    layer(batch)
    if frozen:
        freeze(layer)
    else:
        layer.eval()
    before = copy.deepcopy(layer.state_dict())
    leaf = torch.where(mask, batch, torch.nan).requires_grad_()
    output = layer(leaf, mask)
    output.backward(grad)
    torch.testing.assert_close(output, torch.where(mask, layer(batch), 0.0))
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[~mask.expand_as(batch)] == 0).all()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_second_derivatives_are_those_of_what_is_not_masked():
    batch, _ = make_batch((4, 2, 5))
    mask = make_mask((4, 2, 5))
    layer = SyncBatchNorm(2).double()
    check = torch.autograd.gradgradcheck
    assert check(lambda x, w: (layer(torch.where(mask, x, torch.nan), mask) * w).sum(),
                 (batch.requires_grad_(), torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)))  # fmt: skip


def check_over_ranks(shape, cuts, masked_rank):
    rank = dist.get_rank()
    (batch, grad), mask = make_batch(shape, mean=10.0), make_mask(shape)
    if masked_rank is not None:
        mask.split(cuts)[masked_rank].fill_(False)
    whole = expected(batch, grad, mask)
    output, gradient, layer = run(*(tensor.split(cuts)[rank] for tensor in (batch, grad, mask)))
    for actual, wanted in zip((output, gradient), whole[:2], strict=True):
        torch.testing.assert_close(actual, wanted.split(cuts)[rank], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.state_dict(), whole[2].state_dict(), rtol=1e-10, atol=1e-10)
    for parameter, wanted in zip(layer.parameters(), whole[2].parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cuts", [(1, 7), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("masked_rank", [None, 0])
def test_over_ranks_one_of_which_may_have_nothing_to_count(ranks, cuts, masked_rank):
    ranks(len(cuts), check_over_ranks, (8, 3, 4, 4), cuts, masked_rank)


def test_residual_and_activation_come_after_the_mask():
    (batch, _), mask = make_batch((4, 3, 5)), make_mask((4, 3, 5))
    layer, plain = SyncBatchNorm(3, activation="relu").double(), SyncBatchNorm(3).double()
    residual = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(batch, mask, residual), torch.relu(plain(batch, mask) + residual))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_input_is_kept(memory_format):
    batch = torch.randn(4, 3, 5, 6).to(memory_format=memory_format)
    output = SyncBatchNorm(3)(batch, make_mask(batch.shape))
    assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5), (4, 1, 4), (3, 1, 5)], ids=str)
def test_a_mask_that_does_not_fit_is_an_error_that_says_what_would(shape):
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \(4, 1, 5\)"):
        SyncBatchNorm(3)(torch.randn(4, 3, 5), torch.ones(shape))
