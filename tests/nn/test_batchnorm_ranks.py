"""The layer on several ranks against float64 `nn.BatchNorm` of one process on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist

from syncbn import SyncBatchNorm
from tests.counting import collectives
from tests.reference import expected_step, make_batch, max_error, run_step, set_affine

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check_matches_one_process(sizes, dtype, options):
    rank = dist.get_rank()
    input, grad = (tensor.to(dtype) for tensor in make_batch((sum(sizes), 5, 4, 3), mean=3.0, std=2.0))
    expected = expected_step(input, grad, **options)
    layer = SyncBatchNorm(5, dtype=dtype, **options)
    if layer.weight is not None:
        set_affine(layer)
    actual = run_step(layer, input.split(sizes)[rank], grad.split(sizes)[rank])

    tolerance = TOLERANCE[dtype]
    assert max_error(actual.output, expected.output.split(sizes)[rank]) < tolerance
    assert max_error(actual.grad_input, expected.grad_input.split(sizes)[rank]) < tolerance
    for name in ("grad_weight", "grad_bias"):  # local on each rank: DDP averages them
        local = getattr(actual, name)
        if local is None:
            assert getattr(expected, name) is None
            continue
        total = local.to(torch.float64)
        dist.all_reduce(total)
        assert max_error(total, getattr(expected, name)) < tolerance
    if layer.track_running_stats:
        assert max_error(actual.running_mean, expected.running_mean) < tolerance
        assert max_error(actual.running_var, expected.running_var) < tolerance
        assert actual.num_batches_tracked == expected.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(1, 7), (7, 1), (8, 0), (1, 7, 0), (0, 0, 8), (2, 2, 2, 2)], ids=str)
def test_uneven_and_empty_shards_equal_the_concatenated_batch(ranks, sizes, dtype):
    ranks(len(sizes), check_matches_one_process, sizes, dtype, {})


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}],
    ids=str,
)
def test_every_option_equals_the_concatenated_batch(ranks, options):
    ranks(2, check_matches_one_process, (1, 7), torch.float64, options)


def check_collectives(training, tracked, stats_frozen, needs_grad, expected):
    layer = SyncBatchNorm(3, track_running_stats=tracked).train(training)
    if stats_frozen:
        layer.freeze(affine=False)
    with collectives() as counts:
        input = torch.randn(4, 3, 2, 2, requires_grad=needs_grad)
        output = layer(input)
        forward = list(counts)
        output.sum().backward()
    assert (forward, counts[len(forward) :]) == expected


FORWARD, BACKWARD = [(4 * 3 + 1, torch.float64)], [(2 * 3, torch.float64)]


@pytest.mark.parametrize(
    ("training", "tracked", "stats_frozen", "needs_grad", "expected"),
    [
        (True, True, False, True, (FORWARD, BACKWARD)),
        (True, False, False, True, (FORWARD, BACKWARD)),
        (True, True, False, False, (FORWARD, [])),
        (False, True, False, True, ([], [])),
        (False, False, False, True, ([], [])),
        (True, True, True, True, ([], [])),
        (False, True, True, True, ([], [])),
    ],
)
def test_one_collective_each_way_in_training_and_none_otherwise(
    ranks, training, tracked, stats_frozen, needs_grad, expected
):
    ranks(2, check_collectives, training, tracked, stats_frozen, needs_grad, expected)


def check_globally_empty_batch():
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3, 2) * 3 + 1)  # so that statistics that decay would show
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    input = torch.empty(0, 3, 4, 4, requires_grad=True)
    layer(input).sum().backward()
    assert input.grad.shape == (0, 3, 4, 4)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer.weight.grad, torch.zeros(3))


def test_a_batch_without_samples_on_any_rank_moves_nothing(ranks):
    ranks(2, check_globally_empty_batch)


def check_single_value():
    layer = SyncBatchNorm(3)
    set_affine(layer)
    input = torch.full((1 if dist.get_rank() == 0 else 0, 3), 5.0, requires_grad=True)
    output = layer(input)
    output.sum().backward()
    assert torch.equal(output, layer.bias.expand_as(output))
    assert torch.equal(input.grad, torch.zeros_like(input))
    assert torch.allclose(layer.running_mean, torch.full((3,), 0.5))
    assert torch.equal(layer.running_var, torch.ones(3))


def test_one_value_per_channel_in_the_world_gives_the_bias_and_keeps_the_variance(ranks):
    ranks(2, check_single_value)


def check_outsider():
    group = dist.new_group([0])
    layer = SyncBatchNorm(3, process_group=group)
    if dist.get_rank() == 0:
        assert layer(torch.randn(4, 3)).shape == (4, 3)
    else:
        with pytest.raises(RuntimeError, match="rank 1 is not a member of the process group"):
            layer(torch.randn(4, 3))


def test_a_rank_outside_the_group_gets_an_error_and_no_hang(ranks):
    ranks(2, check_outsider)


def check_sub_groups():
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    input, grad = make_batch((8, 2, 3))
    pair = slice(0, 4) if rank < 2 else slice(4, 8)
    expected = expected_step(input[pair], grad[pair], affine=False)
    layer = SyncBatchNorm(2, affine=False, process_group=groups[rank // 2], dtype=torch.float64)
    actual = run_step(layer, input.split(2)[rank], grad.split(2)[rank])
    assert max_error(actual.output, expected.output.split(2)[rank % 2]) < 1e-10
    assert max_error(actual.running_var, expected.running_var) < 1e-10


def test_statistics_are_those_of_the_sub_group(ranks):
    ranks(4, check_sub_groups)
