"""Durations in steps, epochs or minutes: one syntax for all of the configuration."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Duration:
    """`200` is 200 steps, `5ep` five epochs, `0.5ep` half of one, and, where allowed, `10min` ten minutes."""

    value: float
    unit: str
    """"steps", "epochs" or "minutes"."""

    @classmethod
    def parse(cls, text: str | int | float, *, allow_minutes: bool = False) -> Duration:
        """Parses a duration.

        Raises:
            ValueError: the text is no duration, or is in minutes where they are not allowed.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ep|min)?", str(text).strip())
        unit = {None: "steps", "ep": "epochs", "min": "minutes"}[found.group(2)] if found else ""
        if not found or (unit == "minutes" and not allow_minutes) or (unit == "steps" and "." in found.group(1)):
            forms = "200 (steps), 5ep (epochs)" + (" or 10min (minutes)" if allow_minutes else "")
            raise ValueError(f"expected a duration such as {forms}, got {text!r}")
        return cls(float(found.group(1)), unit)

    def in_steps(self, steps_per_epoch: int) -> int:
        """Converts epochs (or steps, but not minutes) to a number of steps, rounded up."""
        assert self.unit != "minutes"
        return math.ceil(self.value * steps_per_epoch) if self.unit == "epochs" else int(self.value)
