"""The layer under Hugging Face Accelerate: torchrun --nproc-per-node 2 docs/accelerate_loop.py, or plain python."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from own_loop import make_data
from torch import nn

from syncbn import convert_sync_batchnorm


def main() -> None:
    """Trains for 20 steps."""
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 2))
    convert_sync_batchnorm(net)  # before prepare, which wraps
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))

    images, labels = make_data()
    for step in range(20):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(step))[:33]
        batch = order.tensor_split(world_size)[rank]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch], reduction="sum")
        accelerator.backward(loss * world_size / len(order))  # DDP's average is then the mean over the global batch
        optimizer.step()

    net.eval()
    with torch.no_grad():
        accuracy = (net(images).argmax(1) == labels).float().mean().item()
    if accelerator.is_main_process:
        print(f"accuracy {accuracy:.2f}  running_mean {net[1].running_mean[:3].tolist()}")
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
