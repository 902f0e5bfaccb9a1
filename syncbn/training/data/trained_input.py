"""The images that a trained model takes, as its checkpoint describes them; no data set is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.loading import DECODINGS, FITS, NATIVE
from syncbn.training.data.preparation import Preparation, normalized


@dataclass(frozen=True)
class TrainedInput:
    """How an image becomes the input of a trained model, and what its outputs stand for."""

    preparation: Preparation
    mean: Tensor
    """(1, C, 1, 1) float64, as is `std`."""
    std: Tensor
    class_names: tuple[str, ...]
    """Empty if the classes have none."""
    values: Mapping[int, int | None] | None
    """The class of each value in the files of masks (`data.values`); None if values are classes."""

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], key: str = "load") -> TrainedInput:
        """Reads the description in a checkpoint; one of 0.1.0 has it in the configuration of its data.

        Args:
            key: the configuration key that errors name.

        Raises:
            ConfigError: the checkpoint does not say how images are prepared, as with `data=custom`.
        """
        data, config = checkpoint.get("data", {}), checkpoint["config"].get("data", {})
        image = data.get("image", config)
        try:
            size, limits = image["size"], image.get("range")
            preparation = Preparation(
                size=_height_and_width(size),
                channels=int(image["channels"]),
                fit=str(image.get("fit", "crop")),
                range=None if limits is None else (float(limits[0]), float(limits[1])),
                decode=str(image.get("decode", "full")),
            )
            mean, std = data["mean"], data["std"]
            if (
                preparation.fit not in FITS
                or preparation.decode not in DECODINGS
                or preparation.channels not in (1, 3)
                or (preparation.size is not None and min(preparation.size) < 1)
            ):
                raise ValueError("settings that no run has")
            if any(statistic.shape != (1, preparation.channels, 1, 1) for statistic in (mean, std)):
                raise ValueError("statistics of other channels")
            names, values = tuple(map(str, data["classes"])), config.get("values")
            return cls(preparation, mean, std, names, None if values is None else dict(values))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise ConfigError(
                f"{key}: the checkpoint does not say how image files become the model's input; expected one of a run on"
                " gray or RGB images (with data=custom the class itself prepares them)"
            ) from None

    def prepare(self, image: Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
        """An opened image as validation hands it to the model: upright, fitted, normalized; (channels, *size).

        Raises:
            ValueError: pixels that have no fixed range (see `Preparation.whole`); on a damaged file Pillow raises
                exceptions of many types.
        """
        pixels = self.preparation.fitted_file(image)
        return normalized(pixels[None], self.mean, self.std, dtype)[0]


def _height_and_width(size: Any) -> tuple[int, int] | None:
    if size == NATIVE:
        return None
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))
