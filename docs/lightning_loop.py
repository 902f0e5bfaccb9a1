"""The layer under Lightning: torchrun --nproc-per-node 2 docs/lightning_loop.py, or plain python."""

import logging
import os
import warnings

import lightning
import torch
import torch.nn.functional as F
from own_loop import make_data
from torch import nn
from torch.utils.data import DataLoader

from syncbn.integrations.lightning import SyncBatchNormLayers


class Classifier(lightning.LightningModule):
    """A small network; each rank trains on its part of the global batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 2))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """The loss of this rank's samples, scaled so that DDP's average is the mean over the global batch."""
        images, labels = (part.tensor_split(self.trainer.world_size)[self.global_rank] for part in batch)
        return F.cross_entropy(self.net(images), labels, reduction="sum") * self.trainer.world_size / len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Trains for four epochs of four batches."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = make_data()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    loader = DataLoader([(images[n], labels[n]) for n in order.tolist()], batch_size=33)
    model = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy="ddp",
        plugins=[SyncBatchNormLayers()],
        use_distributed_sampler=False,  # every rank gets the global batch and takes its part: nothing padded or doubled
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    assert type(model.net[1]) is nn.BatchNorm2d  # as before
    if trainer.is_global_zero:
        model.eval()
        accuracy = (model.net(images).argmax(1) == labels).float().mean().item()
        print(f"accuracy {accuracy:.2f}  running_mean {model.net[1].running_mean[:3].tolist()}")
    if torch.distributed.is_initialized():  # Lightning leaves it; a process that ends with gloo's threads may abort
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
