"""Splits: nobody in two parts, shares as asked, and adding subjects moves nobody."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmristream.catalog.columns import JoinedColumns
from fmristream.catalog.run_table import RunTable
from fmristream.catalog.split import (
    DEFAULT_RATIOS,
    PARTS,
    checked_ratios,
    hash_fraction,
    require_no_empty_part,
    split_as_listed,
    split_by_hash,
    split_exactly,
    split_into_parts,
)
from fmristream.catalog.tables import encode_participants, encode_runs, participant_columns
from fmristream.errors import SplitError, UsageError
from tests.catalog.test_tables import A_RUN

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


def joined(runs: list[dict], people: list[dict]) -> JoinedColumns:
    """Runs of subjects, and what is known of these."""
    rows = [replace(A_RUN, name=f"run-{place}", **{"group": run["subject"], **run}) for place, run in enumerate(runs)]
    participants = participant_columns(encode_participants(people)) if people else {}
    return JoinedColumns(RunTable.of_segments([encode_runs(rows)]), participants)


def linked(runs: list[dict], people: dict[str, dict], by: list[str]) -> list[set[str]]:
    """Groups of subjects that share anything, by merging until nothing changes."""
    groups = [{subject} for subject in sorted({run["subject"] for run in runs})]

    def traits(group: set[str]) -> set:
        own = {("group", run["group"]) for run in runs if run["subject"] in group}
        rest = {(n, run.get(n)) for n in by for run in runs if run["subject"] in group if n in run}
        told = {(n, people[s].get(n)) for n in by for s in group if s in people and n in people[s]}
        return {trait for trait in own | rest | told if trait[1]}

    changed = True
    while changed:
        changed = False
        for one in groups:
            for other in groups:
                if one is not other and traits(one) & traits(other):
                    groups = [group for group in groups if group not in (one, other)] + [one | other]
                    changed = True
                    break
            if changed:
                break
    return groups


SOME_RUNS = st.lists(
    st.fixed_dictionaries(
        {
            "subject": st.sampled_from("abcdefgh"),
            "group": st.sampled_from(["f1", "f2", "f3", "f4", "f5", "f6"]),
            "session": st.sampled_from(["", "s1", "s2", "s3", "s4", "s5"]),
        }
    ),
    min_size=1,
    max_size=8,
)
SOME_PEOPLE = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from([None, "x", "y", "z", "v", "w"]), max_size=8)


@settings(max_examples=40)
@given(
    SOME_RUNS,
    SOME_PEOPLE,
    st.sampled_from([["subject"], ["site"], ["session"], ["site", "session"]]),
    st.integers(0, 5),
)
def test_what_shares_anything_is_never_divided(runs, sites, by, seed):
    people = {"nobody": {"site": "q"}, **{subject: {"site": site} for subject, site in sites.items()}}
    table = joined(runs, [{"subject": subject, **row} for subject, row in people.items()])
    groups = linked(runs, people, by)
    try:
        split = split_into_parts(table, by=by, fractions=(0.5, 0.5, 0), seed=seed)
    except SplitError:
        assert len(groups) == 1
        return
    assert set(split.parts) == {run["subject"] for run in runs}
    for group in groups:
        assert len({split.parts[subject] for subject in group}) == 1
    sizes = [sum(split.parts[min(group)] == part for group in groups) for part in ("train", "val")]
    assert abs(sizes[0] - sizes[1]) <= 1


def test_subjects_of_unknown_site_are_groups_of_their_own_and_counted():
    runs = [{"subject": label} for label in "abcd"]
    table = joined(runs, [{"subject": "a", "site": "x"}, {"subject": "b", "site": "x"}])
    split = split_into_parts(table, by="site", fractions=(0.4, 0.3, 0.3))
    assert split.ungrouped == 2
    assert split.parts["a"] == split.parts["b"]


def test_a_split_by_hash_moves_nobody_when_subjects_are_added():
    runs = [{"subject": f"s{number}"} for number in range(60)]
    few, many = (
        split_into_parts(joined(some, []), fractions=(0.5, 0.5, 0), method="hash", seed=1) for some in (runs[:40], runs)
    )
    assert few.parts == {subject: many.parts[subject] for subject in few.parts}
    assert few.digest != many.digest


def test_the_split_of_a_small_example_is_that_of_the_first_release():
    runs = [{"subject": label} for label in "abcdef"]
    split = split_into_parts(joined(runs, []), fractions=(0.5, 0.25, 0.25), seed=7)
    assert "".join(split.parts[label][1] for label in "abcdef") == PARTS_OF_SIX


PARTS_OF_SIX = "rraear"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "sight"}, "no column 'sight'"),
        ({"by": ()}, "a column or more"),
        ({"method": "random"}, "expected 'exact' or 'hash'"),
        ({"fractions": (0.5, 0.5)}, "three shares"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(UsageError) as caught:
        split_into_parts(joined([{"subject": "a"}, {"subject": "b"}], []), **options)
    assert said in str(caught.value)


def test_an_empty_part_is_refused_and_a_part_has_a_name():
    table = joined([{"subject": "a"}, {"subject": "b"}], [])
    with pytest.raises(SplitError, match=r"leaves (val|test) empty"):
        split_into_parts(table)
    with pytest.raises(UsageError, match="no part 'dev'"):
        split_into_parts(table, fractions=(0.5, 0.5, 0))["dev"]
