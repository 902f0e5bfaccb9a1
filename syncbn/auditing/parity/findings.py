"""The findings of a diagnosis: one for each layer and cause, in the order of the network."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from syncbn.auditing.parity.recorder import LOSS
from syncbn.auditing.parity.rules import new_finding
from syncbn.auditing.parity.subject import owner_of
from syncbn.auditing.rules import Finding


class Findings:
    """Collects findings; of one rule and layer the first, which has the fewest remedies in place, stays.

    Args:
        order: names of the modules in the order in which they finish.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self._positions = {name: position for position, name in enumerate(order)}
        self._findings: dict[tuple[str, str], Finding] = {}

    def add(self, rule: str, layer: str, difference: float | None = None, **details: object) -> None:
        """Adds a finding; `details` fill the format fields of the rule's texts.

        Args:
            difference: relative, None if nothing was compared; one that is not finite is left out.
        """
        shown = "loss" if layer in (LOSS, "the loss") else "" if layer == "the backward pass" else layer
        difference = difference if difference is not None and isfinite(difference) else None
        if (layer, rule) not in self._findings:
            self._findings[layer, rule] = new_finding(rule, shown, difference, **details)

    def has(self, rule: str, layer: str | None = None) -> bool:
        """Whether there is a finding of a rule, in one layer or in any."""
        return any(rule == its_rule and layer in (None, its_layer) for its_layer, its_rule in self._findings)

    def in_order(self) -> list[Finding]:
        """All of them, in the order of the network."""
        return [
            finding for (layer, _), finding in sorted(self._findings.items(), key=lambda one: self.position(one[0][0]))
        ]

    def position(self, name: str) -> int:
        """Where a module stands in the order of the network; that of its parent for one that did not run."""
        if name in ("loss", LOSS):
            return len(self._positions)
        while name and name not in self._positions:
            name = owner_of(name)
        return self._positions.get(name, len(self._positions))


def ranks_in_words(ranks: Sequence[int]) -> str:
    """The ranks as a finding names them: "rank 1", "ranks 0, 2"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
