"""The Triton programs against the specification: on a GPU if there is one, else in Triton's interpreter (on CPU).

What only a GPU can show (no waiting, graphs, kernels counted) is in tests/gpu.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.kernels import cuda, reference
from syncbn.kernels.triton import launch_plan
from tests.training.jobs import ROOT

pytest.importorskip("triton", reason="Triton is there on Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU half of these for bfloat16 would do: the interpreter cuts it off where the GPU rounds it.
ROUNDOFF = {torch.float64: 1e-12, torch.float32: 6e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
NAMES = ("output", "gradient", "sums", "gradients of bias and weight", "running mean", "running variance", "counter")


# Small tiles take every loop of the programs; usual ones hold the small inputs of these tests whole.
SMALL_FIRST = ["small tiles", pytest.param("usual tiles", marks=pytest.mark.slow)]


@pytest.fixture(params=["usual tiles", "small tiles"])
def _tiles(request, monkeypatch):
    """Small tiles cut small inputs into as many parts as large ones."""
    if request.param == "small tiles":
        for name in ("_SUM_TILE", "_TILE", "_SMALL_TILE"):
            monkeypatch.setattr(launch_plan, name, 128)
        monkeypatch.setattr(launch_plan, "_PROGRAMS_PER_PROCESSOR", 16)
        monkeypatch.setattr(launch_plan, "_TILES_PER_PROGRAM", 1)
        monkeypatch.setattr(launch_plan, "_TILES_PER_ROWS_PROGRAM", 1)
        monkeypatch.setattr(launch_plan, "_COMBINED_NUMBERS", 32)
    clear_plans()
    yield
    clear_plans()


def clear_plans():
    launch_plan.plan_sums.cache_clear()
    launch_plan.plan_passes.cache_clear()


def make(shape, dtype, layout="contiguous", mean=0.7, std=1.0):
    """An input and a gradient; channels differ."""
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    input = (torch.randn(shape, dtype=torch.float64) * (1 + 0.1 * channel) + 0.3 * channel) * std + mean
    grad = torch.randn(shape, dtype=torch.float64)
    return [as_layout(tensor.to(DEVICE, dtype), layout) for tensor in (input, grad)]


def as_layout(tensor, layout):
    if layout == "rows":  # channels_last, of any rank
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "channels of rows":  # as a split of a channels_last activation leaves them
        wider = torch.cat([tensor, tensor], 1)
        return as_layout(wider, "rows")[:, : tensor.size(1)]
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


def run(kernels, input, grad, affine=True, momentum=0.1, eps=1e-5):
    num_channels = input.size(1)
    wide = reference.compute_dtype(input.dtype)
    options = {"dtype": wide, "device": DEVICE}
    weight, bias = torch.linspace(0.5, 1.5, num_channels, **options), torch.linspace(-1, 1, num_channels, **options)
    buffers = [torch.full((num_channels,), 0.5, **options), torch.full((num_channels,), 2.0, **options),
               torch.tensor(3, device=DEVICE)]  # fmt: skip
    mean, invstd, count = kernels.finish(kernels.moments(input), *buffers, momentum, eps, wide)
    output = kernels.normalize(input, mean, invstd, weight if affine else None, bias if affine else None)
    sums, of_affine = kernels.backward_reduce(grad, input, mean, invstd, wide)
    arguments = (grad, input, mean, invstd, weight if affine else None)
    grad_input = kernels.backward_elementwise(*arguments, sums, count)
    both = kernels.backward_local(*arguments, count, wide)
    torch.testing.assert_close(both, (grad_input, of_affine), rtol=0, atol=0, equal_nan=True)
    return output, grad_input, sums, of_affine, *buffers


def check(input, grad, bound=None, **options):
    actual = run(cuda, input, grad, **options)
    expected = run(reference, input.double(), grad.double(), **options)
    bound = ROUNDOFF[input.dtype] if bound is None else bound
    for one, other, name in zip(actual, expected, NAMES, strict=True):
        assert one.shape == other.shape
        if one.numel():
            allowed = bound if name in ("output", "gradient") else min(bound, 1e-6)
            error = float((one.double() - other).abs().max()) / max(1.0, float(other.abs().max()))
            assert error <= allowed, (name, error, allowed)
    vector = torch.ones(input.size(1), device=DEVICE, dtype=reference.compute_dtype(input.dtype))
    like = reference.normalize(input, torch.stack([vector, vector]), vector, None, None)
    for result in actual[:2]:
        assert result.dtype == input.dtype
        assert result.stride() == like.stride()


SHAPES = [(6, 4, 9, 7), (1, 3, 64), (70, 5), (2, 3, 4, 5, 6), (5, 1, 33), (300, 1), (3, 70, 2, 2), (3, 2, 1, 1),
          (1, 7, 5), (2, 4, 16, 16)]  # fmt: skip


@pytest.mark.parametrize("_tiles", SMALL_FIRST, indirect=True)
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("layout", ["contiguous", "rows", "channels of rows", "strided", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_and_rank(shape, layout):
    check(*make(shape, torch.float32, layout))


@pytest.mark.parametrize("_tiles", SMALL_FIRST, indirect=True)
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_every_type(dtype, layout):
    check(*make((4, 5, 8, 11), dtype, layout))


@settings(max_examples=12)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    layout=st.sampled_from(["contiguous", "rows", "strided", "transposed"]),
    dtype=st.sampled_from(list(ROUNDOFF)),
    affine=st.booleans(),
    momentum=st.sampled_from([0.1, 1.0, None]),
)
def test_any_shape(shape, layout, dtype, affine, momentum):
    check(*make(shape, dtype, layout), affine=affine, momentum=momentum)


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (10, 1), (1e3, 0.1), (1e3, 1e-2), (1e4, 1), (1e5, 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=str)
def test_means_far_from_zero(mean, std, dtype, bound, layout):
    input, _ = make((8, 2, 16, 16), dtype, layout, mean, std)
    wide = input.to(torch.float64)
    centred = wide - wide.mean((0, 2, 3), keepdim=True)
    centred -= centred.mean((0, 2, 3), keepdim=True)
    truth = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    shards = [cuda.moments(part) for part in input.split([3, 1, 4])]  # three ranks
    vectors = cuda.finish(sum(shards), None, None, None, 0.1, 1e-5, dtype)[:2]
    output = cuda.normalize(input, *vectors, None, None)
    assert float((output.double() - truth).abs().max()) < bound


@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_the_gradient_where_it_follows_an_input_far_from_zero(layout):
    input, noise = make((8, 2, 16, 16), torch.float32, layout, mean=1e4)
    grad = noise + 5 * (input - 1e4)
    results = []
    for kernels, x, g in ((cuda, input, grad), (reference, input.double(), grad.double())):
        mean, invstd, count = kernels.finish(kernels.moments(x), None, None, None, 0.1, 1e-5, x.dtype)
        sums, _ = kernels.backward_reduce(g, x, mean, invstd, torch.float64)
        results.append(kernels.backward_elementwise(g, x, mean, invstd, None, sums, count))
    assert float((results[0] - results[1]).abs().max()) < 1e-5


def test_payloads_are_cut_at_the_same_place_as_the_reference_cuts_them():
    input, _ = make((8, 6, 50), torch.float32, mean=100.0)
    actual, expected = cuda.moments(input), reference.moments(input)
    for part in (slice(0, 1), slice(1, 7), slice(13, 19)):  # the count and the high parts, which ranks add exactly
        assert torch.equal(actual[part], expected[part])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1])  # the pivot, and another value
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_what_is_not_finite_stays_in_its_channel(value, place, layout):
    input, grad = make((4, 3, 5, 5), torch.float32, layout)
    input[place, 1, 0, 0] = value
    for actual, expected in zip(run(cuda, input, grad), run(reference, input, grad), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 3), (4, 3, 0), (0, 3), (0, 3, 2, 2)], ids=str)
def test_nothing_to_normalize(shape):
    check(*make(shape, torch.float32))
    assert torch.equal(cuda.moments(torch.empty(shape, device=DEVICE)).cpu(), torch.zeros(4 * shape[1] + 1).double())


@pytest.mark.parametrize("count", [0.0, 1.0, 7.0])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [3, 300])
def test_running_statistics_move_as_in_the_reference(count, momentum, dtype, num_channels):
    single = torch.randn(1, num_channels, device=DEVICE, dtype=torch.float64)
    several = torch.randn(7, num_channels, device=DEVICE, dtype=torch.float64)
    packed = reference.moments(single) * count if count < 2 else reference.moments(several + 1)
    results = []
    for kernels in (cuda, reference):
        buffers = [torch.full((num_channels,), value, dtype=dtype, device=DEVICE) for value in (0.5, 2.0)]
        counter = torch.tensor(4, device=DEVICE)
        vectors = kernels.finish(packed, *buffers, counter, momentum, 1e-5, torch.float32)
        results.append((*vectors, *buffers, counter))
    rtol = {torch.float32: 2e-7, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-12)
    if count == 0:
        assert int(counter) == 4
        assert buffers[0].unique().tolist() == [0.5]


def test_no_running_statistics_and_no_counter():
    packed = reference.moments(torch.randn(8, 3, 4, device=DEVICE))
    buffers = [torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)]
    for arguments in ((None, None, None, 0.1), (*buffers, None, None), (*buffers, None, 0.5)):
        results = [kernels.finish(packed, *(None if a is None else a.clone() if isinstance(a, torch.Tensor) else a
                                            for a in arguments), 1e-5, torch.float32)
                   for kernels in (cuda, reference)]  # fmt: skip
        torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_gradients_and_vectors_of_any_stride():
    input, grad = make((4, 6, 5, 5), torch.float32)
    mean, invstd, count = reference.finish(reference.moments(input), None, None, None, 0.1, 1e-5, torch.float32)
    weight = torch.randn(12, device=DEVICE)[::2]
    for gradient in (grad, as_layout(grad, "rows"), grad[:, :1].expand_as(grad), grad.double(), grad.bfloat16()):
        results = [
            (*kernels.backward_local(gradient, input, mean, invstd, weight, count, torch.float64),
             kernels.normalize(input, mean, invstd, weight, weight[:1].expand(6)))
            for kernels in (cuda, reference)
        ]  # fmt: skip
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    running = torch.zeros(12, device=DEVICE)[::2]
    cuda.finish(reference.moments(input), running, running + 1, None, 1.0, 1e-5, torch.float32)
    torch.testing.assert_close(running, input.mean((0, 2, 3)))


def test_copies_keep_the_layout_and_are_made_only_where_they_are_needed():
    input, grad = make((4, 6, 5, 5), torch.float32, "channels of rows")
    dense, layout = cuda.as_dense(input)
    assert layout.last
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert cuda._same_layout(torch.empty_like(input), dense)  # so that the output needs no copy
    single = grad[:1].contiguous(memory_format=torch.channels_last)
    odd = single[0].unsqueeze(0)  # the same memory with another stride where there is one sample
    assert odd.stride() != single.stride()
    assert cuda._like(odd, single) is odd
    assert cuda._like(grad, dense) is not grad


def test_masks_take_the_reference_s_way():
    input, _ = make((4, 3, 5), torch.float32)
    mask = torch.rand(4, 1, 5, device=DEVICE) > 0.5
    assert torch.equal(cuda.moments(input, mask), reference.moments(input, mask))


def test_without_triton_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("programs", "elementwise", "reductions", "double_double", "tiles"):
        monkeypatch.delitem(sys.modules, f"syncbn.kernels.triton.{module}", raising=False)
        monkeypatch.delattr(f"syncbn.kernels.triton.{module}", raising=False)
    cuda._import_programs.cache_clear()
    input, grad = make((4, 3, 5), torch.float32)
    with pytest.warns(RuntimeWarning, match="Triton cannot be imported .* falls back to plain tensor code") as caught:
        actual = run(cuda, input, grad)
    assert len(caught) == 1  # once per process
    cuda._import_programs.cache_clear()
    for one, other in zip(actual, run(reference, input, grad), strict=True):
        assert torch.equal(one, other)


def test_a_type_that_no_program_knows_takes_the_reference_s_way():
    input = torch.randn(4, 3, 5, device=DEVICE).to(torch.float8_e5m2)
    assert torch.equal(cuda.moments(input), reference.moments(input))


PLANS = [
    ((64, 64, 56, 56), 4),
    ((64, 64, 3 * 2**18), 4),
    ((2, 2048, 7, 7), 2),
    ((256, 128), 8),
    ((1, 1, 2**33), 2),
    ((2**24, 1, 3), 4),
]


@pytest.mark.parametrize(("shape", "itemsize"), PLANS, ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_plans_cover_every_value_once(shape, itemsize, rows):
    input = torch.empty(shape, device="meta")
    _, layout = cuda.as_dense(input.movedim(1, -1).contiguous().movedim(-1, 1) if rows else input)
    sums, passes = launch_plan.plan_sums(layout, itemsize, 132), launch_plan.plan_passes(layout, itemsize, 132)
    num_channels, planes, units, tiles, across, per_split = sums.sizes
    assert planes * units * sums.moments["UNIT"] * (1 if layout.last else num_channels) == input.numel()
    assert across * sums.moments["BLOCK_COLS"] >= (1 if layout.last else layout.size)
    assert tiles == across * -(-planes // sums.moments["BLOCK_ROWS"])
    assert sums.grid[1] * per_split >= tiles > (sums.grid[1] - 1) * per_split
    assert sums.grid[1] <= 65535
    _, rows_, units, across = passes.sizes
    assert rows_ * units * passes.backward_elementwise["UNIT"] == input.numel()
    assert passes.grid[0] == across * -(-rows_ // passes.backward_elementwise["BLOCK_ROWS"]) < 2**31
    assert sums.moments["INT64_OFFSETS"] == passes.backward_elementwise["INT64_OFFSETS"] == (input.numel() > 2**31)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_program_compiles_for_an_h100_and_fits_into_its_registers(dtype, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compiling", dtype]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    programs = done.stdout.splitlines()
    assert {line.split()[0] for line in programs} == {
        "moments", "combine_moments", "combine_and_finish", "finish", "normalize", "backward_sums",
        "combine_backward_sums", "backward_elementwise", "forward_channel", "backward_channel",
    }  # fmt: skip
    # One value of a thread may spill: ptxas prefers that to fewer programs at a time (`backward_channel` of half types
    # with an activation and planes like 7 x 7: 4 bytes at 80 registers).
    assert all(int(re.search(r"spilled=(\d+)", line)[1]) <= 4 for line in programs), done.stdout
    if dtype == "float32":
        wide = [line for line in programs if "'UNIT': 4, 'BLOCK_ROWS': 2, 'BLOCK_COLS': 1024" in line]
        # 16 bytes at a time: loaded, or copied (.cg copies no less).
        assert wide and all("ld.global.v4" in line or "cp.async.cg" in line for line in wide)  # noqa: PT018


def test_the_dispatcher_has_them_all_and_nothing_imports_triton_before_it_is_needed():
    code = (
        "import sys, torch; from syncbn.kernels import operators\n"
        "names = [n.split('::')[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith('syncbn::')]\n"
        "print(sorted(n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f'syncbn::{n}', 'CUDA')))\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    operators = [
        "activated_reduce",
        "backward_elementwise",
        "backward_elementwise_",
        "backward_local",
        "backward_reduce",
        "finish",
        "moments",
        "normalize",
    ]
    assert done.stdout.splitlines() == [str(operators), "False"]
