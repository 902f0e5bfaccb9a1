"""The values that a mask file holds, and their classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from syncbn.training.config.data import MaskFolderConfig, TableConfig
from syncbn.training.data.dataset import IGNORE

_UNKNOWN = -1


@dataclass(frozen=True)
class MaskValues:
    """The class of each value that the masks of a data set may hold."""

    table: tuple[int, ...]
    """The class of each of the values 0 to 255; IGNORE if it does not count, negative if it must not occur."""
    given: bool
    """Whether `data.values` lists them; otherwise values are classes, and `data.ignore` is one that does not count."""

    @classmethod
    def of(cls, config: MaskFolderConfig | TableConfig) -> MaskValues:
        """What `data.values`, or else `data.num_classes` and `data.ignore`, say."""
        if config.values is not None:
            classes = [config.values.get(value, _UNKNOWN) for value in range(256)]
            return cls(tuple(IGNORE if number is None else number for number in classes), given=True)
        num_classes = config.num_classes or 0  # the schema requires it of masks
        table = [value if value < num_classes else _UNKNOWN for value in range(256)]
        if config.ignore is not None:
            table[config.ignore] = IGNORE
        return cls(tuple(table), given=False)

    def classes(self, values: np.ndarray) -> np.ndarray:
        """The classes of an array of values, uint8 both.

        Raises:
            ValueError: values that must not occur; the message lists them and continues "<file> holds ...".
        """
        classes = np.array(self.table)[values]
        if (classes < 0).any():
            found = sorted(set(values[classes < 0].tolist()))
            raise ValueError(f"a mask with the values {found}, which {self._remedy(found)}")
        return classes.astype(np.uint8)

    def _remedy(self, found: list[int]) -> str:
        if self.given:
            return f"data.values does not list; null as the class of {found[0]} leaves such pixels out"
        return f"data.num_classes and data.ignore do not cover; data.values={{{found[0]}:1,...}} gives them classes"
