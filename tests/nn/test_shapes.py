"""Any shape, any cut over ranks, any layout and type: hypothesis looks for one that differs from one process."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncbn import SyncBatchNorm, sync_batch_norm
from tests.reference import expected_step, make_batch, max_error, run_step, set_affine

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1}


def check_case(shape, sizes, dtype, layout, grad_layout, options):
    rank = dist.get_rank()
    input, grad = (tensor.to(dtype) for tensor in make_batch((sum(sizes), *shape), mean=1.0))
    flat = [tensor.flatten(2) if tensor.dim() > 2 else tensor for tensor in (input, grad)]  # the reference stops at 5D
    expected = expected_step(*flat, **options)
    layer = SyncBatchNorm(shape[0], dtype=torch.float64 if dtype == torch.float64 else None, **options)
    if layer.weight is not None:
        set_affine(layer)
    mine = LAYOUTS[layout](input.split(sizes)[rank])
    before = mine.clone()
    actual = run_step(layer, mine, LAYOUTS[grad_layout](grad.split(sizes)[rank]))
    bound = BOUNDS[dtype]
    for ours, theirs in ((actual.output, expected.output), (actual.grad_input, expected.grad_input)):
        assert ours.shape == mine.shape
        assert max_error(ours, theirs.split(sizes)[rank].view(ours.shape)) < bound * (1 + float(theirs.abs().max()))
    if layer.track_running_stats:
        assert max_error(actual.running_var, expected.running_var) < bound * (1 + float(expected.running_var.max()))
        assert actual.num_batches_tracked == 1
    assert torch.equal(mine, before)  # the input is never written to


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    channels=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 4), max_size=4),  # ranks 2 to 6
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),  # worlds of 1 to 4
    dtype=st.sampled_from(list(BOUNDS)),
    layout=st.sampled_from(list(LAYOUTS)),
    grad_layout=st.sampled_from(list(LAYOUTS)),
    options=st.sampled_from(
        [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}]
    ),
)
def test_any_shape_and_cut_equals_one_process(ranks, channels, spatial, sizes, dtype, layout, grad_layout, options):
    values_per_channel = sum(sizes) * torch.Size(spatial).numel()
    if values_per_channel < 2:  # undefined in the reference; tests of their own
        sizes = [*sizes[:-1], sizes[-1] + 2]
    ranks(len(sizes), check_case, (channels, *spatial), tuple(sizes), dtype, layout, grad_layout, options)


def check_uneven_spatial_sizes():
    """Each rank has images of another size; the statistics weight every pixel alike."""
    rank = dist.get_rank()
    parts = [make_batch((3, 4, 5, 7), seed=1), make_batch((2, 4, 2, 3), seed=2), make_batch((1, 4, 6, 1), seed=3)]
    flat = [torch.cat([t.movedim(1, 0).flatten(1).t() for t in tensors]) for tensors in zip(*parts, strict=True)]
    expected = expected_step(*flat)
    layer = SyncBatchNorm(4, dtype=torch.float64)
    set_affine(layer)
    actual = run_step(layer, *parts[rank])
    sizes = [part[0].numel() // 4 for part in parts]
    for ours, theirs in ((actual.output, expected.output), (actual.grad_input, expected.grad_input)):
        assert max_error(ours.movedim(1, 0).flatten(1).t(), theirs.split(sizes)[rank]) < 1e-10
    assert max_error(actual.running_var, expected.running_var) < 1e-12


def test_uneven_spatial_sizes(ranks):
    ranks(3, check_uneven_spatial_sizes)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((4, 3, 5, 6), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
        ((4, 3, 5, 6), torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_format_is_kept_forward_and_backward(shape, memory_format, mode, dtype):
    layer = SyncBatchNorm(3).train(mode != "evaluation")
    if mode == "frozen":
        layer.freeze()
    input = torch.randn(shape, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    output = layer(input)
    assert output.is_contiguous(memory_format=memory_format)
    other = torch.contiguous_format if memory_format != torch.contiguous_format else torch.channels_last
    [grad] = torch.autograd.grad(output, input, torch.randn(shape, dtype=dtype).to(memory_format=other))
    if mode == "training":  # elsewhere ATen decides: the gradient is a plain product with the incoming one
        assert grad.is_contiguous(memory_format=memory_format)


def check_single_rows():
    rank = dist.get_rank()
    input, grad = make_batch((3, 4))
    expected = expected_step(input, grad)
    layer = SyncBatchNorm(4, dtype=torch.float64)
    set_affine(layer)
    actual = run_step(layer, input[rank : rank + 1], grad[rank : rank + 1])
    assert max_error(actual.output, expected.output[rank : rank + 1]) < 1e-10
    assert max_error(actual.grad_input, expected.grad_input[rank : rank + 1]) < 1e-10


def test_one_row_per_rank_is_a_batch(ranks):
    ranks(3, check_single_rows)


def check_no_input_gradient():
    layer = SyncBatchNorm(3, dtype=torch.float64)
    input, grad = make_batch((6, 3, 4))
    layer(input.chunk(2)[dist.get_rank()]).backward(grad.chunk(2)[dist.get_rank()])
    total = layer.weight.grad.clone()
    dist.all_reduce(total)
    reference = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    reference(input).backward(grad)
    assert max_error(total, reference.weight.grad) < 1e-12


def test_an_input_that_needs_no_gradient(ranks):
    ranks(2, check_no_input_gradient)


def check_function():
    rank = dist.get_rank()
    input, grad = make_batch((6, 3, 4))
    expected = expected_step(input, grad, affine=False, momentum=0.25)
    running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
    output = sync_batch_norm(input.chunk(2)[rank], running_mean, running_var, training=True, momentum=0.25)
    assert max_error(output, expected.output.chunk(2)[rank]) < 1e-12
    assert max_error(running_mean, expected.running_mean) < 1e-14
    assert max_error(running_var, expected.running_var) < 1e-14
    evaluated = sync_batch_norm(input, running_mean, running_var)
    assert max_error(evaluated, torch.nn.functional.batch_norm(input, running_mean, running_var)) < 1e-12


def test_the_function_takes_batch_norms_arguments(ranks):
    ranks(2, check_function)
