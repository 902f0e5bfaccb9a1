"""What only a GPU can show of the layer: accuracy, no waiting, graphs, compilation, kernels counted, memory."""

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.kernels import cuda, cuda_step, operators, reference
from syncbn.torch_compat import INTERCEPTORS
from tests.reference import expected_step, make_batch, max_error, run_step, set_affine

# What torch warns of where nothing is wrong: the profiler about its only cycle, sync debug mode about itself,
# AOTAutograd about a backend that returns plain functions, autograd about leaves that were used on another stream,
# CUDA about the empty graph that Inductor captures for its memory pool.
TORCH_WARNS = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        ".*Profiler clears events at the end of each cycle",
        "Synchronization debug mode is a prototype feature",
        "Your compiler for AOTAutograd is returning a function that doesn't take boxed arguments",
        "The AccumulateGrad node's stream does not match",
        "The CUDA Graph is empty",
    )
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *TORCH_WARNS,
]

COLUMNS = [(0.0, 1.0), (10.0, 1.0), (1000.0, 0.1), (1000.0, 0.01), (1e4, 1.0), (1000.123, 0.01), (1e5, 1.0)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("mean", "std"), COLUMNS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=str)
def test_a_step_is_that_of_float64_wherever_the_mean_is(mean, std, dtype, bound, layout):
    input, grad = (
        (torch.randn(16, 8, 24, 24, dtype=torch.float64) * s + m).to(dtype) for s, m in ((std, mean), (1, 0))
    )
    # `nn.BatchNorm2d` in float64 is itself off by more than 1e-10 here; the reference takes its mean in two parts.
    truth = run_step(SyncBatchNorm(8, affine=False, dtype=torch.float64), input.double(), grad.double())
    layer = SyncBatchNorm(8, affine=False, dtype=dtype, device="cuda")
    on_device = [tensor.cuda().to(memory_format=FORMATS[layout]) for tensor in (input, grad)]
    actual = run_step(layer, *on_device)
    assert actual.output.is_contiguous(memory_format=FORMATS[layout])
    assert max_error(actual.output.cpu(), truth.output) < bound
    assert max_error(actual.grad_input.cpu(), truth.grad_input) < bound * float(truth.grad_input.abs().max())
    assert max_error(actual.running_mean.cpu() / max(1.0, mean), truth.running_mean / max(1.0, mean)) < bound
    assert max_error(actual.running_var.cpu(), truth.running_var) < bound


@pytest.mark.parametrize("shape", [(12, 4, 6, 6), (64, 33), (7, 5, 9), (3, 4, 5, 6, 7), (2, 999, 7, 7), (64, 3, 9, 65)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_type_and_rank(shape, dtype):
    input, grad = (tensor.to(dtype) for tensor in make_batch(shape, mean=2.0))
    expected = expected_step(input, grad)
    wide = reference.compute_dtype(dtype)
    layer = SyncBatchNorm(shape[1], dtype=wide, device="cuda")
    set_affine_like_the_reference(layer)
    actual = run_step(layer, input.cuda(), grad.cuda())
    bound = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 1e-6, torch.float64: 1e-11}[dtype]
    for name in ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"):
        one, other = getattr(actual, name), getattr(expected, name)
        allowed = (bound if name in ("output", "grad_input") else min(bound, 2e-6)) * 1.1
        assert max_error(one.cpu(), other) <= allowed * max(1.0, float(other.abs().max())), name


def set_affine_like_the_reference(layer):
    on_cpu = copy.deepcopy(layer).cpu()
    set_affine(on_cpu)
    layer.load_state_dict(on_cpu.state_dict())


@contextmanager
def never_waiting():
    """Context in which a wait of the host for the device raises."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), SyncBatchNorm(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3), SyncBatchNorm(8, momentum=None), nn.Flatten(), nn.LazyLinear(4),
    ).cuda()  # fmt: skip


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_a_lean_layer_has_the_gradients_of_one_that_is_not_and_never_waits(activation):
    lean = SyncBatchNorm(16, activation=activation, memory="lean", device="cuda")
    torch.nn.init.zeros_(lean.weight[3:4])  # the output of this channel tells nothing
    plain = copy.deepcopy(lean)
    plain.memory = "default"
    input, grad = (torch.randn(8, 16, 9, 9, device="cuda") for _ in range(2))
    expected = run_step(plain, input, grad)
    run_step(copy.deepcopy(lean), input, grad)  # compilation
    with never_waiting():
        leaf = input.clone().requires_grad_()
        lean(leaf).backward(grad)
    torch.testing.assert_close(leaf.grad, expected.grad_input, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lean.weight.grad, expected.grad_weight, rtol=1e-4, atol=1e-4)


def test_training_steps_never_wait_for_the_device():
    net = small_net()
    input = torch.randn(8, 3, 16, 16, device="cuda")
    net(input)  # lazy shapes, and compilation
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for channels_last in (False, True):
        if channels_last:
            net, input = net.to(memory_format=torch.channels_last), input.to(memory_format=torch.channels_last)
        net(input).sum().backward()
        with never_waiting():
            for batch in (input, input[:3], input[:0]):
                optimizer.zero_grad()
                net(batch).sum().backward()
                optimizer.step()


@pytest.mark.parametrize("rows", [6, 0])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_graph_captures_and_replays_a_step(rows, momentum):
    graphed = SyncBatchNorm(5, momentum=momentum, device="cuda")
    plain = copy.deepcopy(graphed)
    input = torch.randn(rows, 5, 7, 7, device="cuda", requires_grad=True)
    grad = torch.randn(rows, 5, 7, 7, device="cuda")
    state = copy.deepcopy(graphed.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(graphed(input), (input, graphed.weight, graphed.bias), grad)
    torch.cuda.current_stream().wait_stream(stream)
    graphed.load_state_dict(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = graphed(input)
        gradients = torch.autograd.grad(output, (input, graphed.weight, graphed.bias), grad)
    for _ in range(3):
        with torch.no_grad():
            input.normal_()
            grad.normal_()
        graph.replay()
        expected = plain(input)
        wanted = torch.autograd.grad(expected, (input, plain.weight, plain.bias), grad)
        torch.testing.assert_close((output, *gradients), (expected, *wanted), rtol=0, atol=0)
        torch.testing.assert_close(graphed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_compiled_in_one_graph_with_our_operators():
    torch._dynamo.reset()
    net = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).cuda()
    plain, seen = copy.deepcopy(net), set()

    def backend(module, _):
        seen.update(str(node.target) for node in module.graph.nodes)
        return module

    from torch._dynamo.backends.common import aot_autograd

    input = torch.randn(4, 3, 8, 8, device="cuda")
    torch.compile(net, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))(
        input
    ).sum().backward()
    assert {"syncbn.moments.default", "syncbn.normalize.default", "syncbn.backward_local.default"} <= seen
    net.zero_grad(), net.load_state_dict(plain.state_dict())
    outputs = [model(input) for model in (torch.compile(net, fullgraph=True), plain)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)  # the convolution's, mostly


def test_reduce_overhead_skips_no_cuda_graph_because_of_our_operators():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    net = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).cuda()
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    input = torch.randn(4, 3, 8, 8, device="cuda")

    def step(model):
        torch.compiler.cudagraph_mark_step_begin()
        for parameter in model.parameters():
            parameter.grad = None
        model(input).square().sum().backward()

    for _ in range(4):  # warm-up, capture, replays
        step(compiled), step(plain)
    for one, other in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)  # the convolution's, mostly
    assert counters["inductor"]["cudagraph_skips"] == 0
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(compiled)
    assert any("GraphLaunch" in event.name for event in profiler.events())


@pytest.fixture
def _passes_by_themselves(monkeypatch):
    """Under a profiler a layer calls its operators, so that the profiler sees them; here it does not take notice."""
    others = tuple(active for active in INTERCEPTORS if active is not torch.autograd._profiler_enabled)
    assert len(others) == len(INTERCEPTORS) - 1
    for module in (cuda_step, operators):
        monkeypatch.setattr(module, "INTERCEPTORS", others)


def kernels_of(function):
    """The names of the kernels that it launches; copies and fills by the driver are none."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        result = function()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    names = [event.name for event in events if not event.is_user_annotation]  # a range that somebody named is no kernel
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))], result


def kernels_of_a_step(size, dtype, layout):
    layer = SyncBatchNorm(64, device="cuda")
    input = (
        torch.randn(32, 64, size, size, device="cuda", dtype=dtype).to(memory_format=FORMATS[layout]).requires_grad_()
    )
    grad = torch.randn_like(input)
    forward, output = kernels_of(lambda: layer(input))
    inputs = (input, layer.weight, layer.bias)
    backward, _ = kernels_of(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
    return forward, backward


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [7, 56])
def test_by_operators_at_most_four_kernels_forward_and_three_backward(size, dtype, layout):
    forward, backward = kernels_of_a_step(size, dtype, layout)
    assert 3 <= len(forward) <= 4, forward
    assert 2 <= len(backward) <= 3, backward


@pytest.mark.usefixtures("_passes_by_themselves")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_each_way_where_a_program_has_a_channel_to_itself_else_three(dtype):
    assert [*map(len, kernels_of_a_step(7, dtype, "contiguous"))] == [1, 1]
    for size, layout in ((7, "channels_last"), (56, "contiguous"), (56, "channels_last")):
        assert [*map(len, kernels_of_a_step(size, dtype, layout))] == [3, 3], (size, layout)


@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_bits_every_time(layout):
    input, grad = (torch.randn(32, 64, 56, 56, device="cuda").to(memory_format=FORMATS[layout]) for _ in range(2))
    first = run_step(SyncBatchNorm(64, device="cuda"), input, grad)
    for _ in range(5):
        again = run_step(SyncBatchNorm(64, device="cuda"), input, grad)
        for name in ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2**30 + 16), (2**30 + 16, 2, 2)], ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_more_values_than_32_bits_can_count(shape, rows):
    input = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    if rows:
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    input[-1, 1, -1] = 1.0  # the last value in memory
    count = input.numel() // 2
    total, (high, low), _ = reference.unpack(cuda.moments(input))
    assert float(total) == count
    assert torch.allclose((high + low) * count, torch.tensor([0.0, 1.0], device="cuda", dtype=torch.float64))
    vectors = (torch.tensor([[0.0, 0.5], [0.0, 0.0]], device="cuda"), torch.ones(2, device="cuda"))
    output = cuda.normalize(input, *vectors, None, None)
    assert output[-1, 1, -1] == 0.5
    assert output[0, 1, 0] == -0.5
    sums, _ = cuda.backward_reduce(input, input, *vectors, torch.float32)
    assert sums.tolist() == [0.0, 1.0, 0.0, 0.5]
    del output
    counts = torch.tensor(float(count), device="cuda", dtype=torch.float64)
    gradient = cuda.backward_elementwise(input, input, *vectors, None, sums, counts)
    assert gradient[-1, 1, -1] == 1.0


def peak_of(layer, input, grad):
    gc.collect()  # what other tests have left
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(layer(input), (input, layer.weight, layer.bias), grad)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("layout", FORMATS)
def test_a_step_takes_no_more_memory_than_a_local_layer(layout):
    input, grad = (torch.randn(32, 64, 56, 56, device="cuda").to(memory_format=FORMATS[layout]) for _ in range(2))
    input.requires_grad_()
    ours, local = (peak_of(layer(64, device="cuda"), input, grad) for layer in (SyncBatchNorm, nn.BatchNorm2d))
    assert ours <= local + 2**21  # partial sums


def test_an_input_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layer = SyncBatchNorm(4, device="cuda:1")
    output = layer(torch.randn(8, 4, 5, device="cuda:1"))
    assert output.device.index == 1
    assert output.isfinite().all()


def test_a_layer_left_on_the_cpu_is_an_error_and_no_crash():
    input = torch.randn(8, 4, 5, 5, device="cuda")
    for _ in range(2):
        SyncBatchNorm(4, device="cuda")(input)
    with pytest.raises(ValueError, match="cpu tensor"):
        SyncBatchNorm(4)(input)
    assert SyncBatchNorm(4, device="cuda")(input).isfinite().all()
