"""A training loop of your own: torchrun --nproc-per-node 2 docs/own_loop.py, or plain python for one process."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from syncbn import convert_sync_batchnorm, freeze


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """100 images of two kinds, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    return torch.randn(100, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels


def wrap(model: nn.Module) -> nn.Module:
    """The model in DDP, which keeps the list of trained parameters that it finds here."""
    if not dist.is_initialized():
        return model
    wrapped = DistributedDataParallel(model)
    # Running statistics are equal on all ranks already. From torch 2.13 on: the argument forward_sync_buffers=False.
    wrapped.broadcast_buffers = False
    return wrapped


def main() -> float:
    """Trains for 8 epochs; returns the accuracy on the training images."""
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    torch.manual_seed(0)  # the same initial weights on every rank
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 2))
    convert_sync_batchnorm(model)  # before DDP wraps
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images, labels = make_data()
    sampler = DistributedSampler(labels, world_size, rank)
    loader = DataLoader(TensorDataset(images, labels), batch_size=32 // world_size, sampler=sampler)

    for epoch in range(8):
        sampler.set_epoch(epoch)  # without it every epoch has the order of the first
        if epoch == 6:
            freeze(model, "1")  # the layer's statistics, gamma and beta stay as they are from here on
            del wrapped  # the old DDP
            wrapped = wrap(model)  # DDP waits for gradients that no longer come: wrap again after freeze and unfreeze
        for batch, targets in loader:
            count = torch.tensor(float(len(targets)))
            if world_size > 1:
                dist.all_reduce(count)  # samples of the global batch: 32, and 4 in the last step
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(batch), targets, reduction="sum")
            (loss * world_size / count).backward()  # DDP divides by the world size: the mean over the global batch
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
