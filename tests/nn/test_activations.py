"""A residual and an activation inside of the layer: as outside of it, in every mode and on every rank."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, accumulate_stats
from syncbn.kernels.activations import ACTIVATIONS
from tests.reference import make_batch, max_error, set_affine

CASES = [(activation, added) for activation in (None, *ACTIVATIONS) for added in (False, True)]


def outside(layer, input, activation, residual):
    """What `layer` is to do, by a layer that does none of it."""
    output = layer(input) if residual is None else layer(input) + residual
    return output if activation is None else ACTIVATIONS[activation](output)


def pair(activation, channels=3):
    inside = SyncBatchNorm(channels, dtype=torch.float64, activation=activation)
    set_affine(inside)
    plain = copy.deepcopy(inside)
    plain.activation = None
    return inside, plain


def both(activation):
    """How to run the two layers of a pair."""
    return (
        lambda layer, input, residual: layer(input, residual=residual),
        lambda layer, input, residual: outside(layer, input, activation, residual),
    )


def step(run, layer, input, residual):
    """Output and all gradients, of a loss whose gradient depends on the output."""
    leaf = input.clone().requires_grad_()
    added = None if residual is None else residual.clone().requires_grad_()
    output = run(layer, leaf, added)
    (output.sin() * output).sum().backward()
    return output.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, None if added is None else added.grad


def compare(activation, added, input, residual, change=lambda layer: layer):
    inside, plain = pair(activation)
    change(inside), change(plain)
    residual = residual if added else None
    runs = zip(both(activation), (inside, plain), strict=True)
    for one, other in zip(*(step(run, layer, input, residual) for run, layer in runs), strict=True):
        if one is not None and one.numel():
            assert max_error(one, other) < 1e-12
    for name in inside.state_dict():
        assert torch.equal(inside.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize(("activation", "added"), CASES)
@pytest.mark.parametrize(
    "change",
    [SyncBatchNorm.train, SyncBatchNorm.eval, lambda layer: layer.freeze(affine=False)],
    ids=["training", "evaluation", "frozen"],
)
def test_as_outside_of_it(activation, added, change):
    input, residual = make_batch((4, 3, 5, 2))
    compare(activation, added, input, residual, change)


def check_ranks(sizes):
    rank = dist.get_rank()
    input, residual = (part.split(sizes)[rank] for part in make_batch((sum(sizes), 3, 5)))
    for case in CASES:
        compare(*case, input, residual)


@pytest.mark.parametrize("sizes", [(2, 3), (5, 0)], ids=str)
def test_over_ranks(ranks, sizes):
    ranks(2, check_ranks, sizes)


@pytest.mark.parametrize(("activation", "added"), CASES)
def test_second_derivatives(activation, added):
    input, residual = make_batch((5, 3, 2))
    results = []
    for layer, run in zip(pair(activation), both(activation), strict=True):
        leaf, other = input.clone().requires_grad_(), residual.clone().requires_grad_() if added else None
        wanted = [leaf] if other is None else [leaf, other]
        output = run(layer, leaf, other)
        grads = torch.autograd.grad((output.sin() * output).sum(), wanted, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        results.append([*grads, *(tensor.grad for tensor in wanted), layer.weight.grad, layer.bias.grad])
    for one, expected in zip(*results, strict=True):
        assert max_error(one, expected) < 1e-9


@pytest.mark.parametrize(("activation", "added"), CASES)
@pytest.mark.parametrize("wanted", ["input", "residual", "affine"])
def test_whatever_needs_a_gradient_alone(activation, added, wanted):
    if wanted == "residual" and not added:
        return
    input, residual = make_batch((5, 3, 2))
    results = []
    for layer, run in zip(pair(activation), both(activation), strict=True):
        layer.requires_grad_(wanted == "affine")
        leaf, other = (
            input.clone().requires_grad_(wanted == "input"),
            residual.clone().requires_grad_(wanted == "residual"),
        )
        leaves = {"input": [leaf], "residual": [other], "affine": [layer.weight, layer.bias]}[wanted]
        output = run(layer, leaf, other if added else None)
        results.append(torch.autograd.grad((output.sin() * output).sum(), leaves))
    for one, expected in zip(*results, strict=True):
        assert max_error(one, expected) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_and_in_a_pool_statistics_move_once(reentrant):
    input, residual = make_batch((4, 3, 5))
    inside, plain = pair("silu")
    with accumulate_stats(inside), accumulate_stats(plain):
        for part, other in zip(input.split(2), residual.split(2), strict=True):
            leaf = part.clone().requires_grad_()
            checkpoint(
                lambda x, r: inside(x, residual=r), leaf, other, use_reentrant=reentrant
            ).square().sum().backward()
            expected = part.clone().requires_grad_()
            outside(plain, expected, "silu", other).square().sum().backward()
            assert max_error(leaf.grad, expected.grad) < 1e-12
    for name in inside.state_dict():
        assert torch.equal(inside.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
def test_nothing_is_kept_that_can_be_had_from_the_input(activation, added):
    layer = SyncBatchNorm(16, activation=activation)
    saved = []
    input = torch.randn(8, 16, 6, 6, requires_grad=True)
    residual = torch.randn(8, 16, 6, 6, requires_grad=True) if added else None
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(input, residual=residual)
    kept = {tensor.data_ptr() for tensor in saved if tensor.numel() == input.numel()}
    expected = {input.data_ptr()}
    if residual is not None:
        expected.add(residual.data_ptr() if activation == "silu" else output.data_ptr())
    assert kept == expected


def test_the_incoming_gradient_and_the_residual_are_left_alone():
    layer = SyncBatchNorm(3, activation="relu")
    input, residual, grad = (torch.randn(4, 3, 5) for _ in range(3))
    copies = [tensor.clone() for tensor in (input, residual, grad)]
    for added in (None, residual):
        layer(input.requires_grad_(), residual=added).backward(grad)
    layer.eval()(input, residual=residual)
    for tensor, before in zip((input, residual, grad), copies, strict=True):
        assert torch.equal(tensor, before)


def test_a_wider_residual_gives_a_wider_sum_as_outside():
    layer = SyncBatchNorm(3, activation="relu")
    output = layer(torch.randn(4, 3, 5).bfloat16(), residual=torch.randn(4, 3, 5))
    assert output.dtype == torch.float32
    assert (output >= 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_graph_with_the_same_numbers_when_compiled(activation):
    torch._dynamo.reset()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = SyncBatchNorm(3, dtype=torch.float64, activation=activation)

        def forward(self, input):
            return self.bn(self.bn(input), residual=input)

    block = Block()
    plain = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    input = make_batch((4, 3, 5))[0]
    grads = []
    for model in (compiled, plain):
        leaf = input.clone().requires_grad_()
        model(leaf).sin().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(block.state_dict(), plain.state_dict())


def test_an_evaluated_layer_exports_without_an_operator_of_ours():
    layer = SyncBatchNorm(3, activation="leaky_relu").eval()
    example = torch.randn(2, 3, 4)
    program = torch.export.export(layer, (example,), {"residual": example + 1.0})
    assert not [node for node in program.graph.nodes if "syncbn" in str(node.target)]
    torch.testing.assert_close(program.module()(example, residual=example), layer(example, residual=example))
