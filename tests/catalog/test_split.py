"""Splits: nobody in two parts, shares as asked, and adding subjects moves nobody."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fmristream.catalog.split import (
    DEFAULT_RATIOS,
    PARTS,
    checked_ratios,
    hash_fraction,
    require_no_empty_part,
    split_as_listed,
    split_by_hash,
    split_exactly,
)
from fmristream.errors import SplitError, UsageError

labels = st.text(st.characters(codec="utf-8"), max_size=10)
cohorts = st.sets(labels, min_size=1, max_size=60)
seeds = st.integers(0, 2**31)
weights = st.tuples(*[st.integers(0, 20)] * 3).filter(any)
ratios_of = weights.map(lambda w: tuple(part / sum(w) for part in w))


def test_the_hash_of_a_label_never_changes():
    # printf '%s' 'fmristream-split-v1|0|01' | sha256sum | cut -c1-12
    assert hash_fraction("01") == 0x1771987A753B / 2**48
    assert hash_fraction("01", seed=7) == 0x2ACAB1FAA0D9 / 2**48
    assert hash_fraction("sub-é") == 0xC78771E6AB4F / 2**48


@given(labels, seeds)
def test_a_hash_lies_between_0_and_1(label, seed):
    assert 0 <= hash_fraction(label, seed=seed) < 1


@given(cohorts, cohorts, ratios_of, seeds)
def test_adding_subjects_moves_nobody_who_was_split_by_hash(before, added, ratios, seed):
    first = split_by_hash(before, ratios=ratios, seed=seed)
    second = split_by_hash(before | added, ratios=ratios, seed=seed)
    assert {label: second[label] for label in before} == first


@given(cohorts, ratios_of, seeds)
def test_every_subject_has_exactly_one_part_and_never_one_without_a_share(cohort, ratios, seed):
    for split in (split_by_hash, split_exactly):
        parts = split(cohort, ratios=ratios, seed=seed)
        assert set(parts) == cohort
        assert set(parts.values()) <= {part for part, ratio in zip(PARTS, ratios, strict=True) if ratio > 0}


@given(st.lists(labels, min_size=1, max_size=30), seeds)
def test_repeated_labels_and_their_order_change_nothing(given_labels, seed):
    for split in (split_by_hash, split_exactly):
        assert split(given_labels, seed=seed) == split(sorted(set(given_labels)), seed=seed)


@given(st.integers(1, 500), weights, seeds)
@example(10, (7, 2, 1), 0)
@example(3, (20, 1, 1), 0)
@example(1000, (29, 1, 70), 0)
def test_an_exact_split_has_its_shares_to_one_subject(count, weight, seed):
    ratios = tuple(part / sum(weight) for part in weight)
    parts = split_exactly([str(i) for i in range(count)], ratios=ratios, seed=seed)
    sizes = [list(parts.values()).count(part) for part in PARTS]
    assert sum(sizes) == count
    positive = sum(1 for ratio in ratios if ratio > 0)
    for size, share in zip(sizes, weight, strict=True):
        exact = count * share / sum(weight)
        assert (
            abs(size - exact) < 1 + 1e-9
            or (exact < 1 and size == 1)
            or any(count * other / sum(weight) < 1 for other in weight if other)
        )
        if share and count >= positive:
            assert size >= 1, "a part with a share is empty although there are enough subjects"


@given(st.integers(1, 200))
def test_ten_subjects_seven_two_one(scale):
    parts = split_exactly([str(i) for i in range(10 * scale)], ratios=(0.7, 0.2, 0.1))
    assert [list(parts.values()).count(part) for part in PARTS] == [7 * scale, 2 * scale, scale]


def test_a_hash_split_has_about_its_shares():
    parts = split_by_hash([str(i) for i in range(20_000)])
    for part, ratio in zip(PARTS, DEFAULT_RATIOS, strict=True):
        share = list(parts.values()).count(part) / len(parts)
        assert abs(share - ratio) < 5 * math.sqrt(ratio * (1 - ratio) / len(parts))


def test_another_seed_gives_another_split():
    cohort = [str(i) for i in range(50)]
    assert split_by_hash(cohort, seed=0) != split_by_hash(cohort, seed=1)
    assert split_exactly(cohort, seed=0) != split_exactly(cohort, seed=1)


@given(st.dictionaries(labels, st.sampled_from(PARTS), min_size=1))
def test_a_listed_split_is_taken_as_it_is_for_the_subjects_that_are_there(listed):
    wanted = sorted(listed)[: 1 + len(listed) // 2]
    assert split_as_listed(wanted, listed) == {label: listed[label] for label in wanted}


def test_a_subject_that_the_list_lacks_is_named():
    with pytest.raises(SplitError, match="does not name 2 of the subjects \\(02, 03\\)"):
        split_as_listed(["01", "02", "03"], {"01": "train"})


def test_an_unknown_part_in_the_list_is_named():
    with pytest.raises(SplitError, match="parts holdout"):
        split_as_listed(["01"], {"01": "holdout"})


def test_an_empty_part_is_an_error_that_counts():
    with pytest.raises(SplitError, match=r"leaves val and test empty \(train 1, val 0, test 0\)"):
        require_no_empty_part({"01": "train"})
    require_no_empty_part({"01": "train"}, ratios=(1, 0, 0))
    require_no_empty_part(split_exactly(["a", "b", "c"]))


@pytest.mark.parametrize(
    "ratios",
    [(0.5, 0.5), (0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (math.nan, 0.5, 0.5), (0, 0, 0), (1, 0, 0, 0), (0.7, 0.2, 0.2)],
)
def test_ratios_that_do_not_share_out_one_whole_are_refused(ratios):
    with pytest.raises(UsageError, match="add up to 1"):
        checked_ratios(ratios)
    with pytest.raises(UsageError):
        split_by_hash(["a"], ratios=ratios)
    with pytest.raises(UsageError):
        split_exactly(["a"], ratios=ratios)
