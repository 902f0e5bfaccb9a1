"""FSDP2 and device meshes."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from syncbn import SyncBatchNorm, freeze
from tests.reference import make_batch


class Net(nn.Module):
    """Layers with plain weights around ours; `plain=True` for the reference in one process."""

    def __init__(self, plain=False):
        super().__init__()
        torch.manual_seed(0)
        kind = nn.BatchNorm2d if plain else SyncBatchNorm
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), kind(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), kind(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_trajectory():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net, reference = Net().double(), Net(plain=True).double()
    for part in (net.stem, net.body, net):
        fully_shard(part)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (net, reference)]
    for step in range(5):
        batch, _ = make_batch((9, 3, 8, 8), mean=3.0, seed=step)
        shards = batch.split([5, 3, 1] if world_size == 3 else [6, 3])
        for model, inputs, optimizer in zip((net, reference), (shards[rank], batch), optimizers, strict=True):
            optimizer.zero_grad()
            # Uneven shards: FSDP averages over ranks, so each rank's sum is scaled to a mean over the global batch.
            factor = world_size / len(batch) if model is net else 1 / len(batch)
            (model(inputs).square().sum() * factor).backward()
            optimizer.step()
    expected = reference.state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(full(value), expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("world_size", [2, 3])
def test_under_fully_shard_the_trajectory_is_that_of_one_process(ranks, world_size):
    ranks(world_size, check_trajectory)


def check_mixed_precision(output_dtype):
    rank = dist.get_rank()
    net, reference = Net(), Net(plain=True).double()
    for part in (net.stem, net.body, net):
        last = output_dtype if part is net else None
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=last)
        fully_shard(part, mp_policy=policy)
    batch, _ = make_batch((12, 3, 8, 8), mean=50.0)
    output = net(batch.split([8, 4])[rank].float())
    output.float().sum().backward()
    reference(batch)
    assert output.dtype == (output_dtype or torch.bfloat16)
    layer = net.stem[1]
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32  # statistics stay wide
    # The input is rounded to bfloat16 (8 bits) and multiplied by rounded weights; averages over 432 values are closer.
    torch.testing.assert_close(layer.running_mean.double(), reference.stem[1].running_mean, rtol=0.02, atol=0.02)
    gathered = [torch.zeros_like(layer.running_var) for _ in range(2)]
    dist.all_gather(gathered, layer.running_var)
    assert torch.equal(gathered[0], gathered[1])
    assert all(full(parameter.grad).isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("output_dtype", [None, torch.float32])
def test_a_mixed_precision_policy_narrows_activations_and_not_statistics(ranks, output_dtype):
    ranks(2, check_mixed_precision, output_dtype)


def check_frozen_under_fully_shard():
    net = Net().double()
    batch, _ = make_batch((8, 3, 8, 8))
    freeze(net, "stem")
    for part in (net.stem, net.body, net):
        fully_shard(part)
    before = copy.deepcopy(dict(net.stem[1].named_buffers()))
    net(batch).sum().backward()
    torch.testing.assert_close(dict(net.stem[1].named_buffers()), before, rtol=0, atol=0)
    assert net.stem[1].weight.grad is None
    assert net.body[1].weight.grad is not None


def test_frozen_layers_stay_frozen_under_fully_shard(ranks):
    ranks(2, check_frozen_under_fully_shard)


def check_a_mesh():
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "data"))
    batch, _ = make_batch((8, 3, 4, 4), mean=5.0)
    layer = SyncBatchNorm(3, process_group=mesh["data"]).double()
    layer(batch.split(2)[rank])
    reference = nn.BatchNorm2d(3, dtype=torch.float64)
    reference(batch.split(4)[rank // 2])  # ranks 0 and 1, or 2 and 3
    torch.testing.assert_close(layer.state_dict(), reference.state_dict(), rtol=1e-10, atol=1e-10)
    copy.deepcopy(layer)(batch.split(2)[rank])
    with pytest.raises(RuntimeError, match="summed over a sub-group of 2 ranks"):
        pickle.loads(pickle.dumps(layer))(batch)
    with pytest.raises(ValueError, match=r'one-dimensional DeviceMesh, got .*mesh\["data"\]'):
        SyncBatchNorm(3, process_group=mesh).double()(batch)


def test_a_one_dimensional_mesh_is_a_group(ranks):
    ranks(4, check_a_mesh)
