"""Steps at fault: a loss or a gradient that is not finite, and the samples to look at."""

from __future__ import annotations

from syncbn.training.config.schema import TrainingError


class NonFiniteError(TrainingError):
    """A step at fault.

    Args:
        what: "loss" or "gradient".
        seen: the training samples of the step, by rank.
        culprits: those among them whose pixels are not finite.
    """

    def __init__(self, step: int, what: str, seen: dict[int, list[int]], culprits: list[int]) -> None:
        by_rank = "; ".join(f"rank {rank}: {_listed(samples)}" for rank, samples in seen.items())
        where = f"samples with pixels that are not: {_listed(culprits)}" if culprits else f"samples of {by_rank}"
        super().__init__(f"step {step}: the {what} is not finite; training {where}")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
