"""A small network with the names of a residual network of torchvision or timm, and a file of its weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.training.images import save_classes


class Network(nn.Module):
    """conv1, bn1, layer1 (a block with batch normalization), fc."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images of any size."""
        return self.fc(self.layer1(self.bn1(self.conv1(images)).relu()).mean((2, 3)))


def save_download(directory: Path, network: nn.Module | None = None) -> tuple[str, ...]:
    """Writes a folder of photographs of three classes and weights for 1000; overrides of `experiment=fine_tuning`."""
    torch.manual_seed(0)
    network = Network() if network is None else network
    network.train()(torch.randn(8, 3, 64, 64) + 1)  # statistics that are not those of a layer that saw nothing
    save_file(network.state_dict(), directory / "weights.safetensors")
    save_classes(directory / "photos", {"bee": 12, "cat": 12, "dog": 12})
    return (f"data.path={directory / 'photos'}", "data.size=16", "data.workers=0",
            f"init.model.path={directory / 'weights.safetensors'}", "batch_size=8")  # fmt: skip


SMALL_NETWORK = ("model=custom", f"model._target_={__name__}.Network")
