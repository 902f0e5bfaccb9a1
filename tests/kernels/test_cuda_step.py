"""Whole passes on CUDA do what the operators do one by one, bit for bit: on a GPU if there is one, else interpreted."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.kernels import cuda, cuda_step
from syncbn.kernels.step import Statistics
from syncbn.kernels.triton import launch_plan
from tests.kernels.test_cuda import DEVICE, _tiles, clear_plans, make

pytest.importorskip("triton", reason="Triton is there on Linux only")
from syncbn.kernels.triton import programs

tiles = _tiles

OPTIONS = {
    "plain": {},
    "channels last": {"layout": "rows"},
    "half": {"dtype": torch.bfloat16},
    "no affine": {"affine": False},
    "cumulative": {"momentum": None},
    "not tracked": {"tracked": False},
    "two ranks": {"ranks": 2},
    "relu": {"activation": "relu"},
    "silu, residual, two ranks": {"activation": "silu", "residual": True, "ranks": 2},
}
TELLING = ("plain", "half", "silu, residual, two ranks")  # enough of them, where the others are `slow`


def operands(affine=True, momentum=0.1, tracked=True, dtype=torch.float32, layout="contiguous", residual=False, **_):
    torch.manual_seed(0)
    input, grad = make((6, 4, 9, 7), dtype, layout)
    vectors = [torch.linspace(0.5, 1.5, 4, device=DEVICE), torch.linspace(-1, 1, 4, device=DEVICE)]
    buffers = [torch.full((4,), 0.5, device=DEVICE), torch.full((4,), 2.0, device=DEVICE)]
    tracking = (*buffers, torch.tensor(3, device=DEVICE)) if tracked else (None, None, None)
    added = grad.flip(0) if residual else None
    return input, grad, *(vectors if affine else (None, None)), added, Statistics(*tracking, momentum, 1e-5)


def by_steps(activation=None, ranks=1, **options):
    input, grad, weight, bias, residual, statistics = operands(**options)
    total = None if ranks == 1 else (lambda tensor: tensor.mul_(ranks))
    output, mean, invstd, count = cuda_step.forward(input, weight, bias, residual, activation, statistics, total)
    kept = output if residual is not None and activation == "relu" else residual
    gradients = cuda_step.backward(
        grad, input, mean, invstd, weight, bias, kept, activation, count, torch.float32, total, True, True
    )
    return output, mean, invstd, count, *gradients, *statistics[:3]


def by_operators(activation=None, ranks=1, **options):
    input, grad, weight, bias, residual, statistics = operands(**options)
    packed = cuda.moments(input) * ranks
    mean, invstd, count = cuda.finish(packed, *statistics, torch.float32)
    output = cuda.normalize(input, mean, invstd, weight, bias, residual, activation)
    kept = output if residual is not None and activation == "relu" else residual
    if activation is None:
        sums, affine = cuda.backward_reduce(grad, input, mean, invstd, torch.float32)
    else:
        sums, affine, grad = cuda.activated_reduce(
            grad, input, mean, invstd, weight, bias, kept, activation, torch.float32
        )
    grad_input = cuda.backward_elementwise(grad, input, mean, invstd, weight, sums * ranks, count)
    return output, mean, invstd, count, grad_input, affine, grad, *statistics[:3]


def check_same_bits(options, monkeypatch):
    monkeypatch.setattr(cuda_step, "_kinds", {})
    for one, other in zip(by_steps(**options), by_operators(**options), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.stride() == other.stride())


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_bits_as_by_operators(options, monkeypatch):
    check_same_bits(options, monkeypatch)


@pytest.fixture
def _several_tiles_of_a_channel(monkeypatch):
    """Six tiles of 64 values for each channel of `operands`, of one program."""
    monkeypatch.setattr(launch_plan, "_SUM_TILE", 64)
    monkeypatch.setattr(launch_plan, "_TILES_PER_PROGRAM", 7)
    clear_plans()
    yield
    clear_plans()


@pytest.mark.usefixtures("_several_tiles_of_a_channel")
@pytest.mark.parametrize(
    "name", [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_the_same_bits_where_a_program_reads_several_tiles_of_its_channel(name, monkeypatch):
    check_same_bits(OPTIONS[name], monkeypatch)


def test_a_channel_that_one_program_can_hold_takes_one_launch_each_way(monkeypatch):
    names = []
    monkeypatch.setattr(cuda_step, "_kinds", {})
    monkeypatch.setattr(programs, "launch", lambda program, *_: names.append(program.fn.__name__))
    by_steps()
    assert names == ["forward_channel", "backward_channel"]
    names.clear()
    by_steps(ranks=2)
    assert names == ["moments", "finish", "normalize", "backward_sums", "backward_elementwise"]


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_would_need_a_copy_or_is_observed_is_left_to_the_operators():
    input, grad, weight, bias, _, statistics = operands()
    arguments = (weight, bias, None, None, statistics, None)
    assert cuda_step.forward(torch.stack([input, input], -1)[..., 0], *arguments) is None
    assert cuda_step.forward(input[:0], *arguments) is None
    assert cuda_step.forward(input, weight, bias, grad.transpose(2, 3), None, statistics, None) is None
    assert cuda_step.forward(input, torch.stack([weight, weight], -1)[:, 0], *arguments[1:]) is None
    with Seeing():
        assert cuda_step.forward(input, *arguments) is None
    assert statistics.num_batches_tracked == 3


def test_autograd_learns_that_running_statistics_are_written():
    for moved in (
        lambda input, weight, bias, statistics: cuda_step.forward(input, weight, bias, None, None, statistics, None),
        lambda input, _weight, _bias, statistics: cuda.finish(cuda.moments(input), *statistics, torch.float32),
    ):
        input, _, weight, bias, _, statistics = operands()
        before = [buffer._version for buffer in statistics[:3]]
        moved(input, weight, bias, statistics)
        assert all(buffer._version > old for buffer, old in zip(statistics[:3], before, strict=True))
