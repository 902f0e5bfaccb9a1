"""Masks of a model in the size of the image that they are for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.data.dataset import IGNORE
from syncbn.training.data.preparation import placement


def mask_in_original_size(scores: Tensor, fit: str, size: tuple[int, int]) -> Tensor:
    """The class of each pixel of an image, from scores for the pixels of what it was fitted to.

    Scores are interpolated bilinearly before the best class is chosen.

    Args:
        scores: (K, h, w), floating point, on the CPU.
        fit: how the image was fitted, see `placement`.
        size: height and width of the image.

    Returns:
        (*size,) uint8; IGNORE where the image was cropped away.
    """
    if scores.shape[1:] == size:
        return scores.argmax(0).to(torch.uint8)
    height, width = size
    source, target = placement(fit, size, (scores.shape[1], scores.shape[2]))
    left, top, right, bottom = target
    inner = scores[None, :, top:bottom, left:right]
    rows, ys = _inside(source[1], source[3], height)
    columns, xs = _inside(source[0], source[2], width)
    grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1)[None].to(scores.dtype)
    best = torch.full(grid.shape[1:3], -math.inf, dtype=scores.dtype)
    classes = torch.zeros(grid.shape[1:3], dtype=torch.uint8)
    for number in range(scores.size(0)):  # one by one: all at once take much memory for a large image
        found = F.grid_sample(inner[:, number : number + 1], grid, padding_mode="border", align_corners=False)[0, 0]
        classes[found > best] = number
        best = torch.maximum(best, found)
    mask = torch.full(size, IGNORE, dtype=torch.uint8)
    mask[rows, columns] = classes
    return mask


def _inside(low: float, high: float, length: int) -> tuple[slice, Tensor]:
    """The pixels whose centres lie between `low` and `high`, and where those lie between -1 and 1."""
    first, last = max(0, math.ceil(low - 0.5)), min(length, math.ceil(high - 0.5))
    centres = torch.arange(first, last, dtype=torch.float64) + 0.5
    return slice(first, last), (centres - low) / (high - low) * 2 - 1
