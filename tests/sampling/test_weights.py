"""Quotas: whole numbers that add up to an epoch, each share rounded down or up, right on average."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.sampling.weights import balanced, weighted

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=10)


def first_of(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def drawn(quotas, key: int) -> Counter:
    return Counter(quotas.windows(np.arange(quotas.samples), key=key).tolist())


def by_run(windows: Counter, counts: list[int]) -> list[int]:
    edges = first_of(counts)
    return [sum(windows[n] for n in range(edges[run], edges[run + 1])) for run in range(len(counts))]


@given(counts=COUNTS, weights=st.lists(st.floats(0, 5), min_size=10, max_size=10), key=st.integers(0, 2**63))
def test_runs_get_their_share_rounded_down_or_up_and_windows_differ_by_one(counts, weights, key):
    weights = np.array(weights[: len(counts)])
    mass = weights * counts
    if mass.sum() < 1e-6 or (mass[mass > 0] < 1e-6).any():
        return
    quotas = weighted(weights, np.array(counts), first_of(counts))
    assert quotas.samples == sum(count for count, part in zip(counts, mass, strict=True) if part > 0)
    windows = drawn(quotas, key)
    assert sum(windows.values()) == quotas.samples
    for run, got in enumerate(by_run(windows, counts)):
        share = mass[run] / mass.sum() * quotas.samples
        assert share - 1 - 1e-6 < got < share + 1 + 1e-6
        own = [windows[n] for n in range(first_of(counts)[run], first_of(counts)[run + 1])]
        assert not own or max(own) - min(own) <= 1


@given(
    counts=COUNTS,
    groups=st.lists(st.integers(-1, 3), min_size=10, max_size=10),
    key=st.integers(0, 2**63),
)
def test_groups_get_equal_shares_that_differ_by_one_at_most(counts, groups, key):
    groups = np.array(groups[: len(counts)])
    quotas = balanced(groups, np.array(counts), first_of(counts))
    used = (groups >= 0) & (np.array(counts) > 0)
    assert quotas.samples == int(np.array(counts)[used].sum())
    if not used.any():
        return
    found = np.array(by_run(drawn(quotas, key), counts))
    assert (found[~used] == 0).all()
    totals = [int(found[groups == group].sum()) for group in set(groups[used].tolist())]
    assert max(totals) - min(totals) <= 1


def test_over_many_epochs_every_window_comes_as_often_as_its_weight_says():
    counts, weights = [7, 3, 11], np.array([1.0, 5.0, 0.5])
    quotas = weighted(weights, np.array(counts), first_of(counts))
    total = Counter()
    epochs = 2000
    for key in range(epochs):
        total += drawn(quotas, key)
    mass = float((weights * counts).sum())
    for window in range(21):
        run = 0 if window < 7 else 1 if window < 10 else 2
        assert total[window] / epochs == pytest.approx(weights[run] / mass * quotas.samples, rel=0.1)


def test_places_of_a_run_lie_together_and_rise():
    quotas = weighted([1, 3, 1], np.array([4, 4, 4]), first_of([4, 4, 4]))
    windows = quotas.windows(np.arange(12), key=9).tolist()
    assert windows == sorted(windows)


def test_quotas_of_some_places_are_those_of_all():
    quotas = weighted([1, 3, 1], np.array([40, 40, 40]), first_of([40, 40, 40]))
    every = quotas.windows(np.arange(120), key=9)
    assert np.array_equal(quotas.windows(np.array([5, 99, 5]), key=9), every[[5, 99, 5]])


def test_other_shares_have_another_digest():
    counts = np.array([4, 4, 4])
    digests = {weighted(weights, counts, first_of([4, 4, 4])).digest for weights in ([1, 1, 1], [1, 1, 2], [0, 1, 1])}
    assert len(digests) == 3
    assert weighted([2, 2, 2], counts, first_of([4, 4, 4])).digest in digests


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, -1], [1, 2, float("nan")], [[1, 2, 3]], [1, 2, float("inf")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(UsageError, match="one finite number of 0 or more for each of the 3 runs"):
        weighted(weights, np.array([1, 1, 1]), first_of([1, 1, 1]))


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(UsageError, match="are 0"):
        weighted([0, 1], np.array([3, 0]), first_of([3, 0]))
