"""`memory="lean"`: the numbers of a layer that keeps its input, from one that keeps its output, or an error."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, accumulate_stats
from syncbn.kernels import cuda, operators, reference
from syncbn.nn import lean as nn_lean
from tests.counting import collectives
from tests.kernels.test_cpu import as_layout, saved_bytes
from tests.reference import make_batch, max_error, set_affine

ACTIVATIONS = nn_lean.INVERTIBLE_ACTIVATIONS
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(activation, channels=3, **options):
    """A lean layer, and one with the same parameters that is not."""
    lean = SyncBatchNorm(channels, dtype=torch.float64, activation=activation, memory="lean", **options)
    set_affine(lean)
    plain = copy.deepcopy(lean)
    plain.memory = "default"
    return lean, plain


def step(layer, input):
    leaf = input.clone().requires_grad_()
    output = layer(leaf)
    (output.sin() * output).sum().backward()
    return output.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())


def compare(lean, plain, input):
    steps = step(lean, input), step(plain, input)
    assert torch.equal(steps[0][0], steps[1][0])
    for one, other in zip(*steps, strict=True):
        assert (one is None) == (other is None)
        assert one is None or max_error(one, other) < 1e-12
    for name in lean.state_dict():
        assert torch.equal(lean.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "change",
    [SyncBatchNorm.train, SyncBatchNorm.eval, lambda layer: layer.freeze(affine=False),
     lambda layer: layer.freeze(stats=False)],
    ids=["training", "evaluation", "frozen statistics", "frozen parameters"],
)  # fmt: skip
def test_the_same_in_every_mode(activation, change):
    lean, plain = pair(activation)
    change(lean), change(plain)
    compare(lean, plain, make_batch((4, 3, 5, 2))[0])


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
def test_without_what_a_layer_may_lack(options):
    for activation in ACTIVATIONS:
        compare(*pair(activation, **options), make_batch((4, 3, 5, 2), mean=50.0)[0])


def check_ranks(sizes):
    input = make_batch((sum(sizes), 3, 5))[0].split(sizes)[dist.get_rank()]
    for activation in ACTIVATIONS:
        lean, plain = pair(activation)
        for layer in (lean, plain):  # one channel whose output tells nothing
            nn.init.zeros_(layer.weight[1:2])
        compare(lean, plain, input)
        with collectives() as sent:
            lean(input.requires_grad_()).sum().backward()
        assert [size for size, _ in sent] == [13, 6]


@pytest.mark.parametrize("sizes", [(2, 3), (5, 0)], ids=str)
def test_over_ranks_with_the_same_collectives(ranks, sizes):
    ranks(2, check_ranks, sizes)


def statistics(layer, x):
    """The mean in two parts and the inverse deviation, as the layer has them."""
    wide = reference.compute_dtype(x.dtype)
    return operators.finish(operators.moments(x), None, None, None, None, layer.eps, wide)[:2]


def restored(layer, x):
    """x-hat from the output."""
    affine = layer.weight.detach(), layer.bias.detach()
    vectors = statistics(layer, x)
    output = operators.normalize(x, *vectors, *affine, None, layer.activation)
    index = nn_lean.channels_to_keep(*affine, layer.activation, x.dtype)
    part = None if index is None else x.index_select(1, index)
    return nn_lean.restore(output, *vectors, *affine, layer.activation, index, part)


def bound_of(layer, x, g, ratio, dtype):
    """The documented bound of x-hat's error, carried to the gradients of input and weight; and those, in float64."""
    leaf = x.double().clone().requires_grad_()
    plain = SyncBatchNorm(x.size(1), dtype=torch.float64, activation=layer.activation)
    plain.load_state_dict(layer.state_dict())
    plain(leaf).backward(g.double())
    mean, variance = x.double().mean((0, 2)), x.double().var((0, 2), correction=0)
    invstd = (variance + plain.eps).rsqrt().view(1, -1, 1)
    xhat = (x.double() - mean.view(1, -1, 1)) * invstd
    z = xhat * plain.weight.view(1, -1, 1) + plain.bias.view(1, -1, 1)
    through = g.double() if layer.activation is None else torch.where(z > 0, g.double(), 0.01 * g.double())
    unit = torch.finfo(dtype).eps / 2
    error = 4 * unit * (xhat.abs() + ratio + 4)
    in_weight = (through.abs() * error).sum((0, 2))
    projection = plain.weight.grad.abs().view(1, -1, 1)
    number = x.numel() / x.size(1)
    in_input = (error * projection + xhat.abs() * in_weight.view(1, -1, 1)) / number
    size = (plain.weight.abs() * invstd.view(-1)).view(1, -1, 1)
    # What any layer of the type is off by: the rounding of the gradient, and of the sums.
    wide = 8 * torch.finfo(reference.compute_dtype(dtype)).eps
    own = unit * leaf.grad.abs().amax((0, 2)).view(1, -1, 1) + wide * size
    return (leaf.grad, in_input * size + own), (plain.weight.grad, in_weight + wide * through.abs().sum((0, 2)))


@pytest.mark.parametrize("everywhere", [True, False], ids=["what the host sees", "what it must not look at"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_error_is_within_the_documented_bound(dtype, activation, everywhere, monkeypatch):
    if not everywhere:
        monkeypatch.setattr(nn_lean, "_MAX_CONDITION", float("inf"))  # no channel is kept: the bound alone, however bad
    torch.manual_seed(0)
    most = nn_lean.limit(dtype) if not everywhere else 1e4
    weight = torch.tensor([1.0, -0.3, 1e-2, 1.0, 1e-2, 1.0, 1e-2])
    ratio = torch.tensor([0.0, 1.0, 1.0, 4.0, 4.0, most, most])
    layer = SyncBatchNorm(7, activation=activation, memory="lean")
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(ratio * weight.abs() * 0.99)
    layer.double() if dtype == torch.float64 else layer
    x, g = (torch.randn(16, 7, 40).add(offset).to(dtype) for offset in (1.5, 0.0))
    ratio = nn_lean.conditions(layer.weight, layer.bias, activation, dtype).view(1, -1, 1)
    if everywhere:
        ratio = ratio.clamp(max=4.0)
    mean, invstd = statistics(layer, x)
    truth = reference.normalize(x.double(), mean.double(), invstd.double(), None, None)
    bound = 2 * torch.finfo(dtype).eps * (truth.abs() + ratio + 4)
    assert bool(((restored(layer, x) - truth).abs() <= bound).all())
    expected = bound_of(layer, x, g, ratio, dtype)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(g)
    for actual, (truth, bound) in zip((leaf.grad, layer.weight.grad), expected, strict=True):
        assert bool(((actual.double() - truth).abs() <= bound).all()), ((actual.double() - truth).abs() / bound).max()


def test_half_of_the_digits_are_lost_at_the_limit_and_not_more(monkeypatch):
    """So that the bound says something: of a channel at the limit the error is near it, and far above that of r = 0."""
    torch.manual_seed(0)
    x = torch.randn(64, 2, 9)
    for dtype in (torch.float32, torch.bfloat16):
        layer = SyncBatchNorm(2)
        layer.weight.data.fill_(1e-2)
        layer.bias.data.copy_(torch.tensor([0.0, 1e-2 * nn_lean.limit(dtype)]))
        monkeypatch.setattr(nn_lean, "_MAX_CONDITION", float("inf"))
        error = restored(layer, x.to(dtype))
        layer.weight.data.fill_(1.0)
        layer.bias.data.zero_()
        error = (error - restored(layer, x.to(dtype))).abs().amax((0, 2))
        unit = torch.finfo(dtype).eps / 2
        assert error[0] < 16 * unit
        assert unit**0.5 / 8 < error[1] < 4 * (unit**0.5 + 16 * unit)


def test_where_a_weight_is_zero_or_small_against_the_bias_the_input_is_kept():
    weight, bias = torch.tensor([1.0, 0.0, 1e-3, -1.0, torch.nan]), torch.tensor([4.0, 0.0, 1.0, -2.0, 0.0])
    assert nn_lean.channels_to_keep(weight, bias, None, torch.float32).tolist() == [1, 2, 4]
    assert nn_lean.channels_to_keep(weight[:1], bias[:1], None, torch.float32) is None
    assert nn_lean.channels_to_keep(None, None, None, torch.float32) is None
    # A small weight alone scales the output, which is then as exact as before, down to where the type ends.
    small = torch.tensor([1e-3, 1e-30])
    assert nn_lean.channels_to_keep(small, None, None, torch.float32) is None
    assert nn_lean.channels_to_keep(small, None, "leaky_relu", torch.float16).tolist() == [0, 1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_weights_zero_in_every_layout(activation, layout):
    lean, plain = pair(activation)
    for layer in (lean, plain):
        nn.init.zeros_(layer.weight)
    compare(lean, plain, as_layout(make_batch((4, 3, 5, 2))[0], layout))


def test_where_the_host_must_not_look_the_worst_eighth_of_the_channels_is_kept_and_more_are_an_error():
    def kept(weight, bias):
        return sorted(nn_lean._worst(nn_lean.conditions(weight, bias, None, torch.float32), torch.float32).tolist())

    weight, bias = torch.ones(24), torch.zeros(24)
    assert len(kept(weight, bias)) == 3
    weight[[3, 20]], bias[7] = 0.0, 5.0
    assert kept(weight, bias) == [3, 7, 20]
    weight[[1, 2]] = torch.tensor([1e-3, torch.nan])  # exact enough; and what is no number stays none
    assert 2 in kept(weight, bias)
    weight[[1, 5]] = 0.0
    with pytest.raises(RuntimeError, match=r'memory="lean".*use memory="default"'):
        kept(weight, bias)


def conv_bn_conv(activation, memory, inplace=False):
    """As a step of a network has it: what the last convolution keeps is the output of the normalization."""
    fused = memory is not None
    layer = SyncBatchNorm(16, activation=activation if fused else None, memory=memory or "default")
    follows = [] if fused or activation is None else [nn.LeakyReLU(inplace=inplace)]
    return nn.Sequential(nn.Conv2d(16, 16, 1), layer, *follows, nn.Conv2d(16, 16, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_is_kept_but_what_the_next_layer_keeps(activation):
    input = torch.randn(8, 16, 14, 14)
    whole = 4 * input.numel()
    vectors = 16 * 30

    def kept(*how):
        return saved_bytes(conv_bn_conv(activation, *how), input) - whole  # less the first convolution's own input

    lean = kept("lean")
    assert whole <= lean <= whole + vectors
    for unfused in (kept(None), kept(None, True)):  # at most 0.6, the aim: with the activation in place too
        assert lean <= 0.6 * unfused
    assert kept("default") >= 2 * whole


def test_the_input_of_few_channels_is_kept_beside_the_output():
    layer = SyncBatchNorm(16, memory="lean")
    layer.weight.data[3] = 0.0
    input = torch.randn(8, 16, 14, 14, requires_grad=True)
    whole = 4 * input.numel()
    assert saved_bytes(layer, input) <= whole + whole // 16 + 16 * 30


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_change_of_the_output_in_place_is_an_error_and_one_of_the_input_is_not(activation):
    lean, plain = pair(activation)
    input = make_batch((4, 3, 5))[0].requires_grad_()
    output = lean(input)
    output.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    grads = []
    for layer in (lean, plain):
        copied = input.detach().clone().requires_grad_() * 1.0
        copied.retain_grad()
        output = layer(copied)
        if layer is lean:
            with torch.no_grad():
                copied.zero_()  # nobody keeps it
        output.sin().sum().backward()
        grads.append(copied.grad)
    assert max_error(*grads) < 1e-12


def test_what_cannot_be_told_from_the_output_is_an_error():
    for activation in ("relu", "silu"):
        with pytest.raises(ValueError, match=f"what went into '{activation}'"):
            SyncBatchNorm(3, activation=activation, memory="lean")
    with pytest.raises(ValueError, match="expected default or lean, got 'small'"):
        SyncBatchNorm(3, memory="small")
    layer, input = SyncBatchNorm(3, memory="lean"), torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match="there is a residual"):
        layer(input, residual=input)
    with pytest.raises(ValueError, match="there is a mask"):
        layer(input, torch.ones(4, 1, 5))
    layer.activation = "relu"
    with pytest.raises(ValueError, match="what went into 'relu'"):
        layer(input)


def check_second_derivative():
    layer, input = SyncBatchNorm(3, memory="lean"), torch.randn(4, 3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match='memory="lean" keeps no input'):
        torch.autograd.grad(layer(input).sin().sum(), input, create_graph=True)


def test_a_second_derivative_is_an_error_before_anything_is_sent(ranks):
    ranks(2, check_second_derivative)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_and_in_a_pool_statistics_move_once(reentrant):
    lean, plain = pair("leaky_relu")
    for layer in (lean, plain):
        nn.init.zeros_(layer.weight[:1])
    with accumulate_stats(lean), accumulate_stats(plain):
        for part in make_batch((4, 3, 5))[0].split(2):
            leaf, expected = part.clone().requires_grad_(), part.clone().requires_grad_()
            checkpoint(lean, leaf, use_reentrant=reentrant).sin().sum().backward()
            plain(expected).sin().sum().backward()
            assert max_error(leaf.grad, expected.grad) < 1e-12
    for name in lean.state_dict():
        assert torch.equal(lean.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_graph_with_the_same_numbers_when_compiled(activation):
    torch._dynamo.reset()
    lean, plain = pair(activation, channels=9)
    for layer in (lean, plain):
        layer.bias.data.clamp_(-0.5, 0.5)
        layer.weight.data.abs_().add_(0.5)[4] = 0.0
    input = make_batch((4, 9, 5))[0]
    compiled = torch.compile(lean, fullgraph=True, backend="aot_eager")
    for one, other in zip(step(compiled, input), step(plain, input), strict=True):
        assert max_error(one, other) < 1e-12
    nn.init.zeros_(lean.weight)
    with pytest.raises(RuntimeError, match="weights of too many channels"):
        step(compiled, input)


def test_without_gradients_nothing_is_asked_of_the_weights(monkeypatch):
    lean, plain = pair(None)
    monkeypatch.setattr(nn_lean, "channels_to_keep", None)
    input = make_batch((4, 3, 5))[0]
    with torch.no_grad():
        assert torch.equal(lean(input), plain(input))


def test_it_survives_copies_and_shows():
    lean = pair(None)[0]
    assert copy.deepcopy(lean).memory == "lean"
    assert "memory=lean" in repr(lean)
    assert "memory" not in repr(SyncBatchNorm(3))
    assert list(lean.state_dict()) == list(SyncBatchNorm(3).state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_programs_for_cuda_restore_what_the_cpu_does(activation, monkeypatch):
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    input = make_batch((4, 8, 5, 5), mean=3.0)[0].float().to(device)
    affine = torch.linspace(-1, 1, 8, device=device), torch.linspace(-2, 2, 8, device=device)
    packed = cuda.moments(input)
    vectors = cuda.finish(packed, None, None, None, None, 1e-5, torch.float32)[:2]
    output = cuda.normalize(input, *vectors, *affine, None, activation)
    index = torch.tensor([3, 4], device=device)
    monkeypatch.setattr(operators, "normalize", cuda.normalize)
    xhat = nn_lean.restore(output, *vectors, *affine, activation, index, input.index_select(1, index))
    torch.testing.assert_close(xhat, cuda.normalize(input, *vectors, None, None), rtol=1e-5, atol=1e-5)
