"""accumulate_stats: micro-batches move the running statistics once, as their concatenation would."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, accumulate_stats, convert_sync_batchnorm, freeze, revert_sync_batchnorm
from tests.reference import make_batch


def buffers_after_one_forward(batch, **options):
    layer = nn.BatchNorm2d(batch.size(1), dtype=torch.float64, **options)
    layer.running_mean.fill_(0.3)
    layer(batch)
    return layer


def check_equal(layer, expected):
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-10)


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
       momentum=st.sampled_from([0.1, 1.0, None]))  # fmt: skip
def test_the_buffers_are_those_of_one_forward_of_the_whole(sizes, momentum):
    batch, _ = make_batch((sum(sizes), 3, 4, 4), mean=50.0)
    layer = SyncBatchNorm(3, momentum=momentum).double()
    layer.running_mean.fill_(0.3)
    with accumulate_stats(layer):
        for part in batch.split(sizes):
            layer(part)
        assert layer.num_batches_tracked == 0  # not yet
    check_equal(layer, buffers_after_one_forward(batch, momentum=momentum))


def check_over_ranks(checkpointed):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch, _ = make_batch((12, 3, 4, 4), mean=5.0)
    layer = SyncBatchNorm(3).double()
    layer.running_mean.fill_(0.3)
    with accumulate_stats(nn.Sequential(layer)):
        for micro_batch in batch.split([5, 1, 6]):  # of the middle one most ranks get nothing
            shard = micro_batch.tensor_split(world_size)[rank].requires_grad_()
            output = checkpoint(layer, shard, use_reentrant=False) if checkpointed else layer(shard)
            output.sum().backward()
    check_equal(layer, buffers_after_one_forward(batch))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_over_ranks_and_under_checkpointing(ranks, world_size, checkpointed):
    ranks(world_size, check_over_ranks, checkpointed)


def test_each_micro_batch_is_still_normalized_by_its_own_statistics():
    layer = SyncBatchNorm(3).double()
    batch, _ = make_batch((6, 3, 4, 4))
    with accumulate_stats(layer):
        outputs = [layer(part) for part in batch.split(2)]
    for output, part in zip(outputs, batch.split(2), strict=True):
        torch.testing.assert_close(output, nn.BatchNorm2d(3, dtype=torch.float64)(part))


def test_an_exception_leaves_the_buffers_and_a_second_context_is_refused():
    layer = SyncBatchNorm(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ZeroDivisionError), accumulate_stats(layer):
        layer(torch.randn(4, 3)) / (1 / 0)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
    with accumulate_stats(layer), pytest.raises(RuntimeError, match="open already"), accumulate_stats(layer):
        pass
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1  # and all is as usual afterwards


def test_what_does_not_take_part():
    model = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3, track_running_stats=False), SyncBatchNorm(3))
    freeze(model, "2")
    before = model[2].running_mean.clone()
    with accumulate_stats(model):
        model(torch.randn(4, 3))
    assert model[0].num_batches_tracked == 1
    assert torch.equal(model[2].running_mean, before)
    with accumulate_stats(model):
        pass  # without a batch nothing moves
    assert model[0].num_batches_tracked == 1


def test_copies_reverts_and_freezes_inside_of_the_context():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    with accumulate_stats(model):
        model(torch.randn(4, 3))
        copied = copy.deepcopy(model)
        freeze(model, "1")
        revert_sync_batchnorm(model[2])
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 0, 0]
    assert model[1].running_mean.abs().max() == 0
    copied(torch.randn(4, 3))  # a copy is a layer like any other
    assert [int(layer.num_batches_tracked) for layer in copied] == [1, 1, 1]
    assert not any("_pool" in layer.__dict__ for layer in (*model, *copied))


def test_buffers_that_functional_call_brings_are_the_ones_that_move():
    layer = SyncBatchNorm(3)
    own = {name: value.clone() for name, value in layer.state_dict().items()}
    brought = {name: value.clone() for name, value in own.items()}
    with accumulate_stats(layer):
        torch.func.functional_call(layer, brought, (1 + torch.randn(8, 3),))
    torch.testing.assert_close(dict(layer.state_dict()), own, rtol=0, atol=0)
    assert brought["running_mean"].abs().min() > 0


def test_a_subclass_that_calls_the_function_itself_takes_part():
    class Doubled(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
            )

    model = convert_sync_batchnorm(nn.Sequential(Doubled(3).double()))
    batch, _ = make_batch((6, 3, 4, 4))
    model[0].running_mean.fill_(0.3)
    with accumulate_stats(model):
        for part in batch.split(2):
            model(part)
    check_equal(model[0], buffers_after_one_forward(batch))
