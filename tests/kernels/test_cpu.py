"""The CPU kernels against the specification, and what a layer costs: counted, not timed."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from syncbn import SyncBatchNorm
from syncbn.kernels import cpu, cpu_step, operators, reference
from syncbn.kernels.cpu_blocks import pair_sums
from syncbn.kernels.step import Statistics
from tests.counting import collectives
from tests.reference import PLAIN

NAMES = ("output", "gradient", "sums", "mean", "variance", "counter", "local gradient", "local sums")
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(shape, means, std, dtype, layout, seed=0):
    """Channels with these means, in float64 and in the type and layout under test."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor([means[channel % len(means)] for channel in range(shape[1])], dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    tensor = (values * std + mean.view(1, -1, *[1] * (len(shape) - 2)) * std).to(dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return as_layout(tensor, layout), as_layout(grad, layout)


def as_layout(tensor, layout):
    if layout == "channels_last" and tensor.dim() in (4, 5):
        memory_format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=memory_format)
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


def run(kernels, input, grad, weight, bias):
    packed = kernels.moments(input)
    buffers = [torch.zeros(input.size(1)), torch.ones(input.size(1)), torch.tensor(0)]
    dtype = reference.compute_dtype(input.dtype)
    mean, invstd, count = kernels.finish(packed, *buffers, 0.1, 1e-5, dtype)
    output = kernels.normalize(input, mean, invstd, weight, bias)
    sums, _ = kernels.backward_reduce(grad, input, mean, invstd, torch.float32)
    grad_input = kernels.backward_elementwise(grad, input, mean, invstd, weight, sums, count)
    local, local_sums = kernels.backward_local(grad, input, mean, invstd, weight, count, torch.float64)
    number = max(float(count), 1.0)
    return output, grad_input, sums / number, *buffers, local, local_sums / number


def check(shape, means, std, dtype, layout):
    input, grad = make(shape, means, std, dtype, layout)
    weight, bias = torch.linspace(0.5, 1.5, shape[1]), torch.linspace(-1, 1, shape[1])
    actual = run(cpu, input, grad, weight, bias)
    wide = run(reference, input.double(), grad.double(), weight.double(), bias.double())
    bound = BOUNDS[dtype]
    for one, other, name in zip(actual, wide, NAMES, strict=True):
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        error = float((one.double() - other).abs().max()) if other.numel() else 0.0
        assert error <= bound * scale, (name, error)
    assert actual[0].dtype == actual[1].dtype == dtype
    vector = torch.ones(shape[1], dtype=reference.compute_dtype(dtype))
    expected = reference.normalize(input, torch.stack([vector, vector]), vector, None, None)
    assert actual[0].stride() == expected.stride()


SHAPES = [
    (32, 5, 24, 24),
    (4, 3, 56, 56),
    (2, 4, 17, 13, 11),
    (130, 7),
    (16, 3, 50),
    (3, 2, 1, 1),
    (5, 1, 3),
    (1, 3, 64),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_well_conditioned_channels(shape, dtype, layout):
    check(shape, [0.0, 0.7, -0.9], 1.0, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("means", [[0.0, 3.0], [10.0], [1e3], [1e5, 0.5], [1e4, 30.0, 0.0]], ids=str)
@pytest.mark.parametrize("std", [1.0, 1e-3, 1e3])
def test_channels_far_from_zero_among_others(means, std, layout):
    input, grad = make((8, 6, 20, 20), means, std, torch.float32, layout)
    truth = reference.unpack(reference.moments(input))
    _, (high, low), variance = reference.unpack(cpu.moments(input))
    assert float(((high + low - truth[1][0] - truth[1][1]).abs() / truth[2].sqrt()).max()) < 3e-7
    assert float(((variance - truth[2]).abs() / truth[2]).max()) < 5e-7
    outputs = [run(kernels, x, g, None, None)[:2] for kernels, x, g in
               ((cpu, input, grad), (reference, input.double(), grad.double()))]  # fmt: skip
    if std == 1.0:  # eps is of no account there
        for actual, expected in zip(*outputs, strict=True):
            assert float((actual - expected).abs().max()) < 1.5e-6 * float(expected.abs().max())


@given(
    rows=st.integers(1, 300),
    channels=st.integers(1, 5),
    size=st.integers(1, 40),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    mean=st.sampled_from([0.0, 0.8, 2.0, 100.0]),
)
def test_any_shape_and_layout(rows, channels, size, layout, mean):
    input, grad = make((rows, channels, size, 1), [mean, 0.0], 1.0, torch.float64, layout)
    if cpu.is_regular(input):
        expected = torch.stack([grad.sum((0, 2, 3)), (grad * input).sum((0, 2, 3))])
        torch.testing.assert_close(pair_sums(grad, input, torch.zeros(channels).double()), expected)
    torch.testing.assert_close(
        reference.unpack(cpu.moments(input))[2], reference.unpack(reference.moments(input))[2], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["local", "over ranks"])
def test_the_gradient_where_it_follows_the_input(layout, kind):
    # Then the sums of the backward pass are large, and their rounding shows: torch's own channels_last layer is off by
    # 5e-5 here, against 1e-6.
    input, noise = make((32, 16, 56, 56), [0.0], 1.0, torch.float32, layout)
    grad = noise + 5 * input + 5
    results = []
    for kernels, x, g in ((cpu, input, grad), (reference, input.double(), grad.double())):
        mean, invstd, count = kernels.finish(kernels.moments(x), None, None, None, None, 1e-5, x.dtype)
        if kind == "local":
            results.append(kernels.backward_local(g, x, mean, invstd, None, count, torch.float64))
        else:
            sums, _ = kernels.backward_reduce(g, x, mean, invstd, torch.float64)
            results.append((kernels.backward_elementwise(g, x, mean, invstd, None, sums, count), sums))
    for actual, expected in zip(*results, strict=True):
        assert float((actual - expected).abs().max()) < 1.5e-6 * float(expected.abs().max())


def test_planes_that_cannot_be_cut():
    for size in (257, 3137, 8209):  # primes; the last is too long for one accumulator and goes to the reference
        check((2, 3, size), [0.0, 0.7], 1.0, torch.float32, "contiguous")
    assert not cpu.is_regular(torch.empty(2, 3, 8209))


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 3), (4, 3, 0), (0, 3), (0, 3, 2, 2)], ids=str)
def test_nothing_to_normalize(shape):
    input = torch.randn(shape)
    packed = cpu.moments(input)
    assert torch.equal(packed, torch.zeros(4 * shape[1] + 1, dtype=torch.float64))
    vector = torch.ones(shape[1])
    mean = torch.zeros(2, shape[1])
    assert cpu.normalize(input, mean, vector, None, None).shape == shape
    sums, affine = cpu.backward_reduce(input, input, mean, vector, torch.float32)
    assert sums.shape == (2 * shape[1],)
    assert affine.shape == (2, shape[1])
    count = torch.tensor(0.0, dtype=torch.float64)
    assert cpu.backward_elementwise(input, input, mean, vector, None, sums, count).shape == shape
    assert cpu.backward_local(input, input, mean, vector, None, count, torch.float32)[0].shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value):
    input = torch.randn(4, 3, 5, 5)
    input[1, 1, 2, 2] = value
    output = SyncBatchNorm(3)(input)
    assert output[:, 1].isnan().any()
    assert output[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1e20), (1.0, 1e30), (1e8, 1e12)])
def test_values_with_squares_beyond_float32_have_statistics_and_an_output(mean, std, layout):
    input, _ = make((4, 3, 8, 8), [mean], std, torch.float32, layout)
    input[:, 0] /= std  # one channel of usual size
    buffers = [torch.zeros(3), torch.ones(3), torch.tensor(0)]
    mean, invstd, _ = cpu.finish(cpu.moments(input), *buffers, 0.1, 1e-5, torch.float32)
    output = cpu.normalize(input, mean, invstd, None, None)
    expected = nn.functional.batch_norm(input.double(), None, None, training=True, eps=1e-5)
    assert (output - expected).abs().max() < 1e-5
    small = cpu_step.forward(input, None, None, None, None, Statistics(None, None, None, 0.1, 1e-5))
    torch.testing.assert_close(small[0], output, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 32])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics_of_any_type_move_alike(momentum, dtype, count):
    packed = reference.moments(torch.randn(count, 3))
    results = []
    for kernels in (cpu, reference):
        buffers = [torch.full((3,), 0.5, dtype=dtype), torch.full((3,), 2.0, dtype=dtype), torch.tensor(4)]
        kernels.finish(packed, *buffers, momentum, 1e-5, torch.float32)
        results.append(buffers)
    rtol = {torch.float32: 1e-7, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(*results, rtol=rtol, atol=0)


def saved_bytes(layer, input):
    """Bytes that the graph keeps for backward, each storage once; parameters and buffers are there anyway."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(input)
    del output
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (32, 128), (2, 8, 6, 6, 6)], ids=str)
def test_a_layer_saves_at_most_what_torch_s_local_one_does_and_a_frozen_one_less(shape):
    input = torch.randn(shape, requires_grad=True)
    local = saved_bytes(PLAIN[len(shape)](shape[1]), input)
    ours = SyncBatchNorm(shape[1])
    vectors = 16 * shape[1] + 8  # the mean in two parts, and the count: nothing of the activation's size
    assert saved_bytes(ours, input) <= local + vectors
    ours.freeze()
    assert saved_bytes(ours, input) <= 16 * shape[1]


def operators_of(function):
    """How often each operator runs, and how often those that do more than make a view are given a whole activation."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    counts, whole = Counter(), Counter()
    for event in profiler.events():
        counts[event.name] += 1
        if any(math.prod(shape) >= ACTIVATION.numel() for shape in event.input_shapes if shape):
            whole[event.name] += 1
    return counts, {name: whole[name] for name in WORK if whole[name]}


ACTIVATION = torch.randn(8, 64, 14, 14)
WORK = ["aten::native_batch_norm", "aten::native_batch_norm_backward", "aten::addcmul", "aten::addcmul_", "aten::sub",
        "aten::add", "aten::mul", "aten::mul_", "aten::add_", "aten::sum", "aten::_to_copy", "aten::copy_",
        "aten::square", "aten::clone", "aten::where", "aten::mean", "aten::div"]  # fmt: skip


def one_step(layer):
    input = ACTIVATION.clone().requires_grad_()
    layer(input).backward(ACTIVATION)
    input.grad = None
    return operators_of(lambda: layer(input).backward(ACTIVATION))


def test_a_step_touches_the_activation_as_often_as_it_should():
    counts, whole = one_step(SyncBatchNorm(64))
    # One read for the moments, one pass to normalize, torch's own backward.
    assert whole == {"aten::native_batch_norm": 1, "aten::native_batch_norm_backward": 2}
    assert counts["syncbn::moments"] == counts["syncbn::normalize"] == counts["syncbn::backward_local"] == 1


def check_operators():
    counts, whole = one_step(SyncBatchNorm(64))
    # Over ranks the sums have to be known before the gradient: a read for them, and one pass in blocks (here it is
    # one), which are still in the cache when the second operator comes.
    assert whole == {"aten::native_batch_norm": 2, "aten::native_batch_norm_backward": 2, "aten::addcmul_": 1}
    assert counts["syncbn::backward_reduce"] == counts["syncbn::backward_elementwise"] == 1


def test_a_step_over_ranks_touches_it_once_more(ranks):
    ranks(2, check_operators)


def test_a_small_step_is_not_many_operators():
    for activation in (None, "relu"):
        counts, _ = one_step(SyncBatchNorm(64, activation=activation))
        assert sum(count for name, count in counts.items() if name.startswith("aten::")) < 330


def test_sums_around_a_pivot_are_not_many_operators():
    def number_of(mean):
        counts, _ = operators_of(lambda: cpu.moments(torch.randn(8, 16, 8, 8) + mean))
        return sum(count for name, count in counts.items() if name.startswith("aten::"))

    assert number_of(2.0) - number_of(0.0) < 100  # layers behind a ReLU have such means


def check_collectives():
    layer = SyncBatchNorm(8)
    with collectives() as sent:
        layer(torch.randn(4, 8, 3, 3, requires_grad=True)).sum().backward()
    assert [size for size, _ in sent] == [33, 16]


def test_a_step_sends_two_payloads(ranks):
    ranks(2, check_collectives)


def test_the_dispatcher_chooses():
    input = torch.randn(4, 3, 5)
    assert torch.equal(operators.moments(input), cpu.moments(input))
    assert operators.moments(input.to("meta")).device.type == "meta"
    assert nn.Sequential(SyncBatchNorm(3))(input).shape == input.shape
