"""What a monitor reads is what the layers hold, and what they saw on watched steps; unwatched steps cost nothing."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from syncbn import Monitor, SyncBatchNorm, accumulate_stats, convert_sync_batchnorm, freeze, new_bn_groups
from syncbn.nn import rank_checks
from tests.counting import collectives
from tests.reference import make_batch


def test_a_snapshot_holds_every_layer_by_name():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), SyncBatchNorm(3), nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    model(torch.randn(4, 1, 8, 8))
    snapshot = Monitor(model).snapshot()
    assert list(snapshot) == ["1", "2.0"]
    assert torch.equal(snapshot["1"].running_var, model[1].running_var.double())
    assert torch.equal(snapshot["1"].weight, model[1].weight.detach().double())
    assert snapshot["2.0"].weight is None
    assert snapshot["1"].batch_mean is None  # nobody has watched


def test_scalars_count_dead_channels_and_show_switches():
    layer = SyncBatchNorm(4).freeze(affine=False)
    with torch.no_grad():
        layer.weight[0] = 1e-4
        layer.running_var[1] = 0.0
    scalars = Monitor(nn.Sequential(layer)).snapshot()["0"].scalars()
    assert scalars["dead_channels"] == 0.5
    assert (scalars["stats_frozen"], scalars["affine_frozen"]) == (1.0, 0.0)


@pytest.mark.parametrize("make", [SyncBatchNorm, nn.BatchNorm2d])
def test_affine_is_frozen_where_it_gets_no_gradient_whoever_has_seen_to_that(make):
    layer = make(3)

    def is_frozen():
        return Monitor(layer).snapshot()[""].affine_frozen

    assert not is_frozen()
    layer.requires_grad_(False)
    assert is_frozen()
    layer.requires_grad_(True)
    freeze(layer, "*", stats=False)
    assert is_frozen()
    layer.requires_grad_(True)
    assert not is_frozen()


def test_a_lazy_layer_holds_nothing_until_it_has_seen_its_width():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    monitor = Monitor(model)
    assert monitor.snapshot()["0"].vectors() == {}
    with monitor.watch():
        model(torch.randn(4, 3, 2, 2))
    assert monitor.snapshot()["0"].running_mean.shape == (3,)


def test_a_layer_of_torch_may_be_given_its_input_by_name():
    layer = nn.BatchNorm2d(3)
    monitor = Monitor(layer)
    with monitor.watch():
        layer(input=torch.randn(4, 3, 2, 2))
    assert monitor.snapshot()[""].values_per_channel == 16


def test_a_model_without_batch_normalization_has_an_empty_snapshot():
    monitor = Monitor(nn.Linear(2, 2))
    with monitor.watch():
        pass
    assert monitor.snapshot() == {}


@pytest.mark.parametrize("make", [SyncBatchNorm, nn.BatchNorm2d])
def test_a_watched_step_shows_the_batch_and_how_far_it_is_from_the_running_statistics(make):
    layer = make(3).double()
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    batch, _ = make_batch((6, 3, 4, 4), mean=5.0)
    monitor = Monitor(nn.Sequential(layer))
    with monitor.watch():
        layer(batch)
    seen = monitor.snapshot()["0"]
    torch.testing.assert_close(seen.batch_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(seen.batch_var, batch.var((0, 2, 3), correction=0))
    torch.testing.assert_close(seen.drift, (batch.mean((0, 2, 3)) - 1.0).abs() / (4.0 + layer.eps) ** 0.5)
    assert seen.values_per_channel == 6 * 4 * 4
    assert seen.between_rank_share is None  # there is one rank
    assert "between_rank_share" not in seen.scalars()
    assert seen.scalars()["drift"] == pytest.approx(seen.drift.mean().item())


def shards_of(batch, sizes):
    return batch.split(sizes)[dist.get_rank()]


def between_share(batch, sizes):
    """By the definition: sum of n_r (mean_r - mean)^2 over sum of (x - mean)^2, per channel."""
    mean = batch.mean((0, 2, 3))
    parts = [part for part in batch.split(sizes) if len(part)]
    between = sum(part[:, 0].numel() * (part.mean((0, 2, 3)) - mean).square() for part in parts)
    return between / (batch - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))


def check_watched_over_ranks(sizes, mean):
    batch, _ = make_batch((sum(sizes), 3, 4, 4), mean=mean)
    batch[: sizes[0], 1] += 3.0  # one channel in which the ranks differ
    layer = SyncBatchNorm(3).double()
    monitor = Monitor(layer)
    with collectives() as sent, monitor.watch():
        layer(shards_of(batch, sizes))
    assert sent == [(5 * 3 + 1, torch.float64)]  # one collective, C numbers longer
    seen = monitor.snapshot()[""]
    torch.testing.assert_close(seen.batch_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(seen.batch_var, batch.var((0, 2, 3), correction=0))
    torch.testing.assert_close(seen.between_rank_share, between_share(batch, sizes), rtol=1e-6, atol=1e-9)
    assert seen.values_per_channel == batch[:, 0].numel()
    with collectives() as sent:
        layer(shards_of(batch, sizes))
    assert sent == [(4 * 3 + 1, torch.float64)]
    return seen.between_rank_share


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7), (6, 0), (3, 1, 4)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_variance_between_ranks_is_told_from_variance_within(ranks, sizes, mean):
    shares = ranks(len(sizes), check_watched_over_ranks, list(sizes), mean)
    assert all(torch.equal(share, shares[0]) for share in shares)  # the same bits


def check_same_result_watched_or_not():
    batch, grad = make_batch((5, 3, 4, 4))
    results = []
    for enabled in (False, True):
        layer, input = SyncBatchNorm(3), shards_of(batch, [3, 2]).float().requires_grad_()
        with Monitor(layer).watch(enabled):
            output = layer(input)
            (output * shards_of(grad, [3, 2]).float()).sum().backward()
        results.append((output, input.grad, layer.weight.grad, layer.running_mean, layer.running_var))
    for unwatched, watched in zip(*results, strict=True):
        assert torch.equal(unwatched, watched)


def test_watching_changes_no_bit_of_the_layer(ranks):
    ranks(2, check_same_result_watched_or_not)


def check_frozen_and_evaluated():
    model = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3), SyncBatchNorm(3)).double()
    freeze(model, "0")
    model[1].eval()
    batch, _ = make_batch((6, 3, 4, 4), mean=2.0)
    mine = shards_of(batch, [2, 4])
    monitor = Monitor(model)
    with collectives() as sent, monitor.watch():
        model(mine)
    assert len(sent) == 1  # of the third layer
    first, second, third = monitor.snapshot().values()
    torch.testing.assert_close(first.batch_mean, mine.mean((0, 2, 3)))  # this rank's alone
    torch.testing.assert_close(first.drift, mine.mean((0, 2, 3)).abs() / (1 + 1e-5) ** 0.5)
    assert first.values_per_channel is None
    assert first.between_rank_share is None
    assert second.batch_mean is not None
    assert third.values_per_channel == 6 * 16


def test_a_layer_that_normalizes_by_running_statistics_shows_what_this_rank_sees_and_sends_nothing(ranks):
    ranks(2, check_frozen_and_evaluated)


def check_sub_groups():
    group = new_bn_groups(2)
    layer = SyncBatchNorm(3, process_group=group).double()
    batch, _ = make_batch((8, 3, 2, 2))
    monitor = Monitor(layer)
    with monitor.watch():
        layer(shards_of(batch, [2] * 4))
    first = 4 * (dist.get_rank() // 2)
    mine = batch[first : first + 4]
    torch.testing.assert_close(monitor.snapshot()[""].between_rank_share, between_share(mine, [2, 2]))


def test_sub_groups_see_their_own_ranks(ranks):
    ranks(4, check_sub_groups)


def check_micro_batches():
    batch, _ = make_batch((8, 3, 4, 4))
    layer = SyncBatchNorm(3).double()
    monitor = Monitor(layer)
    with monitor.watch(), accumulate_stats(layer):
        for part in batch.split([5, 3]):
            layer(part.tensor_split(2)[dist.get_rank()])
    seen = monitor.snapshot()[""]
    torch.testing.assert_close(seen.batch_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(seen.batch_var, batch.var((0, 2, 3), correction=0))
    assert seen.values_per_channel == 8 * 16 / 2  # what one normalization has
    assert ((seen.between_rank_share >= 0) & (seen.between_rank_share <= 1)).all()


def test_micro_batches_are_pooled(ranks):
    ranks(2, check_micro_batches)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_once(use_reentrant):
    layer = SyncBatchNorm(3).double()
    batch, _ = make_batch((6, 3, 4, 4))
    monitor = Monitor(layer)
    with monitor.watch():
        checkpoint(layer, batch.requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert monitor.snapshot()[""].values_per_channel == 6 * 16


def test_what_is_masked_is_not_seen():
    layer = SyncBatchNorm(3).double()
    batch, _ = make_batch((6, 3, 4, 4))
    mask = torch.zeros(6, 1, 4, 4, dtype=torch.bool)
    mask[:4] = True
    monitor = Monitor(layer)
    for layer_frozen in (False, True):
        if layer_frozen:
            layer.freeze()
        with monitor.watch():
            layer(batch, mask)
        torch.testing.assert_close(monitor.snapshot()[""].batch_mean, batch[:4].mean((0, 2, 3)))


def test_a_subclass_of_a_peer_and_a_layer_in_two_places():
    class Doubled(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    shared = Doubled(3)
    model = convert_sync_batchnorm(nn.Sequential(shared, nn.ReLU(), shared))
    monitor = Monitor(model)
    with monitor.watch():
        model(torch.randn(4, 3, 2, 2))
    assert list(monitor.snapshot()) == ["0"]
    assert monitor.snapshot()["0"].values_per_channel == 16  # of each of its two calls


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def operators_of_a_step(model, batch):
    saved = []
    with (
        Operators() as counted,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t),
    ):
        model(batch).sum().backward()
    return counted.called, saved


def test_without_watching_a_step_calls_the_same_operators_and_keeps_the_same_tensors():
    batch = torch.randn(4, 3, 4, 4)
    plain, monitored = nn.Sequential(SyncBatchNorm(3)), nn.Sequential(SyncBatchNorm(3))
    monitor = Monitor(monitored)
    for enabled in (True, False):  # also after a watched step
        with monitor.watch(enabled):
            monitored(batch)
    plain(batch)
    assert operators_of_a_step(monitored, batch) == operators_of_a_step(plain, batch)
    assert vars(monitored[0]).keys() == vars(plain[0]).keys()


def test_a_snapshot_is_one_copy_to_the_host():
    model = nn.Sequential(SyncBatchNorm(3), nn.Conv2d(3, 5, 1), SyncBatchNorm(5)).to(torch.bfloat16)
    monitor = Monitor(model)
    with monitor.watch():
        model(torch.randn(4, 3, 4, 4, dtype=torch.bfloat16))
    with Operators() as counted:
        monitor.snapshot()
    gathered = [call for call in counted.called if call is torch.ops.aten.cat.default]
    assert len(gathered) == 1


def test_an_exception_a_copy_and_a_second_monitor():
    model = nn.Sequential(SyncBatchNorm(3))
    monitor = Monitor(model)
    with pytest.raises(ZeroDivisionError), monitor.watch():  # noqa: PT012
        copies = [copy.deepcopy(model), copy.copy(model[0]), pickle.loads(pickle.dumps(model))]
        with pytest.raises(RuntimeError, match="watches this model already"), Monitor(model).watch():
            pass
        model(torch.randn(4, 3))
        1 / 0  # noqa: B018
    assert not any("_record" in module.__dict__ for module in [model[0], *copies])
    assert monitor.snapshot()["0"].values_per_channel == 4


def check_compiled(backend):
    torch._dynamo.reset()
    layer = SyncBatchNorm(3)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    monitor = Monitor(layer)
    batch, _ = make_batch((6, 3, 4, 4))
    for enabled in (False, True, False, True):
        with monitor.watch(enabled):
            compiled(shards_of(batch, [2, 4]).float())
    seen = monitor.snapshot()[""]
    torch.testing.assert_close(seen.batch_mean, batch.float().double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.between_rank_share, between_share(batch, [2, 4]), rtol=1e-4, atol=1e-5)
    assert seen.values_per_channel == 6 * 16


def test_a_compiled_layer_can_be_watched(ranks):
    ranks(2, check_compiled, "aot_eager")


def check_one_rank_watches_alone():
    layer, alone = SyncBatchNorm(3), dist.get_rank() == 0
    rank_checks.enabled = True
    try:
        with pytest.raises(rank_checks.CollectiveError, match="watched forward pass"), Monitor(layer).watch(alone):
            layer(torch.randn(4, 3))
    finally:
        rank_checks.enabled = False


def test_debug_mode_names_a_rank_that_watches_alone(ranks):
    ranks(2, check_one_rank_watches_alone)
