"""Residual and activation inside of the operators against the same in operators of their own."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncbn.kernels import cpu, cpu_blocks, cuda, reference
from syncbn.kernels.activations import ACTIVATIONS, backward
from tests.kernels.test_cpu import as_layout

pytest.importorskip("triton", reason="Triton is there on Linux only")

DEVICE = {cpu: "cpu", cuda: "cuda" if torch.cuda.is_available() else "cpu", reference: "cpu"}
KERNELS = [pytest.param(kernels, id=kernels.__name__.split(".")[-1]) for kernels in DEVICE]
CASES = list(itertools.product([None, *ACTIVATIONS], [False, True]))
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LIKE_OTHERS = (torch.float32, torch.float16)  # types that go the way of another one, most of them only in `slow` tests


def make(kernels, shape, dtype, layout="contiguous", mean=0.3):
    """Input, gradient, residual, and what normalizes: mean, invstd, weight, bias."""
    tensors = [as_layout(torch.randn(shape, dtype=torch.float64).to(dtype), layout) for _ in range(3)]
    tensors[0] = tensors[0] + mean
    wide = reference.compute_dtype(dtype)
    vectors = reference.finish(reference.moments(tensors[0]), None, None, None, None, 1e-5, wide)[:2]
    affine = torch.linspace(0.5, 1.5, shape[1]), torch.linspace(-1, 1, shape[1])
    on_device = [tensor.to(DEVICE[kernels]) for tensor in (*tensors, *vectors, *affine)]
    return on_device[:3], on_device[3:]


def separately(kernels, input, grad, residual, vectors, activation, dtype):
    """Output, gradient of what goes into the activation, its sums, and the gradient of the input, one by one."""
    z = kernels.normalize(input, *vectors)
    z = z if residual is None else z + residual
    output, through = z, grad
    if activation is not None:
        output, through = ACTIVATIONS[activation](z), backward(grad, z, activation)
    sums, _ = kernels.backward_reduce(through, input, *vectors[:2], dtype)
    count = torch.tensor(
        float(max(1, input.numel() // max(1, input.size(1)))), dtype=torch.float64, device=input.device
    )
    grad_input = kernels.backward_elementwise(through, input, *vectors[:3], sums, count)
    return output, through, sums, grad_input, count


def check(kernels, shape, dtype, layout, activation, with_residual, mean=0.3):
    (input, grad, residual), vectors = make(kernels, shape, dtype, layout, mean)
    residual = residual if with_residual else None
    wide = reference.compute_dtype(dtype)
    output, through, sums, grad_input, count = separately(kernels, input, grad, residual, vectors, activation, wide)
    actual = kernels.normalize(input, *vectors, residual, activation)
    assert actual.dtype == dtype
    assert actual.stride() == torch.empty_like(input).stride()
    # An exponential may be rounded otherwise in a vector; and Triton's interpreter cuts bfloat16 off.
    is_exact = activation != "silu" and not (kernels is cuda and dtype == torch.bfloat16)
    bound = 0.0 if is_exact else BOUNDS[dtype]
    torch.testing.assert_close(actual, output, rtol=bound, atol=bound)
    if activation is None:
        return
    kept = None if residual is None else residual if activation == "silu" else actual
    found = kernels.activated_reduce(grad, input, *vectors, kept, activation, wide)
    torch.testing.assert_close(found[2], through, rtol=bound, atol=bound)
    allowed = BOUNDS[dtype] * max(1.0, float(count))
    torch.testing.assert_close(found[0], sums, rtol=1e-6, atol=1e-6 * float(count) if is_exact else allowed)
    torch.testing.assert_close(found[1], found[0].view(2, -1).to(wide))
    kernels.backward_elementwise_(found[2], input, *vectors[:3], found[0], count)
    assert found[2].stride() == torch.empty_like(input).stride()
    torch.testing.assert_close(found[2], grad_input, rtol=BOUNDS[dtype], atol=10 * BOUNDS[dtype])


SHAPES = [(6, 4, 9, 7), (70, 5), (2, 3, 4, 5, 6), (5, 1, 33), (3, 2, 1, 1), (0, 3, 4), (4, 0, 3)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_same_in_one_pass_in_every_layout(kernels, shape, layout):
    for activation, with_residual in CASES:
        check(kernels, shape, torch.float32, layout, activation, with_residual)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=pytest.mark.slow) if dtype in LIKE_OTHERS else dtype for dtype in BOUNDS],
    ids=str,
)
@pytest.mark.parametrize("kernels", KERNELS)
def test_in_every_type(kernels, dtype):
    for activation, with_residual in CASES:
        check(kernels, (4, 5, 8, 11), dtype, "contiguous", activation, with_residual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_channels_far_from_zero(kernels, layout):
    for activation, with_residual in CASES:
        check(kernels, (4, 5, 8, 11), torch.float32, layout, activation, with_residual, mean=100.0)


@given(
    block=st.sampled_from([64, 300, 2000]),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_however_the_cpu_cuts_it(block, shape, layout, case, dtype):
    usual, cpu_blocks._BLOCK = cpu_blocks._BLOCK, block
    try:
        check(cpu, tuple(shape), dtype, layout, *case)
    finally:
        cpu_blocks._BLOCK = usual


def test_planes_longer_than_a_block_are_cut_too():
    for case in CASES:
        check(cpu, (2, 3, 600, 601), torch.float32, "contiguous", *case)
        check(cpu, (2, 3, 600, 601), torch.float32, "channels_last", *case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_not_a_number_stays_one(kernels, activation):
    (input, grad, residual), vectors = make(kernels, (3, 2, 4), torch.float32)
    input[0, 1, 0] = residual[1, 1, 0] = torch.nan
    for added in (None, residual):
        expected = separately(kernels, input, grad, added, vectors, activation, torch.float32)
        output = kernels.normalize(input, *vectors, added, activation)
        assert torch.equal(output.isnan(), expected[0].isnan())
        kept = None if added is None else added if activation == "silu" else output
        through = kernels.activated_reduce(grad, input, *vectors, kept, activation, torch.float32)[2]
        assert torch.equal(through.isnan(), expected[1].isnan())


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_of_any_stride_and_vectors_that_are_missing(kernels):
    (input, grad, residual), (mean, invstd, _, _) = make(kernels, (4, 6, 5, 5), torch.float32)
    for gradient in (grad[:, :1].expand_as(grad), grad.contiguous(memory_format=torch.channels_last)):
        for activation in ACTIVATIONS:
            kept = residual if activation == "silu" else kernels.normalize(input, mean, invstd, None, None, residual)
            sums, _, through = kernels.activated_reduce(
                gradient, input, mean, invstd, None, None, kept, activation, torch.float32
            )
            z = kernels.normalize(input, mean, invstd, None, None, residual)
            torch.testing.assert_close(through, backward(gradient, z, activation), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sums[:6].float(), through.sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
