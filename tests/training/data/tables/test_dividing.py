"""Rows are divided whole groups at a time, evenly, and always in the same way."""

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.training.data.tables.dividing import folds_of, hold_out, three_splits


def table_of(numbers):
    """Groups and strata of as many rows: twelve groups, and any of four strata, or a fifth."""
    strata = [[bit for bit in range(4) if number // 12 >> bit & 1] or [4] for number in numbers]
    return [f"p{number % 12}" for number in numbers], strata


TABLES = st.lists(st.integers(0, 12 * 2**4 - 1), min_size=1, max_size=50).map(table_of)


def parts_of(groups, parts):
    found = defaultdict(set)
    for group, part in zip(groups, parts, strict=True):
        found[group].add(part)
    return found


@settings(max_examples=50, deadline=None)
@given(TABLES, st.integers(2, 12), st.sampled_from("01"))
def test_no_group_is_in_two_splits_for_any_table(table, num_folds, seed):
    groups, strata = table
    for parts in (folds_of(groups, strata, num_folds, seed), hold_out(groups, strata, seed),
                  three_splits(groups, strata, seed)):  # fmt: skip
        assert all(len(found) == 1 for found in parts_of(groups, parts).values())
    if len(set(groups)) >= num_folds:
        assert {*folds_of(groups, strata, num_folds, seed)} == {*range(num_folds)}
    if len(set(groups)) >= 3:
        assert {*three_splits(groups, strata, seed)} == {"train", "val", "test"}


@settings(max_examples=30, deadline=None)
@given(TABLES, st.integers(2, 6), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_makes_no_difference(table, num_folds, shuffled):
    rows = [*zip(*table, strict=True)]
    expected = parts_of(table[0], folds_of(*table, num_folds, "0"))
    shuffled.shuffle(rows)
    groups, strata = zip(*rows, strict=True)
    assert parts_of(groups, folds_of(groups, strata, num_folds, "0")) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(2, 7))
def test_without_groups_each_class_is_spread_evenly(classes, num_folds):
    folds = folds_of([str(number) for number in range(len(classes))], [[one] for one in classes], num_folds, "0")
    for label in set(classes):
        counts = Counter(fold for fold, one in zip(folds, classes, strict=True) if one == label)
        assert max(counts.values()) - min(counts[fold] for fold in range(num_folds)) <= 1


def test_groups_of_very_different_sizes_make_folds_of_similar_ones():
    drawn = random.Random(0)
    sizes = [drawn.randint(1, 40) for _ in range(50)]
    groups = [f"p{number}" for number, size in enumerate(sizes) for _ in range(size)]
    strata = [[int(group[1:]) % 5 == 0] for group in groups]
    folds = folds_of(groups, strata, 5, "0")
    for stratum in (True, False):
        counts = Counter(fold for fold, (one,) in zip(folds, strata, strict=True) if one is stratum)
        assert max(counts.values()) < 1.4 * min(counts.values())


def test_a_class_of_few_is_trained_on():
    groups = [str(number) for number in range(100)]
    splits = three_splits(groups, [[0 if number < 96 else 1] for number in range(100)], "0")
    assert splits[96:] == ["train"] * 4
    assert Counter(splits) == {"train": 80, "val": 10, "test": 10}


def test_another_seed_divides_otherwise():
    groups, strata = [str(number) for number in range(50)], [[0]] * 50
    assert len({tuple(three_splits(groups, strata, str(seed))) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        ("0", "022331101022331101022331rrrrrrerarrrrrrerarrrrrr"),
        ("7", "223103101223103101223103rrrrrrerarrrrrrerarrrrrr"),
    ],
)
def test_a_division_is_pinned(seed, expected):
    # What a version of this package divided stays divided like that: results of all versions are comparable.
    groups = [f"patient {number % 9}" for number in range(24)]
    strata = [[number % 9 % 2] for number in range(24)]
    folds = folds_of(groups, strata, 4, seed)
    assert "".join(map(str, folds)) + "".join(split[1] for split in three_splits(groups, strata, seed)) == expected
