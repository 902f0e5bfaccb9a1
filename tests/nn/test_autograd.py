"""First and second derivatives over ranks, and manners towards autograd."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm
from tests.reference import make_batch, max_error, set_affine

SIZES = (2, 3)


def nonlinear(output):
    """A loss whose gradient depends on the output, so that second derivatives do not vanish."""
    return (output.sin() * output).sum()


def check_first_derivative():
    """Finite differences of the loss summed over ranks, one rank's element perturbed at a time."""
    rank, step = dist.get_rank(), 1e-6
    input = make_batch((sum(SIZES), 2, 2))[0].split(SIZES)[rank]
    layer = SyncBatchNorm(2, dtype=torch.float64, track_running_stats=False)
    set_affine(layer)

    def total_loss(mine):
        with torch.no_grad():
            loss = nonlinear(layer(mine))
            dist.all_reduce(loss)
        return loss

    leaf = input.clone().requires_grad_()
    nonlinear(layer(leaf)).backward()
    for perturbed_rank, size in enumerate(SIZES):
        for element in range(size * 4):
            difference = 0.0
            for sign in (1, -1):
                moved = input.clone()
                if rank == perturbed_rank:
                    moved.view(-1)[element] += sign * step
                difference = difference + sign * total_loss(moved)
            if rank == perturbed_rank:
                assert abs(leaf.grad.view(-1)[element] - difference / (2 * step)) < 1e-7


def test_first_derivatives_by_finite_differences_over_uneven_shards(ranks):
    ranks(2, check_first_derivative)


def second_derivatives(layer, input, group_of_one=False):
    """Gradients of |d loss / d input|^2 with respect to input, weight and bias."""
    leaf = input.detach().clone().requires_grad_()
    [grad] = torch.autograd.grad(nonlinear(layer(leaf)), leaf, create_graph=True)
    penalty = grad.square().sum()
    penalty.backward()
    return grad.detach(), leaf.grad, layer.weight.grad, layer.bias.grad


def check_second_derivative(sizes):
    rank = dist.get_rank()
    input = make_batch((sum(sizes), 2, 3))[0]
    layer, plain = SyncBatchNorm(2, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float64)
    for one in (layer, plain):
        set_affine(one)
    first, second, weight, bias = second_derivatives(layer, input.split(sizes)[rank])
    expected = second_derivatives(plain, input)
    assert max_error(first, expected[0].split(sizes)[rank]) < 1e-12
    assert max_error(second, expected[1].split(sizes)[rank]) < 1e-9
    for local, whole in ((weight, expected[2]), (bias, expected[3])):
        dist.all_reduce(local)
        assert max_error(local, whole) < 1e-9


@pytest.mark.parametrize("sizes", [(2, 3), (5, 0), (1, 3, 2)], ids=str)
def test_double_backward_includes_the_other_ranks(ranks, sizes):
    """torch's has no double backward (pytorch #61222)."""
    ranks(len(sizes), check_second_derivative, sizes)


def check_odd_gradients():
    rank = dist.get_rank()
    input = make_batch((4, 3, 5, 2))[0].chunk(2)[rank]
    layer = SyncBatchNorm(3, dtype=torch.float64)

    def gradient(grad):
        leaf = input.clone().requires_grad_()
        before = grad.clone()
        layer(leaf).backward(grad)
        assert torch.equal(grad, before)  # autograd's own tensor, not ours to write to
        return leaf.grad

    scalar = torch.tensor(0.7, dtype=torch.float64)
    expanded = scalar.expand(input.shape)
    assert expanded.stride() == (0, 0, 0, 0)
    assert max_error(gradient(expanded), gradient(expanded.contiguous())) < 1e-14
    random = make_batch(tuple(input.shape), seed=5)[1]
    strided = torch.stack([random, random], dim=2)[:, :, 0]
    assert max_error(gradient(strided), gradient(random)) < 1e-14


def test_expanded_and_strided_gradients_are_right_and_left_alone(ranks):
    """fvcore's differentiable all-reduce writes into the incoming gradient."""
    ranks(2, check_odd_gradients)


def check_two_forwards():
    rank = dist.get_rank()
    layer, plain = SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    first, second = (make_batch((5, 3), seed=seed)[0] for seed in (1, 2))
    mine = [batch.split(SIZES)[rank].clone().requires_grad_() for batch in (first, second)]
    whole = [batch.clone().requires_grad_() for batch in (first, second)]
    (nonlinear(layer(mine[0])) + 2 * nonlinear(layer(mine[1]))).backward()
    (nonlinear(plain(whole[0])) + 2 * nonlinear(plain(whole[1]))).backward()
    for ours, theirs in zip(mine, whole, strict=True):
        assert max_error(ours.grad, theirs.grad.split(SIZES)[rank]) < 1e-12
    assert max_error(layer.running_var, plain.running_var) < 1e-14
    assert layer.num_batches_tracked == 2


def test_two_forwards_before_one_backward(ranks):
    ranks(2, check_two_forwards)


def check_no_grad():
    layer, plain = SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    input = make_batch((5, 3))[0]
    with torch.no_grad():
        output = layer(input.split(SIZES)[dist.get_rank()].requires_grad_())
    assert not output.requires_grad
    assert max_error(output, plain(input).split(SIZES)[dist.get_rank()]) < 1e-12
    assert max_error(layer.running_mean, plain.running_mean) < 1e-14


def test_a_training_forward_without_gradients_still_moves_the_statistics(ranks):
    ranks(2, check_no_grad)


def test_only_what_backward_needs_is_kept():
    layer = SyncBatchNorm(64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        input = torch.randn(8, 64, 14, 14, requires_grad=True)
        layer(input)
    activations = [tensor for tensor in saved if tensor.numel() == input.numel()]
    assert len(activations) == 1
    assert activations[0].data_ptr() == input.data_ptr()  # the input itself, no copy and no x-hat
    assert sum(tensor.numel() for tensor in saved if tensor.numel() != input.numel()) <= 4 * 64 + 1


def test_a_fully_frozen_layer_keeps_no_activation():
    layer = SyncBatchNorm(64).freeze()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(8, 64, 14, 14, requires_grad=True))
    assert all(tensor.numel() <= 64 for tensor in saved)
