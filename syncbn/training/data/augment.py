"""Random augmentation as a function of (seed, epoch, sample), the same for any number of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.data.randomness import Draw, integers

_LARGE = 2**14  # values of an image from which on copies of its rows are quicker than one gather over the batch


def augment(images: Tensor, index: Tensor, shift: int, flip: bool, seed: int, epoch: int, *, fill: int = 0) -> Tensor:
    """Shifts each image by up to `shift` pixels along both axes and, if `flip`, mirrors half of them left to right.

    Args:
        images: (N, C, H, W).
        index: (N,) int64, the samples' positions in the data set (see also `occurrences`); with seed and epoch they
            determine the draws.
        fill: value of the pixels that a shift brings in at the border.

    Returns:
        (N, C, H, W); `images` itself if there is nothing to do.
    """
    num, channels, height, width = images.shape
    if num == 0 or (shift == 0 and not flip):
        return images
    if channels * height * width >= _LARGE and shift < min(height, width):
        return _one_by_one(images, index, shift, flip, seed, epoch, fill)
    if shift:
        rows = torch.arange(height) + integers(2 * shift + 1, index, seed, epoch, Draw.SHIFT_Y)[:, None]
        columns = torch.arange(width) + integers(2 * shift + 1, index, seed, epoch, Draw.SHIFT_X)[:, None]
    else:
        rows, columns = torch.arange(height).expand(num, -1), torch.arange(width).expand(num, -1)
    if flip:
        mirrored = integers(2, index, seed, epoch, Draw.FLIP).bool()[:, None]
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, [shift] * 4, value=fill)
    sample = torch.arange(num)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _one_by_one(images: Tensor, index: Tensor, shift: int, flip: bool, seed: int, epoch: int, fill: int) -> Tensor:
    """What `augment` returns, by copies of rectangles."""
    num, _, height, width = images.shape
    downs, rights, mirrored = [0] * num, [0] * num, [0] * num
    if shift:
        downs, rights = (
            (integers(2 * shift + 1, index, seed, epoch, axis) - shift).tolist()
            for axis in (Draw.SHIFT_Y, Draw.SHIFT_X)
        )
    if flip:
        mirrored = integers(2, index, seed, epoch, Draw.FLIP).tolist()
    augmented = torch.empty_like(images)
    for image, result, down, right, is_mirrored in zip(images, augmented, downs, rights, mirrored, strict=True):
        top, left, bottom, end = max(0, -down), max(0, -right), min(height, height - down), min(width, width - right)
        part = image[:, top + down : bottom + down, left + right : end + right]
        if part.numel() < image.numel():
            result.fill_(fill)
        if is_mirrored:
            part, left, end = part.flip(-1), width - end, width - left
        result[:, top:bottom, left:end] = part
    return augmented
