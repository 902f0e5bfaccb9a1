"""A small residual network (He et al. 2016), for images of 8x8 to 64x64."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.training.config.model import CHANNELS_PER_GROUP

Norm = Callable[[int], nn.Module]  # makes a normalization layer for a number of channels


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in groups of 4 channels; it normalizes each sample by itself, independently of the batch."""
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with normalization and ReLU, and a shortcut: identity, or a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), bn=norm(out_channels))
            )

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        output = F.relu(self.bn1(self.conv1(input)))
        return F.relu(self.bn2(self.conv2(output)) + self.shortcut(input))


class ResnetSmall(nn.Module):
    """A residual network for small images, in two sub-networks: `backbone` (stem, stage1, stage2, ...) and `head`."""

    def __init__(
        self, in_channels: int, num_classes: int, width: int, depth: int, stages: int, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["stem"] = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(in_channels, width, 3, padding=1, bias=False), bn=norm(width), relu=nn.ReLU())
        )
        channels = width
        for stage in range(stages):
            out_channels = width * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(ResidualBlock(channels, out_channels, 2 if stage > 0 and block == 0 else 1, norm))
                channels = out_channels
            parts[f"stage{stage + 1}"] = nn.Sequential(*blocks)
        self.backbone = nn.Sequential(parts)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes); N may be 0."""
        return self.head(self.backbone(input).mean((2, 3)))
