"""Divides rows into folds and splits, whole groups at a time: a function of (table, seed), whatever the order of rows.

Only whole numbers are added and compared, so that it is the same on every machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b

_ONE = 2**40  # the share of a stratum, as a whole number
_TENTHS = 10


def folds_of(groups: Sequence[str], strata: Sequence[Sequence[int]], num_folds: int, seed: str) -> list[int]:
    """The fold of each row, 0 to `num_folds` - 1. No group is in two folds; none is empty if there are enough groups.

    Groups are taken one after the other, those of the rarest strata first, then the largest, then in an order that the
    seed draws, and each goes where there is least of its strata so far. Where every row is a group of its own and has
    one stratum, the numbers of its rows in two folds differ by one at most.

    Args:
        groups: of each row.
        strata: of each row, one or several; every fold gets an equal part of each, as far as groups allow.
    """
    members: defaultdict[str, Counter[int]] = defaultdict(Counter)
    sizes, totals = Counter(groups), Counter[int]()
    for group, of_row in zip(groups, strata, strict=True):
        members[group].update(of_row)
        totals.update(of_row)
    shares = {stratum: _ONE // total for stratum, total in totals.items()}
    rarest = {group: min(totals[stratum] for stratum in counts) for group, counts in members.items()}
    order = sorted(members, key=lambda group: (rarest[group], -sizes[group], _drawn(seed, group), group))
    filled = {stratum: [0] * num_folds for stratum in totals}
    num_rows, fold_of, backwards = [0] * num_folds, dict[str, int](), range(0, -num_folds, -1)
    for group in order:
        counts = members[group]
        costs = [0] * num_folds
        for stratum, count in counts.items():
            weight = count * shares[stratum]
            costs = [cost + weight * here for cost, here in zip(costs, filled[stratum], strict=True)]
        # The last of several equal ones, so that a stratum of few groups is in the folds that are trained on.
        fold = -min(zip(costs, num_rows, backwards, strict=True))[2]
        fold_of[group] = fold
        num_rows[fold] += sizes[group]
        for stratum, count in counts.items():
            filled[stratum][fold] += count
    return [fold_of[group] for group in groups]


def hold_out(groups: Sequence[str], strata: Sequence[Sequence[int]], seed: str) -> list[bool]:
    """Whether each row is held out: about a tenth of them, whole groups, stratified; at least one group is."""
    folds = folds_of(groups, strata, min(_TENTHS, len(set(groups))), seed)
    return [fold == 0 for fold in folds]


def three_splits(groups: Sequence[str], strata: Sequence[Sequence[int]], seed: str) -> list[str]:
    """The split of each row: about a tenth tests, another one validates; of fewer than ten groups one each."""
    folds = folds_of(groups, strata, min(_TENTHS, len(set(groups))), seed)
    return [{0: "test", 1: "val"}.get(fold, "train") for fold in folds]


def _drawn(seed: str, group: str) -> bytes:
    return blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
