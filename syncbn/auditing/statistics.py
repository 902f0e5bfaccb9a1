"""Rules of the audit about running statistics alone, of a layer or of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from syncbn.auditing.rules import Finding, new_finding


def of_running_statistics(
    name: str, mean: Tensor | None, var: Tensor | None, counter: Tensor | None, *, rule_if_initial: str | None
) -> Iterator[Finding]:
    """Findings from the values of running statistics; none without them, or on the meta device.

    Args:
        rule_if_initial: the rule to report for statistics with initial values; None if those are fine.
    """
    if mean is None or var is None or mean.is_meta:
        return
    faults = {
        "a mean that is not finite": not bool(mean.isfinite().all()),
        "a variance that is not finite": not bool(var.isfinite().all()),
        "a negative variance": bool((var < 0).any()),
    }
    if any(faults.values()):
        yield new_finding(
            "invalid-statistics", name, what=" and ".join(fault for fault, present in faults.items() if present)
        )
    elif rule_if_initial is not None and are_initial(mean, var, counter):
        yield new_finding(rule_if_initial, name)


def are_initial(mean: Tensor, var: Tensor, counter: Tensor | None) -> bool:
    """Whether mean, variance and batch counter have their initial values 0, 1 and 0.

    False without a counter: a model with folded normalization may have mean 0 and variance 1 on purpose.
    """
    return counter is not None and not counter.any() and not mean.any() and bool((var == 1).all())
