"""Collectives on a GPU: NCCL in a world of one for the way through, two gloo ranks on one device for the numbers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.nn import collectives as nn_collectives
from syncbn.nn import groups
from tests.counting import collectives
from tests.gpu.test_layer import TORCH_WARNS, kernels_of, never_waiting
from tests.reference import expected_step, make_batch, max_error, run_step
from tests.training.jobs import read_metrics, run_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *TORCH_WARNS,
]


def check_step(sizes):
    rank = dist.get_rank()
    input, grad = make_batch((sum(sizes), 4, 6, 6), mean=100.0)
    expected = expected_step(input, grad, affine=False)
    layer = SyncBatchNorm(4, affine=False, dtype=torch.float64, device="cuda")
    actual = run_step(layer, *(tensor.split(sizes)[rank].cuda() for tensor in (input, grad)))
    assert max_error(actual.output.cpu(), expected.output.split(sizes)[rank]) < 1e-9
    assert max_error(actual.grad_input.cpu(), expected.grad_input.split(sizes)[rank]) < 1e-9
    assert max_error(actual.running_mean.cpu(), expected.running_mean) < 1e-10
    assert max_error(actual.running_var.cpu(), expected.running_var) < 1e-10


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (6, 0)], ids=str)
def test_two_ranks_on_one_device_compute_what_one_process_does(ranks, sizes):
    ranks(2, check_step, sizes)


def check_mixed():
    """A rank on the GPU and one on the CPU: the payloads are the same."""
    rank = dist.get_rank()
    input, grad = make_batch((6, 4, 6, 6))
    expected = expected_step(input, grad, affine=False)
    device = "cuda" if rank == 0 else "cpu"
    layer = SyncBatchNorm(4, affine=False, dtype=torch.float64, device=device)
    actual = run_step(layer, *(tensor.split([2, 4])[rank].to(device) for tensor in (input, grad)))
    assert max_error(actual.output.cpu(), expected.output.split([2, 4])[rank]) < 1e-11


def check_mixed_with_all_reduce():
    before, nn_collectives.GATHER_UP_TO = nn_collectives.GATHER_UP_TO, 0  # the CPU gathers in small worlds
    try:
        check_mixed()
    finally:
        nn_collectives.GATHER_UP_TO = before


def test_payloads_of_all_devices_add(ranks):
    ranks(2, check_mixed_with_all_reduce)


def check_ddp():
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    net = net.double().cuda()
    input = torch.randn(6, 3, 8, 8, dtype=torch.float64, device="cuda")
    net(input).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    wrapped = DistributedDataParallel(convert_sync_batchnorm(net), device_ids=[0])
    loss = wrapped(input.chunk(2)[rank]).square().sum()
    (loss * dist.get_world_size()).backward()  # DDP averages
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_ddp_trains_as_one_process(ranks):
    ranks(2, check_ddp)


def check_nccl():
    group = dist.new_group([0], backend="nccl")
    groups._force_collective = True
    try:
        layer = SyncBatchNorm(8, process_group=group, device="cuda")
        plain = SyncBatchNorm(8, process_group=dist.new_group([0]), device="cuda")
        input, grad = (tensor.float().cuda() for tensor in make_batch((6, 8, 5, 5)))
        with collectives() as sent:
            forced = run_step(layer, input, grad)
        assert [size for size, _ in sent] == [33, 16]
        # No waiting, and no more than one kernel each way for the collective.
        leaf = input.requires_grad_()
        with never_waiting():
            torch.autograd.grad(layer(leaf), (leaf, layer.weight, layer.bias), grad)
        forward, output = kernels_of(lambda: layer(leaf))
        assert len([name for name in forward if "nccl" not in name.lower()]) <= 4, forward
        assert len([name for name in forward if "nccl" in name.lower()]) <= 1, forward
        inputs = (leaf, layer.weight, layer.bias)
        backward, _ = kernels_of(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
        assert len([name for name in backward if "nccl" not in name.lower()]) <= 3, backward
        assert len([name for name in backward if "nccl" in name.lower()]) <= 1, backward
        check_graph_with_collective(layer, leaf.detach(), grad)
    finally:
        groups._force_collective = False
    alone = run_step(plain, input.detach(), grad)
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        torch.testing.assert_close(getattr(forced, name), getattr(alone, name), rtol=0, atol=0)


def check_graph_with_collective(layer, input, grad):
    leaf = input.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = torch.autograd.grad(layer(leaf), leaf, grad)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = torch.autograd.grad(layer(leaf), leaf, grad)
    graph.replay()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_nccl_in_a_world_of_one_with_the_collective_forced(ranks):
    ranks(1, check_nccl)


@pytest.mark.parametrize("overrides", [[], ["precision=bf16"], ["bn.own_group=true"]], ids=str)
def test_the_trainer_on_one_device(tmp_path, overrides):
    options = ["data=synthetic", "duration=2ep", "device=cuda", "tracker=none", *overrides]
    run = run_job(tmp_path, *options, num_ranks=1, timeout=250)
    losses = [record["val/loss"] for record in read_metrics(run) if "val/loss" in record]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)


def test_a_step_of_the_trainer_is_that_of_the_cpu(tmp_path):
    """The same job on both devices in float64."""
    losses = {}
    for device in ("cpu", "cuda"):
        options = ["data=synthetic", "data.num_samples=200", "duration=5", "eval_every=5", "precision=fp64"]
        run = run_job(tmp_path, *options, "tracker=none", f"device={device}", f"run={device}", timeout=250)
        losses[device] = [record["val/loss"] for record in read_metrics(run) if "val/loss" in record][-1]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-9)
