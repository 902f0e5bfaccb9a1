"""A small U-Net (Ronneberger, Fischer, Brox 2015) that predicts a class per pixel."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalization and ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(out_channels),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(out_channels),
            relu2=nn.ReLU(),
        )
    )


class UnetSmall(nn.Module):
    """A U-Net of three sub-networks, for any height and width from 1 up.

    `encoder` halves height and width `depth` times, `decoder` doubles them again and concatenates the encoder's output
    at each resolution, and `head` is a 1x1 convolution to the classes.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(_block(*pair) for pair in pairwise([in_channels, *widths]))
        self.decoder = nn.ModuleList(_block(deep + flat, flat) for flat, deep in pairwise(widths))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes, H, W); N may be 0."""
        seen = []
        output = input
        for level, block in enumerate(self.encoder):
            # ceil_mode: odd sizes round up, so no pixel is dropped and a size of 1 stays 1
            output = block(output if level == 0 else F.max_pool2d(output, 2, ceil_mode=True))
            seen.append(output)
        for block, skipped in zip(reversed(self.decoder), reversed(seen[:-1]), strict=True):
            # Nearest upsampling by repeating, cropped to the skip connection: unlike interpolation, its gradient is
            # deterministic on every device.
            wider = output.repeat_interleave(2, -2).repeat_interleave(2, -1)[
                ..., : skipped.size(-2), : skipped.size(-1)
            ]
            output = block(torch.cat([wider, skipped], 1))
        return self.head(output)
