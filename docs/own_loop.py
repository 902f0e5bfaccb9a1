"""The layer in a training loop of your own: torchrun --nproc-per-node 2 docs/own_loop.py, or plain python."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """100 images of two kinds, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    return torch.randn(100, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels


def main() -> float:
    """Trains for 20 steps; returns the accuracy on the training images."""
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    torch.manual_seed(0)  # the same initial weights on every rank
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 2))
    convert_sync_batchnorm(model)  # before DDP wraps
    wrapped: nn.Module = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model)
        # The statistics are equal on all ranks already: DDP need not send them around before every forward. (The same
        # as its argument `forward_sync_buffers=False`, which is missing before torch 2.13.)
        wrapped.broadcast_buffers = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    images, labels = make_data()
    for step in range(20):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(step))  # the same on every rank
        batch = order[:33].tensor_split(world_size)[rank]  # 17 and 16 samples on two ranks: uneven is fine
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(images[batch]), labels[batch], reduction="sum")
        # DDP divides by the world size; the mean over the global batch divides by 33.
        (loss * world_size / 33).backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    if rank == 0:
        print(f"accuracy {accuracy:.2f}  running_mean {model[1].running_mean[:3].tolist()}")
    if dist.is_initialized():
        del wrapped, model, optimizer  # gloo can abort a process that ends with a DDP alive
        gc.collect()
        dist.destroy_process_group()
    return accuracy


if __name__ == "__main__":
    main()
