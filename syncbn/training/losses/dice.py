"""Losses for masks that count images: Dice, and Dice with cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.losses.class_weights import Weights

_NO_LABEL = -100  # torch's own default for labels that do not count


class Dice:
    """1 - Dice of logits (N, num_classes, ...) and masks (N, ...) int64; its count is the images with a valid pixel.

    Of an image and a class c, with probabilities p and a target t of 0 and 1, over the pixels that are not ignored:

        1 - (2 sum(p_c t_c) + smooth) / (sum(p_c) + sum(t_c) + smooth)

    Its loss is the mean over those foreground classes (all but 0) that its target has, or its prediction, the most
    probable class, at any valid pixel; 0 for an image with none.

    Args:
        ignore_index: pixels of this value are excluded; None for no such value.
        smooth: above 0, a class that only the prediction has still gets a gradient.
    """

    def __init__(self, ignore_index: int | None = None, smooth: float = 0.0) -> None:
        self.ignore_index, self.smooth = ignore_index, smooth

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum over images and the number of images with a valid pixel (float64)."""
        losses, has_pixel = self.per_image(outputs, targets)
        return losses.sum(), has_pixel.sum(dtype=torch.float64)

    def output_shape(self, targets: Tensor, num_classes: int) -> tuple[int, ...]:
        """The shape of the outputs that these targets need."""
        return len(targets), num_classes, *targets.shape[1:]

    def per_image(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each image, (N,), 0 without a valid pixel; and whether it has one, (N,) bool."""
        valid = self._valid(targets).flatten(1)
        num = outputs.shape[1]
        classes = torch.arange(num, device=outputs.device)[:, None]
        # (N, num_classes, pixels); ignored pixels count for neither side
        is_target = (targets.flatten(1)[:, None] == classes) & valid[:, None]
        is_predicted = (outputs.argmax(1).flatten(1)[:, None] == classes) & valid[:, None]
        probabilities = outputs.flatten(2).softmax(1) * valid[:, None]
        overlap = (probabilities * is_target).sum(2)
        size = probabilities.sum(2) + is_target.sum(2)
        present = is_target.any(2) | is_predicted.any(2)
        present = present & (classes[:, 0] > 0)
        dice = (2 * overlap + self.smooth) / torch.where(present, size + self.smooth, 1.0)
        losses = torch.where(present, 1 - dice, 0.0).sum(1) / present.sum(1).clamp(min=1)
        return losses, valid.any(1)

    def _valid(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool) if self.ignore_index is None else targets != self.ignore_index


class CrossEntropyAndDice:
    """The sum of Dice (see `Dice`) and of cross entropy, which is averaged over the valid pixels of an image first.

    Logits are (N, num_classes, ...), masks (N, ...) int64; the count is the images with a valid pixel, for both.

    Args:
        weights: of classes, for the cross entropy; its average over an image is weighted then.
    """

    def __init__(
        self, weights: Weights, label_smoothing: float = 0.0, ignore_index: int | None = None, smooth: float = 0.0
    ) -> None:
        self.weights, self.label_smoothing, self.ignore_index = weights, label_smoothing, ignore_index
        self.dice = Dice(ignore_index, smooth)

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum over images and the number of images with a valid pixel (float64)."""
        dice, has_pixel = self.dice.per_image(outputs, targets)
        weights = self.weights.like(outputs)
        ignore = _NO_LABEL if self.ignore_index is None else self.ignore_index
        entropy = F.cross_entropy(
            outputs, targets, weights, reduction="none", label_smoothing=self.label_smoothing, ignore_index=ignore
        ).flatten(1)
        counted = targets != ignore
        shares = counted.to(outputs.dtype) if weights is None else weights[torch.where(counted, targets, 0)] * counted
        total = shares.flatten(1).sum(1)
        mean = entropy.sum(1) / torch.where(total > 0, total, 1.0)
        return (mean + dice).sum(), has_pixel.sum(dtype=torch.float64)

    def output_shape(self, targets: Tensor, num_classes: int) -> tuple[int, ...]:
        """The shape of the outputs that these targets need."""
        return self.dice.output_shape(targets, num_classes)
