"""Sub-groups of ranks, and one set of running statistics out of several."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, new_bn_groups
from syncbn.nn.groups import new_world_group, timeout_of
from syncbn.stats.pooling import pool_running_stats, unsynchronized_layers
from tests.reference import expected_step, make_batch, max_error, run_step


def check_groups(size, expected):
    group = new_bn_groups(size)
    members = list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)
    assert members == next(part for part in expected if dist.get_rank() in part)
    input, grad = make_batch((8, 2, 3))
    shards = [torch.arange(8).chunk(dist.get_world_size())[rank] for rank in members]
    whole = torch.cat(shards)
    mine = torch.arange(8).chunk(dist.get_world_size())[dist.get_rank()]
    layer = SyncBatchNorm(2, affine=False, process_group=group, dtype=torch.float64)
    actual = run_step(layer, input[mine], grad[mine])
    reference = expected_step(input[whole], grad[whole], affine=False)
    position = members.index(dist.get_rank())
    assert max_error(actual.output, reference.output.chunk(len(members))[position]) < 1e-12
    assert max_error(actual.grad_input, reference.grad_input.chunk(len(members))[position]) < 1e-12


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]]), (4, [[0, 1, 2, 3]])],
)
def test_groups_of_neighbouring_ranks(ranks, size, expected):
    ranks(4, check_groups, size, expected)


def check_nodes():
    os.environ["GROUP_RANK"] = "0" if dist.get_rank() < 1 else "1"  # torchrun's number of the machine
    try:
        check_groups("node", [[0], [1, 2]])
    finally:
        del os.environ["GROUP_RANK"]


def test_a_group_for_each_node_even_where_nodes_differ_in_size(ranks):
    ranks(3, check_nodes)


def check_one_node():
    assert new_bn_groups("node") is None  # all on this machine: the world


def test_a_single_node_is_the_world(ranks):
    ranks(2, check_one_node)


def check_bad_sizes():
    with pytest.raises(ValueError, match="size: expected a divisor of the world size 3, got 2"):
        new_bn_groups(2)


def test_a_size_that_does_not_divide_the_world_is_an_error_on_every_rank(ranks):
    ranks(3, check_bad_sizes)


@pytest.mark.parametrize("size", [0, -1, "rack", 1.5, True])
def test_sizes_that_make_no_sense_are_errors(size):
    with pytest.raises(ValueError, match="size: expected a number of ranks"):
        new_bn_groups(size)


def test_without_a_job_there_is_no_group():
    assert new_bn_groups(2) is None


def check_pooling(weights):
    """Pooled statistics are those of the union of what the ranks saw, the spread of their means included."""
    rank = dist.get_rank()
    samples = [make_batch((size, 3), mean=1000.0 + 5 * number, seed=number)[0] for number, size in enumerate(weights)]
    layer = SyncBatchNorm(3, momentum=1.0, dtype=torch.float64)
    if weights[rank]:
        layer.running_mean.copy_(samples[rank].mean(0))
        layer.running_var.copy_(samples[rank].var(0, correction=0))
    union = torch.cat(samples)
    pool_running_stats([layer, nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU()], weights[rank])
    assert max_error(layer.running_mean, union.mean(0)) < 1e-10
    assert max_error(layer.running_var, union.var(0, correction=0)) < 1e-10
    gathered = [torch.empty_like(layer.running_var) for _ in weights]
    dist.all_gather(gathered, layer.running_var)
    assert all(torch.equal(other, gathered[0]) for other in gathered)  # the same bits everywhere


@pytest.mark.parametrize("weights", [(4, 4), (1, 7), (0, 5, 3)], ids=str)
def test_pooling_weights_by_samples_and_keeps_the_spread_of_the_means(ranks, weights):
    """mmengine and timm average the variances, which loses the spread."""
    ranks(len(weights), check_pooling, weights)


def check_nothing_to_pool():
    layer = nn.BatchNorm1d(3)
    before = layer.running_mean.fill_(dist.get_rank()).clone()
    pool_running_stats([layer], 0)
    assert torch.equal(layer.running_mean, before)


def test_ranks_that_have_seen_nothing_keep_what_they_have(ranks):
    ranks(2, check_nothing_to_pool)


def check_unsynchronized():
    alone, both = new_bn_groups(1), dist.new_group([0, 1])
    model = nn.Sequential(
        nn.BatchNorm1d(2),
        SyncBatchNorm(2),
        SyncBatchNorm(2, process_group=both),
        SyncBatchNorm(2, process_group=alone),
        SyncBatchNorm(2, process_group=alone).freeze(),
    )
    assert [layer is model[0] or layer is model[3] for layer in unsynchronized_layers(model)] == [True, True]


def test_layers_that_agree_anyway_or_are_frozen_are_left_alone(ranks):
    ranks(2, check_unsynchronized)


def check_own_group(size_of_others):
    own, others = new_world_group(), new_bn_groups(size_of_others)
    assert own is not None
    assert own is not dist.group.WORLD
    assert dist.get_process_group_ranks(own) == list(range(dist.get_world_size()))
    world_timeout = timeout_of(dist.group.WORLD)
    assert world_timeout is not None
    assert all(timeout_of(group) == world_timeout for group in (own, others) if group is not None)
    rank = dist.get_rank()
    input, grad = (tensor.chunk(dist.get_world_size())[rank] for tensor in make_batch((8, 2, 3)))
    steps = [
        run_step(SyncBatchNorm(2, process_group=group, dtype=torch.float64), input, grad)
        for group in (None, own, others, own)  # one after the other: their collectives do not meet
    ]
    for step in (steps[1], steps[3]):
        assert torch.equal(step.output, steps[0].output)
        assert torch.equal(step.grad_input, steps[0].grad_input)
        assert torch.equal(step.running_var, steps[0].running_var)
    assert unsynchronized_layers(nn.Sequential(SyncBatchNorm(2, process_group=own))) == []


@pytest.mark.parametrize(("world_size", "size_of_others"), [(2, 1), (2, 2), (4, 2)])
def test_a_group_of_all_ranks_for_batch_normalization_alone(ranks, world_size, size_of_others):
    ranks(world_size, check_own_group, size_of_others)


def test_a_single_process_needs_no_group_of_its_own():
    assert new_world_group() is None
