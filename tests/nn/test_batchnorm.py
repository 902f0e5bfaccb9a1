"""The layer in one process: modes, switches, state, and what it rejects."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import SyncBatchNorm, sync_batch_norm
from tests.reference import PLAIN, expected_step, make_batch, max_error, run_step, set_affine


def test_is_a_batch_norm_but_not_torchs_synchronized_one():
    layer = SyncBatchNorm(3)
    assert isinstance(layer, _BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 5), (6, 3, 2, 3, 4)], ids=str)
def test_equals_batch_norm_in_one_process(shape):
    input, grad = make_batch(shape)
    expected = expected_step(input, grad)
    layer = SyncBatchNorm(3, dtype=torch.float64)
    set_affine(layer)
    actual = run_step(layer, input, grad)
    for name in ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"):
        assert max_error(getattr(actual, name), getattr(expected, name)) < 1e-12, name


def test_evaluation_normalizes_with_running_statistics_and_moves_nothing():
    layer = SyncBatchNorm(3, dtype=torch.float64)
    set_affine(layer)
    layer(make_batch((8, 3, 4))[0])
    plain = nn.BatchNorm1d(3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    before = copy.deepcopy(layer.state_dict())
    input = make_batch((5, 3, 4), seed=7)[0]
    assert max_error(layer.eval()(input), plain.eval()(input)) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_evaluation_without_running_statistics_uses_the_local_batch():
    input = make_batch((8, 3, 4))[0]
    layer = SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64).eval()
    plain = nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64).eval()
    assert max_error(layer(input), plain(input)) < 1e-12


@pytest.mark.parametrize("dims", [2, 4, 5])
def test_state_dict_is_key_for_key_that_of_batch_norm(dims):
    layer, plain = SyncBatchNorm(4), PLAIN[dims](4)
    assert list(layer.state_dict()) == list(plain.state_dict())
    set_affine(plain)
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, plain.weight)


def test_frozen_statistics_normalize_in_training_and_do_not_move_by_a_bit():
    layer = SyncBatchNorm(3)
    layer(torch.randn(8, 3, 4))
    layer.freeze(affine=False)
    before = copy.deepcopy(layer.state_dict())
    input = torch.randn(5, 3, 4) + 3.0
    in_training = layer.train()(input)
    assert torch.equal(in_training, layer.eval()(input))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_frozen_affine_gets_no_gradient_and_comes_back_as_it_was():
    layer = SyncBatchNorm(3)
    layer.bias.requires_grad_(False)
    layer(torch.randn(4, 3)).sum().backward()
    layer.freeze(stats=False)
    assert layer.affine_frozen
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    layer.unfreeze()
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad  # as it was before


def test_frozen_switches_survive_train_and_deepcopy_and_show_in_the_repr():
    layer = copy.deepcopy(SyncBatchNorm(3).freeze()).train()
    assert layer.stats_frozen
    assert layer.affine_frozen
    assert "frozen=stats+affine" in repr(layer)
    assert "frozen" not in repr(layer.unfreeze())


def test_freezing_statistics_that_do_not_exist_is_an_error():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        SyncBatchNorm(3, track_running_stats=False).freeze()


def test_momentum_none_is_the_cumulative_average():
    layer = SyncBatchNorm(2, momentum=None, dtype=torch.float64)
    batches = [make_batch((6, 2), seed=seed)[0] for seed in range(3)]
    for batch in batches:
        layer(batch)
    assert max_error(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0)) < 1e-14
    assert max_error(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0)) < 1e-14
    assert layer.num_batches_tracked == 3


def test_a_cumulative_average_without_a_counter_stays_as_torchs_does():
    layer, plain = SyncBatchNorm(2, momentum=None), nn.BatchNorm1d(2, momentum=None)
    for one in (layer, plain):
        one.num_batches_tracked = None
        one(torch.randn(4, 2))
        assert torch.equal(one.running_mean, torch.zeros(2))


def test_residual_and_activation_follow_the_normalization():
    input, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    layer = SyncBatchNorm(3, activation="relu")
    expected = torch.relu(SyncBatchNorm(3)(input) + residual)
    assert torch.equal(layer(input, residual=residual), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SyncBatchNorm(3)(torch.randn(3)), ValueError, "at least 2D input"),
        (lambda: SyncBatchNorm(3)(torch.randn(4, 5)), RuntimeError, "expected 3 channels .* got 5"),
        (lambda: SyncBatchNorm(3)(torch.ones(4, 3, dtype=torch.int64)), RuntimeError, "floating type, got torch.int64"),
        (lambda: SyncBatchNorm(3)(torch.randn(1, 3)), ValueError, "more than 1 value per channel"),
        (lambda: SyncBatchNorm(3, activation="tanh"), ValueError, "one of relu, leaky_relu, silu, got 'tanh'"),
        (lambda: SyncBatchNorm(3)(torch.randn(4, 3), residual=torch.randn(2, 3)), ValueError, r"residual: .*\(4, 3\)"),
        (lambda: sync_batch_norm(torch.randn(4, 3), None, None), ValueError, "Expected running_mean and running_var"),
        (
            lambda: sync_batch_norm(torch.randn(4, 3), torch.zeros(2), torch.ones(2)),
            RuntimeError,
            "running_mean should",
        ),
        (lambda: sync_batch_norm(torch.randn(4, 3), torch.zeros(3), None), ValueError, "both or neither"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_expected_and_what_came(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_second_derivatives_are_exact():
    input = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def normalize(input, weight, bias):
        return sync_batch_norm(input, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(normalize, (input, weight, bias))
    assert torch.autograd.gradgradcheck(normalize, (input, weight, bias))


def test_a_gradient_that_can_be_differentiated_again_is_the_same_gradient():
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4), (2,), (2,))]
    output = sync_batch_norm(leaves[0], None, None, *leaves[1:], training=True).exp().sum()
    once = torch.autograd.grad(output, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, leaves, create_graph=True), once)
