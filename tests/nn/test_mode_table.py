"""Every row of the table of modes, for every kind of affine: what normalizes, what moves, what communicates."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm
from tests.reference import build, make_batch, max_error, set_affine

AFFINE = {"weight and bias": {}, "weight alone": {"bias": False}, "neither": {"affine": False}}
ROWS = [
    # training, track_running_stats, stats frozen -> normalizes with, moves
    (True, True, False, "global batch", True),
    (True, False, False, "global batch", False),
    (False, True, False, "running", False),
    (False, True, True, "running", False),
    (False, False, False, "local batch", False),
    (True, True, True, "running", False),
]


def check_row(training, tracked, frozen, source, moves, affine):
    rank = dist.get_rank()
    input = make_batch((7, 3, 4, 2), mean=2.0)[0]
    mine = input.split([2, 5])[rank]
    layer = SyncBatchNorm(3, track_running_stats=tracked, dtype=torch.float64, **affine)
    if tracked:
        layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))
    if layer.weight is not None:
        set_affine(layer)
    layer.train(training)
    if frozen:
        layer.freeze(affine=False)
    before = copy.deepcopy(layer.state_dict())
    batch = {"global batch": input, "local batch": mine}.get(source)
    plain = build(nn.BatchNorm2d, 3, track_running_stats=tracked, dtype=torch.float64, **affine)
    plain.train(batch is not None)
    plain.load_state_dict(before)
    expected = plain(mine if batch is None else batch)
    expected = expected.split([2, 5])[rank] if source == "global batch" else expected
    assert max_error(layer(mine), expected) < 1e-12
    after = layer.state_dict()
    if moves:
        assert all(max_error(after[key], plain.state_dict()[key].double()) < 1e-12 for key in after)
    else:
        assert all(torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"train={row[0]} track={row[1]} frozen={row[2]}")
def test_each_row_of_the_table(ranks, row, affine):
    ranks(2, check_row, *row, AFFINE[affine])


def check_cumulative_average():
    rank = dist.get_rank()
    layer, plain = (kind(3, momentum=None, dtype=torch.float64) for kind in (SyncBatchNorm, nn.BatchNorm1d))
    for seed, sizes in enumerate([(3, 4), (7, 0), (1, 6)]):
        input = make_batch((7, 3), seed=seed)[0]
        plain(input)
        layer(input.split(sizes)[rank])
        assert layer.num_batches_tracked == plain.num_batches_tracked
        assert max_error(layer.running_mean, plain.running_mean) < 1e-14
        assert max_error(layer.running_var, plain.running_var) < 1e-14


def test_momentum_none_averages_over_batches(ranks):
    ranks(2, check_cumulative_average)


def check_skipped_batches_do_not_count():
    layer = SyncBatchNorm(3, momentum=None, dtype=torch.float64)
    layer(torch.empty(0, 3, dtype=torch.float64))
    assert layer.num_batches_tracked == 0
    input = make_batch((6, 3))[0]
    layer(input.chunk(2)[dist.get_rank()])
    assert max_error(layer.running_mean, input.mean(0)) < 1e-14  # the first batch that counts has all the weight


def test_a_globally_empty_batch_has_no_weight_in_the_cumulative_average(ranks):
    ranks(2, check_skipped_batches_do_not_count)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize(
    ("affine", "tracked"), list(itertools.product(AFFINE.values(), [True, False])), ids=lambda value: str(value)
)
def test_state_dicts_load_both_ways(kind, affine, tracked):
    theirs = build(kind, 4, track_running_stats=tracked, **affine)
    ours = SyncBatchNorm(4, track_running_stats=tracked, **affine)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((theirs, ours), (ours, theirs)):
        for value in source.state_dict().values():
            value.copy_(torch.arange(value.numel()).view(value.shape) + 1)
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(torch.equal(target.state_dict()[key], value) for key, value in source.state_dict().items())


def test_a_state_dict_from_before_the_counter_existed_loads():
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata.clear()
    layer = SyncBatchNorm(3)
    set_affine(layer)
    layer.load_state_dict(old, strict=True)
    assert torch.equal(layer.weight, torch.ones(3))
    assert layer.num_batches_tracked == 0


def test_reset_and_meta_device():
    layer = SyncBatchNorm(3, device="meta", dtype=torch.bfloat16)
    assert layer.running_mean.is_meta
    assert layer.weight.dtype == torch.bfloat16
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.running_var, torch.ones(3, dtype=torch.bfloat16))
