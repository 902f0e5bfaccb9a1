"""skip_nonfinite: a batch that is not finite leaves running statistics and counter bitwise as they were."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from syncbn import SyncBatchNorm, accumulate_stats, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.kernels import cuda, reference
from syncbn.kernels.step import Statistics
from syncbn.nn.functional import _move_if_finite
from syncbn.stats.precise_bn import precise_bn

GOOD = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 2


def spoiled(value=float("nan")):
    batch = GOOD[0].clone()
    batch[1, 2, 0, 0] = value
    return batch


def check_equal(layer, expected):
    torch.testing.assert_close(dict(layer.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def check_skips(make, bad, **arguments):
    """A layer that skips, and has seen good, bad and good, has the state of one that has seen good and good."""
    layer, plain = make(), make()
    if isinstance(layer, SyncBatchNorm):
        layer.skip_nonfinite = True
    layer(GOOD[0].to(bad.dtype)), plain(GOOD[0].to(bad.dtype))
    output = layer(bad, **arguments)
    check_equal(layer, plain)
    expected = copy.deepcopy(plain)(bad, **arguments)
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())
    layer(GOOD[1].to(bad.dtype)), plain(GOOD[1].to(bad.dtype))
    check_equal(layer, plain)


class CallsTheFunction(nn.BatchNorm2d):
    def forward(self, input):
        self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum
        )


LAYERS = {
    "plain": lambda: SyncBatchNorm(3),
    "fused": lambda: SyncBatchNorm(3, activation="relu"),
    "lean": lambda: SyncBatchNorm(3, memory="lean"),
    "cumulative": lambda: SyncBatchNorm(3, momentum=None),
    "no counter": lambda: _without_counter(SyncBatchNorm(3)),
    "subclass": lambda: convert_sync_batchnorm(CallsTheFunction(3)),
    "not affine": lambda: SyncBatchNorm(3, affine=False),
}


def _without_counter(layer):
    layer.num_batches_tracked = None
    return layer


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves_and_the_output_is_what_it_is(make, value):
    check_skips(make, spoiled(value))


def test_a_variance_that_the_type_of_the_statistics_cannot_hold_is_not_finite():
    check_skips(LAYERS["plain"], spoiled(1e25))  # its square is not below 3.4e38
    check_skips(lambda: SyncBatchNorm(3).double(), spoiled(float("-inf")).double())
    layer = SyncBatchNorm(3, skip_nonfinite=True).double()
    layer(spoiled(1e25).double())
    assert layer.num_batches_tracked == 1
    skipping, other = (SyncBatchNorm(3, skip_nonfinite=skip)(spoiled(1e25)) for skip in (True, False))
    assert other.isfinite().all()
    assert torch.equal(skipping, other)


def test_residuals_and_gradients_are_those_of_a_layer_without_it():
    results = []
    for skip in (True, False):
        layer = SyncBatchNorm(3, skip_nonfinite=skip)
        input, residual = GOOD[0].clone().requires_grad_(), GOOD[1].clone().requires_grad_()
        layer(input, residual=residual).pow(2).sum().backward()
        results.append((input.grad, residual.grad, layer.weight.grad, *layer.state_dict().values()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("absent", [True, False])
def test_with_a_mask_the_positions_that_count_decide(absent):
    layer = SyncBatchNorm(3, skip_nonfinite=True)
    mask = torch.ones(6, 1, 4, 4)
    mask[1, 0, 0, 0] = 0.0 if absent else 1.0
    layer(spoiled(), mask)
    assert layer.num_batches_tracked == int(absent)
    assert layer.running_mean.abs().min() > 0 if absent else layer.running_mean.abs().max() == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_micro_batches_that_are_not_finite_are_left_out_of_the_pool(momentum):
    layer, plain = SyncBatchNorm(3, momentum=momentum, skip_nonfinite=True), SyncBatchNorm(3, momentum=momentum)
    with accumulate_stats(layer), accumulate_stats(plain):
        for batch in (GOOD[0], spoiled(), GOOD[1]):
            layer(batch)
            plain(batch) if batch.isfinite().all() else None
    check_equal(layer, plain)
    with accumulate_stats(layer):
        layer(spoiled())
    check_equal(layer, plain)
    precise_bn(layer, [GOOD[0], spoiled()])
    precise_bn(plain, [GOOD[0]])
    check_equal(layer, plain)


def selectively(function, *arguments, **options):
    def policy(context, operator, *args, **kwargs):
        keep = any(name in str(operator) for name in ("syncbn", "isfinite", "where", "zeros"))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(function, *arguments, context_fn=lambda: create_selective_checkpoint_contexts(policy), **options)


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_under_checkpointing(reentrant):
    model = nn.Sequential(SyncBatchNorm(3, skip_nonfinite=True), nn.Conv2d(3, 3, 1), SyncBatchNorm(3)).double()
    expected = copy.deepcopy(model)
    apply = selectively if reentrant is None else checkpoint
    for batch in (GOOD[0], spoiled(), GOOD[1]):
        grads = []
        for net, run in ((model, apply), (expected, lambda net, x, **_: net(x))):
            net.zero_grad()
            x = batch.double().requires_grad_()
            run(net, x, use_reentrant=bool(reentrant)).pow(2).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, equal_nan=True)
    torch.testing.assert_close(dict(model[0].state_dict()), dict(expected[0].state_dict()))
    assert model[0].num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_into_one_graph_without_waiting_for_the_device(momentum):
    torch._dynamo.reset()
    layer = SyncBatchNorm(3, momentum=momentum, skip_nonfinite=True)
    plain = SyncBatchNorm(3, momentum=momentum)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # a read of a value would break the graph
    for batch in (GOOD[0], spoiled(), GOOD[1]):
        compiled(batch)
        plain(batch) if batch.isfinite().all() else None
    torch.testing.assert_close(dict(layer.state_dict()), dict(plain.state_dict()))


def check_one_bad_rank():
    rank = dist.get_rank()
    layer = SyncBatchNorm(3, skip_nonfinite=True)
    layer(GOOD[rank])
    before = copy.deepcopy(layer)
    layer(spoiled() if rank == 1 else GOOD[0])
    check_equal(layer, before)
    layer(GOOD[1 - rank])
    assert layer.num_batches_tracked == 2


def test_a_batch_that_is_spoiled_on_one_rank_moves_nothing_on_any(ranks):
    ranks(2, check_one_bad_rank)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("num_channels", [3, 300])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("is_bad", [True, False])
def test_the_triton_programs_do_what_the_reference_does(num_channels, momentum, is_bad):
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    input = torch.randn(7, num_channels, device=device, dtype=torch.float64) + 1
    if is_bad:
        input[3, 1] = float("nan")
    results = []
    for kernels in (cuda, reference):
        buffers = [torch.full((num_channels,), value, device=device) for value in (0.5, 2.0)]
        statistics = Statistics(*buffers, torch.tensor(4, device=device), momentum, 1e-5)
        _move_if_finite(reference.moments(input), statistics, None, torch.float32, kernels)
        results.append(statistics[:3])
    torch.testing.assert_close(*results, rtol=2e-7, atol=1e-12)
    assert int(results[0][2]) == (4 if is_bad else 5)
    assert bool((results[0][0] == 0.5).all()) == is_bad


def test_it_is_kept_by_conversion_copies_and_pickles_and_dropped_at_revert():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), CallsTheFunction(3)), skip_nonfinite=True)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [layer.skip_nonfinite for layer in one] == [True, True]
    assert "skip_nonfinite=True" in repr(model[0])
    assert "skip_nonfinite" not in repr(SyncBatchNorm(3))
    before = convert_sync_batchnorm(revert_sync_batchnorm(model))
    assert [layer.skip_nonfinite for layer in before] == [False, False]
