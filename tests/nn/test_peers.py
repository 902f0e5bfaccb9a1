"""Where other synchronized batch normalizations are wrong: one test per defect, each against float64 or an exact count.

The number is that of the public issue in pytorch/pytorch unless another repository is named.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.torch_compat import ddp_without_buffer_sync
from tests.counting import collectives
from tests.reference import expected_step, make_batch, max_error, run_step


def check_ddp_on_cpu():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    single = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    single.load_state_dict(model.state_dict())
    wrapped = ddp_without_buffer_sync(convert_sync_batchnorm(model))
    input = make_batch((6, 3))[0]
    wrapped(input.chunk(2)[dist.get_rank()]).square().mean().backward()
    single(input).square().mean().backward()
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        assert max_error(ours.grad, theirs.grad) < 1e-12
    assert max_error(model[1].running_var, single[1].running_var) < 1e-14


def test_it_trains_on_cpu_and_under_ddp(ranks):
    """torch's raises on CPU once a process group exists, and DDP refuses it there."""
    ranks(2, check_ddp_on_cpu)


class Counter(TorchDispatchMode):
    """Counts operators that make the host wait for a value, or whose shape depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(wait in str(func) for wait in self.WAITS):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def check_no_waiting(momentum):
    layer = SyncBatchNorm(3, momentum=momentum)
    with Counter() as counter:
        input = torch.randn(0 if dist.get_rank() else 4, 3, 5, requires_grad=True)
        layer(input).sum().backward()
    assert counter.waits == []


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_operator_waits_for_a_value(ranks, momentum):
    """torch's waits in every forward, for a boolean mask (#36452, #78656), and for `.item()` with momentum=None."""
    ranks(2, check_no_waiting, momentum)


def check_traffic(num_channels):
    with collectives() as sent:
        layer = SyncBatchNorm(num_channels)
        layer(torch.randn(4, num_channels, requires_grad=True)).sum().backward()
    return [size for size, _ in sent]


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_is_sent_does_not_grow_with_the_world(ranks, world_size):
    """torch's gathers W * (2C + 1) numbers; fairscale needs two collectives forward."""
    assert ranks(world_size, check_traffic, 8) == [[4 * 8 + 1, 2 * 8]] * world_size


def check_payload_type(dtype):
    with collectives() as sent:
        layer = SyncBatchNorm(3, dtype=dtype)
        input = torch.randn(0 if dist.get_rank() else 4, 3, dtype=dtype, requires_grad=True)
        output = layer(input)
        output.sum().backward()
    assert output.dtype == dtype
    return [kind for _, kind in sent]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_an_empty_rank_sends_the_type_that_all_others_send(ranks, dtype):
    """An empty half-precision rank of torch's sends another type than its peers; counts travel in float32 or less."""
    assert ranks(2, check_payload_type, dtype) == [[torch.float64] * 2] * 2


def check_far_means():
    input, grad = (tensor.float() for tensor in make_batch((64, 4, 8), mean=1000.0, std=0.01))
    expected = expected_step(input, grad, affine=False)
    rank = dist.get_rank()
    actual = run_step(SyncBatchNorm(4, affine=False), input.chunk(2)[rank], grad.chunk(2)[rank])
    assert max_error(actual.output, expected.output.chunk(2)[rank]) < 1e-6


def test_a_mean_far_from_zero_does_not_make_the_variance_negative(ranks):
    """detectron2's NaiveSyncBatchNorm computes E[x^2] - E[x]^2."""
    ranks(2, check_far_means)


def check_uneven_sizes():
    """Height and width differ between ranks: weights by values, not by ranks."""
    rank = dist.get_rank()
    parts = [make_batch((2, 3, 8, 8), mean=1.0, seed=1), make_batch((2, 3, 2, 2), mean=-1.0, seed=2)]
    flat = [
        torch.cat([tensor.movedim(1, 0).flatten(1).t() for tensor in tensors]) for tensors in zip(*parts, strict=True)
    ]
    expected = expected_step(*flat, affine=False)
    layer = SyncBatchNorm(3, affine=False, dtype=torch.float64)
    run_step(layer, *parts[rank])
    assert max_error(layer.running_mean, expected.running_mean) < 1e-14
    assert max_error(layer.running_var, expected.running_var) < 1e-14  # unbiased by the global count
    assert layer.num_batches_tracked == 1


def test_uneven_images_unbiased_variance_and_a_counter(ranks):
    """detectron2's is off by 0.19 with uneven sizes, its running variance is biased, and its counter stays 0."""
    ranks(2, check_uneven_sizes)


def check_empty_rank():
    rank = dist.get_rank()
    input, grad = make_batch((5, 3, 2))
    expected = expected_step(input, grad, affine=False)
    sizes = (5, 0)
    actual = run_step(
        SyncBatchNorm(3, affine=False, dtype=torch.float64), input.split(sizes)[rank], grad.split(sizes)[rank]
    )
    assert max_error(actual.grad_input, expected.grad_input.split(sizes)[rank]) < 1e-12
    assert max_error(actual.running_mean, expected.running_mean) < 1e-14


def test_an_empty_rank_gets_numbers_and_not_nan(ranks):
    """fairscale's is NaN on the empty rank; the tests of others assert only that it is not."""
    ranks(2, check_empty_rank)


def check_equal_bits():
    torch.manual_seed(dist.get_rank())
    layer = SyncBatchNorm(16)
    for _ in range(5):
        layer(torch.randn(3 + dist.get_rank(), 16, 4))
    for buffer in layer.buffers():
        gathered = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, buffer)
        assert all(torch.equal(other, buffer) for other in gathered)


def test_buffers_are_bit_equal_on_all_ranks_without_a_broadcast(ranks):
    """DDP overwrites every rank's statistics with rank 0's, before every forward, in evaluation too."""
    ranks(3, check_equal_bits)


def check_overflow():
    layer = SyncBatchNorm(2, dtype=torch.float32)
    layer(torch.full((2, 2), 3e38) * torch.tensor([[1.0], [-1.0]]))
    assert layer.running_mean.isfinite().all()


def test_values_near_the_largest_float32_do_not_overflow_the_sums(ranks):
    """Sums of squares in float32 overflow from 1.8e19 on."""
    ranks(2, check_overflow)
