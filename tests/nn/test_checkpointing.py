"""Activation checkpointing: statistics move once per step, and the second run of a forward pass sends nothing."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from syncbn import SyncBatchNorm, sync_batch_norm
from syncbn.nn import checkpointing
from tests.counting import collectives


def block(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), SyncBatchNorm(4))


def network():
    torch.manual_seed(0)
    return nn.ModuleList([block(), block(4)]).double()


def run(net, batches, apply):
    """A step of several micro-batches; returns gradients and buffers."""
    for batch in batches:
        output = batch
        for part in net:
            output = apply(part, output)
        output.square().sum().backward()
    return [p.grad for p in net.parameters()] + list(net.buffers())


APPLY = {
    "plain": lambda part, x: part(x),
    "reentrant": lambda part, x: checkpoint(part, x.requires_grad_(), use_reentrant=True),
    "not reentrant": lambda part, x: checkpoint(part, x, use_reentrant=False),
}
SIZES = [(3, 5), (1, 0), (4, 2)]  # samples of rank 0 and 1 in each micro-batch; rank 1 sits one out


def check_same_as_plain(mode, num_steps):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    nets = {kind: network() for kind in ("plain", mode)}
    results, counts = {}, {}
    for kind, net in nets.items():
        with collectives() as sent:
            for step in range(num_steps):
                net.zero_grad()
                batches = []
                for number, sizes in enumerate(SIZES):
                    generator = torch.Generator().manual_seed(100 * step + 10 * number + rank)
                    size = sizes[rank % 2] if world_size > 1 else sizes[0]
                    batches.append(torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator))
                results[kind] = run(net, batches, APPLY[kind])
        counts[kind] = len(sent)
    for one, other in zip(results["plain"], results[mode], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    assert nets[mode][0][1].num_batches_tracked == num_steps * len(SIZES)
    assert counts[mode] == counts["plain"] == (num_steps * len(SIZES) * 4 * 2 if world_size > 1 else 0)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_numbers_and_collectives_are_those_without_checkpointing(ranks, mode, world_size):
    ranks(world_size, check_same_as_plain, mode, 2)


def check_two_backward_orders(mode, reverse):
    # Both forwards of one layer come before either backward: the second run has to find the right first one.
    rank = dist.get_rank()
    nets = {kind: network() for kind in ("plain", mode)}
    grads = {}
    for kind, net in nets.items():
        torch.manual_seed(rank)
        inputs = [torch.randn(3, 3, 8, 8, dtype=torch.float64), 5 + torch.randn(3, 3, 8, 8, dtype=torch.float64)]
        losses = [APPLY[kind](net[0], x).square().sum() for x in inputs]
        for loss in losses[::-1] if reverse else losses:
            loss.backward()
        grads[kind] = [p.grad for p in net[0].parameters()]
    torch.testing.assert_close(grads[mode], grads["plain"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_second_run_takes_the_statistics_of_its_own_first(ranks, mode, reverse):
    ranks(2, check_two_backward_orders, mode, reverse)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_momentum_none_the_bare_function_and_sequential_checkpoints(mode):
    reentrant = mode == "reentrant"
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    layers = [SyncBatchNorm(3, momentum=None).double() for _ in range(2)]
    plain = copy.deepcopy(layers)
    for _ in range(2):
        checkpoint_sequential(nn.Sequential(*layers), 2, x, use_reentrant=reentrant).square().sum().backward()
        nn.Sequential(*plain)(x).square().sum().backward()
    for one, other in zip(layers, plain, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())

    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    function = lambda x: sync_batch_norm(x, mean, var, training=True, momentum=0.5)  # noqa: E731
    checkpoint(function, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(mean, 0.5 * x.detach().mean((0, 2, 3)))


def test_a_graph_that_is_kept_may_be_recomputed_again():
    layer, plain = SyncBatchNorm(3).double(), SyncBatchNorm(3).double()
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [checkpoint(layer, leaves[0], use_reentrant=False), plain(leaves[1])]
    for _ in range(2):
        gradients = [
            torch.autograd.grad(output.pow(3).sum(), leaf, retain_graph=True)[0]
            for output, leaf in zip(outputs, leaves, strict=True)
        ]
        torch.testing.assert_close(*gradients)
    assert layer.num_batches_tracked == 1


def check_ties():
    # Rank 0 has the same samples in both forwards, rank 1 has not; both forwards come before either backward.
    rank = dist.get_rank()
    for mode in ("reentrant", "not reentrant"):
        for reverse in (False, True):
            grads = {}
            for kind in ("plain", mode):
                net = network()
                torch.manual_seed(rank)
                first = torch.randn(3, 3, 8, 8, dtype=torch.float64)
                second = first.clone() if rank == 0 else 5 + torch.randn(3, 3, 8, 8, dtype=torch.float64)
                losses = [APPLY[kind](net[0], x).pow(3).sum() for x in (first, second)]
                for loss in losses[::-1] if reverse else losses:
                    loss.backward()
                grads[kind] = [p.grad for p in net[0].parameters()]
            torch.testing.assert_close(grads[mode], grads["plain"], rtol=1e-10, atol=1e-10)


def test_equal_samples_do_not_confuse_two_calls(ranks):
    ranks(2, check_ties)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_two_calls_of_one_layer_in_one_checkpoint_are_told_apart(mode):
    x = torch.randn(6, 3, dtype=torch.float64)
    layers = {kind: SyncBatchNorm(3).double() for kind in ("plain", mode)}
    for kind, layer in layers.items():
        APPLY[kind](nn.Sequential(layer, nn.Softplus(), layer), x).pow(3).sum().backward()
    torch.testing.assert_close(layers[mode].weight.grad, layers["plain"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layers[mode].state_dict(), layers["plain"].state_dict())


def check_no_graph(mode):
    # Nothing in the first layer needs a gradient: its first run leaves no graph behind.
    with collectives() as sent:
        net = nn.Sequential(SyncBatchNorm(3, affine=False), nn.Linear(3, 2)).double()
        losses = []
        for offset in (0, 0.05):
            x = offset + torch.randn(4, 3, dtype=torch.float64)
            output = checkpoint(net, x.requires_grad_(mode == "reentrant"), use_reentrant=mode == "reentrant")
            losses.append(output.pow(2).sum())
        sum(losses).backward()
    assert len(sent) == (4 if mode == "reentrant" else 2)
    assert net[0].num_batches_tracked == 2


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_a_layer_without_a_graph_of_its_own_is_remembered_too(ranks, mode):
    ranks(2, check_no_graph, mode)


def check_nested(outer, inner):
    def nest(part, x):
        return checkpoint(
            lambda x: checkpoint(part, 1.0 * x, use_reentrant=inner), x.requires_grad_(), use_reentrant=outer
        )

    results, counts = {}, {}
    for kind, apply in (("plain", APPLY["plain"]), ("nested", nest)):
        net = network()
        torch.manual_seed(dist.get_rank())
        with collectives() as sent:
            for _ in range(2):
                net.zero_grad()
                results[kind] = run(net, [torch.randn(3, 3, 8, 8, dtype=torch.float64)], apply)
        counts[kind] = len(sent)
    torch.testing.assert_close(results["nested"], results["plain"], rtol=1e-10, atol=1e-10)
    assert counts["nested"] == counts["plain"]


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested_checkpoints(ranks, outer, inner):
    ranks(2, check_nested, outer, inner)


def check_selective(saved):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context, function, *args, **kwargs):
        keep = any(name in str(function) for name in saved)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(part, x):
        return checkpoint(part, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))

    results = {}
    for kind, apply in (("plain", APPLY["plain"]), ("selective", selective)):
        net = network()
        torch.manual_seed(dist.get_rank())
        results[kind] = run(net, [torch.randn(3, 3, 8, 8, dtype=torch.float64)], apply)
    torch.testing.assert_close(results["selective"], results["plain"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("saved", [[], ["convolution"], ["syncbn.moments"], ["syncbn"], ["aten"]], ids=str)
def test_selective_checkpointing(ranks, saved):
    ranks(2, check_selective, saved)


def test_losses_that_are_summed_up_undetached_do_not_keep_all_moments():
    layer = SyncBatchNorm(3)
    total, made = 0, {}
    for _ in range(30):
        loss = checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=True).pow(2).sum()
        loss.backward()
        total = total + loss
        made |= {id(memory): memory for reference in checkpointing._memories[layer] if (memory := reference())}
    alive = [reference() for reference in checkpointing._memories[layer] if reference() is not None]
    assert len(alive) < 12
    assert len(made) == 30
    assert sum(memory.local.numel() > 0 for memory in made.values()) < 12  # the graph has all 30, and few moments


def test_nothing_is_remembered_without_checkpointing_nor_after_backward():
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert layer not in checkpointing._memories
    for reentrant in (True, False):
        x = torch.randn(4, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        del x
        gc.collect()
        assert [reference() for reference in checkpointing._memories[layer] if reference() is not None] == []


def test_a_forward_inside_of_backward_that_is_no_second_run_is_an_error():
    layer = SyncBatchNorm(3)
    x = torch.randn(8, 3, requires_grad=True)
    output = checkpoint(layer, x, use_reentrant=False)

    def other_forward(gradient):
        layer(100 + torch.randn(8, 3))

    output.register_hook(other_forward)
    with pytest.raises(RuntimeError, match="inside of a backward pass fits no forward before it"):
        output.sum().backward()
