"""Three mistakes that train worse on several ranks than in one process, and what parity says: python this file."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from syncbn import convert_sync_batchnorm, parity
from syncbn.auditing.rules import table


class Detector(nn.Module):
    """Says for each pixel whether an object is there; the head was written after the backbone was converted."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        convert_sync_batchnorm(self.backbone)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1, H, W)."""
        return self.head(self.backbone(images))


def per_object(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Divides by the number of objects, as detectors do: by that of this rank."""
    total = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    return total / targets.sum().clamp(min=1)


class Student(nn.Module):
    """Prototypes whose scores are centred by a moving average, as in DINO, which gathers it over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(1), nn.Linear(192, 16), nn.GELU())
        self.prototypes = nn.Linear(16, 4)
        self.register_buffer("center", torch.zeros(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (N, 4)."""
        scores = self.prototypes(self.encoder(images))
        centred = scores - self.center
        self.center = 0.9 * self.center + 0.1 * scores.detach().mean(0)
        return centred


def build_encoder() -> nn.Module:
    """Embeddings (N, 8) of images."""
    return nn.Sequential(nn.Flatten(1), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8))


def contrastive(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Supervised contrastive: each sample against all others of this rank; a sum and a count, as it should be."""
    z = F.normalize(outputs)
    likeness = (z @ z.T / 0.1).log_softmax(1)
    is_same = (targets[:, None] == targets[None]).to(z.dtype)
    return -(likeness * is_same).sum(), torch.tensor(len(z))


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum and a count."""
    return F.cross_entropy(outputs, targets, reduction="sum"), torch.tensor(len(targets))


def mistakes() -> list[tuple[Any, Any, Any]]:
    """Model, loss and batch of each."""
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 4
    objects = (torch.rand(12, 1, 8, 8) < torch.linspace(0.01, 0.2, 12).view(-1, 1, 1, 1)).float()
    return [
        (Detector, per_object, (images, objects)),
        (Student, cross_entropy, (images, labels)),
        (build_encoder, contrastive, (images, labels)),
    ]


if __name__ == "__main__":
    for build, loss, batch in mistakes():
        print(f"{build.__name__}\n{table(parity(build, loss, batch))}\n")
