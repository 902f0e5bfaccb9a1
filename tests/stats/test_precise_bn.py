"""precise_bn: the statistics of the population, the same on every rank, and nothing else changed."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm, freeze, new_bn_groups, precise_bn
from tests.reference import make_batch


def network(kind=SyncBatchNorm):
    torch.manual_seed(0)
    return nn.Sequential(kind(3), nn.Dropout(0.5), nn.Conv2d(3, 4, 1), kind(4)).double()


def population(batches):
    """What is right: float64, every layer normalizing batch by batch, moments over all samples."""
    net = network(nn.BatchNorm2d)
    seen = {0: [], 3: []}
    for batch in batches:
        x = batch
        for number, part in enumerate(net):
            if number in seen:
                seen[number].append(x)
                x = nn.functional.batch_norm(x, None, None, part.weight, part.bias, True)
            elif not isinstance(part, nn.Dropout):
                x = part(x)
    whole = {number: torch.cat(inputs) for number, inputs in seen.items()}
    return {number: (x.mean((0, 2, 3)), x.var((0, 2, 3))) for number, x in whole.items()}


def check_equal(net, expected):
    for number, (mean, var) in expected.items():
        torch.testing.assert_close(net[number].running_mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(net[number].running_var, var, rtol=1e-10, atol=1e-10)


def test_in_one_process_and_nothing_else_moves():
    net = network()
    net[0].eval()
    batch, _ = make_batch((20, 3, 4, 4), mean=5.0)
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    pointers = [buffer.data_ptr() for buffer in net.buffers()]
    precise_bn(net, [(part, "a label") for part in batch.split([8, 7, 5])])
    check_equal(net, population(batch.split([8, 7, 5])))
    assert [module.training for module in net.modules()] == modes
    assert [buffer.data_ptr() for buffer in net.buffers()] == pointers  # in place
    for name, value in net.state_dict().items():
        if "running" not in name:
            assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in net.parameters())


def check_over_ranks(kind, wrap, group):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net = network(kind)
    if group:
        for number in (0, 3):
            net[number].process_group = new_bn_groups(group)
    batch, _ = make_batch((24, 3, 4, 4), mean=5.0)
    # Global batches of 8; the last ones are cut such that ranks have different numbers of batches.
    shards = [part.tensor_split(world_size)[rank] for part in batch.split(8)]
    precise_bn(DistributedDataParallel(net) if wrap else net, shards[: 3 if rank == 0 else 2])
    expected = [*batch.split(8)[:2], batch.split(8)[2].tensor_split(world_size)[0]]
    if kind is SyncBatchNorm and not group:
        check_equal(net, population(expected))
    else:  # the first layer's input does not depend on who normalizes
        whole = torch.cat(expected)
        torch.testing.assert_close(net[0].running_mean, whole.mean((0, 2, 3)))
        torch.testing.assert_close(net[0].running_var, whole.var((0, 2, 3)))
    return {name: value for name, value in net.state_dict().items() if "running" in name}


@pytest.mark.parametrize(
    ("world_size", "kind", "wrap", "group"),
    [(2, SyncBatchNorm, False, None), (3, SyncBatchNorm, True, None), (4, SyncBatchNorm, False, 2),
     (2, nn.BatchNorm2d, False, None)],
    ids=["two", "three-ddp", "sub-groups", "plain"],
)  # fmt: skip
def test_uneven_shards_pool_by_samples_to_the_same_bits_on_every_rank(ranks, world_size, kind, wrap, group):
    results = ranks(world_size, check_over_ranks, kind, wrap, group)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [SyncBatchNorm, nn.BatchNorm2d])
def test_after_an_exception_all_is_as_it_was(kind):
    net = network(kind)
    before = copy.deepcopy(net.state_dict())

    def batches():
        yield torch.randn(4, 3, 2, 2, dtype=torch.float64)
        raise OSError("the disk")

    net.eval()
    with pytest.raises(OSError, match="the disk"):
        precise_bn(net, batches())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in net.modules())
    net.train()(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    assert net[0].num_batches_tracked == 1


def test_frozen_layers_are_passed_over():
    net = network()
    freeze(net, "0")
    before = net[0].running_mean.clone()
    batch, _ = make_batch((8, 3, 4, 4), mean=5.0)
    precise_bn(net, [batch])
    assert torch.equal(net[0].running_mean, before)
    assert net[3].running_mean.abs().max() > 0


def test_a_layer_of_torch_may_be_given_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(input=x)

    net, batch = Named().double(), torch.randn(8, 3, 4, 4, dtype=torch.float64)
    precise_bn(net, batch.split([3, 5]))
    torch.testing.assert_close(net.bn.running_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(net.bn.running_var, batch.var((0, 2, 3)))


def test_no_more_batches_than_asked_for():
    drawn = []

    def batches():
        for number in range(9):
            drawn.append(number)
            yield torch.randn(4, 3, 2, 2, dtype=torch.float64)

    precise_bn(network(), batches(), num_batches=2)
    assert drawn == [0, 1]


def test_fewer_batches_than_asked_for_are_all_used_with_a_warning():
    net, batches = network(), make_batch((20, 3, 4, 4), mean=5.0)[0].split(2)
    with pytest.warns(UserWarning, match="asked for 20, but batches ended after 10 on every rank") as caught:
        precise_bn(net, batches, num_batches=20)
    assert caught[0].filename == __file__
    check_equal(net, population(batches))
    precise_bn(net, batches, num_batches=10)  # no warning


def check_too_few(num_batches, ended):
    net = network(nn.BatchNorm2d)
    before = copy.deepcopy(net.state_dict())
    batches = torch.randn(3 - dist.get_rank(), 4, 3, 2, 2, dtype=torch.float64)
    if not ended:
        precise_bn(net, batches, num_batches=num_batches)  # rank 1 has fewer, as it may
        return
    with pytest.warns(UserWarning, match=f"asked for {num_batches}, but batches ended after {ended} on every rank"):
        precise_bn(net, batches, num_batches=num_batches)
    after = copy.deepcopy(net.state_dict())
    net.load_state_dict(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="asked for"):  # who makes it an error gets it before anything changes
            precise_bn(net, batches, num_batches=num_batches)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(after["0.running_mean"], before["0.running_mean"])


@pytest.mark.parametrize(("num_batches", "ended"), [(4, 3), (3, None)])
def test_ranks_are_told_of_too_few_batches_alike(ranks, num_batches, ended):
    ranks(2, check_too_few, num_batches, ended)


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (network(), [], {}, "batches: expected at least one, got none"),
        (nn.Linear(2, 2), [torch.randn(2, 2)], {}, "model: has no batch normalization"),
        (network(), [], {"num_batches": 0}, "num_batches: expected None or 1 or more, got 0"),
        (nn.LazyBatchNorm2d(), [torch.randn(4, 3, 2, 2)], {}, "model: has lazy layers that have not seen their width"),
    ],
)
def test_mistakes(model, batches, options, message):
    with pytest.raises(ValueError, match=message):
        precise_bn(model, batches, **options)
