"""A model for batches of images that have different sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from syncbn.nn.lockstep import forward_together
from syncbn.training.data.by_size import BySize


class LockstepModel(nn.Module):
    """A wrapper that takes a `BySize` and returns a list, the model's output for each size.

    Batch normalizations in training mode see all images of the batch at once, see `nn.lockstep`.
    """

    wrapped_child = "model"  # patterns and names of modules skip this wrapper

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: BySize) -> list[Any]:
        """The outputs of the model, by size.

        Raises:
            Exception: what the model raises, with a note of the sizes.
        """
        try:
            return forward_together(self.model, images.parts)
        except Exception as error:
            sizes = ", ".join("{}x{}".format(*part.shape[-2:]) for part in images.parts)
            error.add_note(f"data.size=native: the images of this batch have {sizes} pixels, height by width")
            raise
