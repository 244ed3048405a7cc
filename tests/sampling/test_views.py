"""Second views: of the same run or subject, never over a frame of the first, every place as likely as any other."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fmristream.sampling.views import Partners
from fmristream.sampling.window import Window, WindowTable

WINDOWS = st.builds(Window, length=st.integers(1, 6), stride=st.integers(1, 9), step=st.integers(1, 2))
RUNS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=8)


def allowed(run: int, start: int, frames: list[int], groups: list[int], span: int) -> set[tuple[int, int]]:
    """(run, first frame) of all clips that may stand beside one, by trying all."""
    return {
        (other, first)
        for other in range(len(frames))
        if groups[other] == groups[run]
        for first in range(frames[other] - span + 1)
        if other != run or first + span <= start or start + span <= first
    }


@given(runs=RUNS, window=WINDOWS, key=st.integers(0, 2**64 - 1), phase=st.one_of(st.none(), st.integers(0, 99)))
def test_every_counted_window_gets_a_view_of_its_group_that_shares_no_frame(runs, window, key, phase):
    frames, groups = [list(values) for values in zip(*runs, strict=True)]
    partners = Partners(frames, window, np.array(groups))
    table = WindowTable(frames, window, is_alone=partners.is_alone)
    numbers = np.arange(table.total)
    firsts = table.locate(numbers, phase_key=phase)[:2]
    seconds = partners.draw(*firsts, numbers, key=key)
    for run, start, other, first in zip(*firsts, *seconds, strict=True):
        assert (other, first) in allowed(run, start, frames, groups, window.span)


@given(runs=RUNS, window=WINDOWS)
def test_windows_that_are_not_counted_have_nothing_beside_them(runs, window):
    frames, groups = [list(values) for values in zip(*runs, strict=True)]
    partners = Partners(frames, window, np.array(groups))
    table = WindowTable(frames, window, is_alone=partners.is_alone)
    plain = WindowTable(frames, window)
    counted = set(zip(*(part.tolist() for part in table.locate(np.arange(table.total))[:2]), strict=True))
    for run, start in zip(*(part.tolist() for part in plain.locate(np.arange(plain.total))[:2]), strict=True):
        assert ((run, start) in counted) == bool(allowed(run, start, frames, groups, window.span))


def test_every_place_is_as_likely_as_any_other():
    frames, groups = [20, 7, 15, 30], [0, 1, 0, 1]
    partners = Partners(frames, Window(length=5, stride=1), np.array(groups))
    draws = 20_000
    items = np.arange(draws)
    found = partners.draw(np.zeros(draws, dtype=int), np.full(draws, 6), items, key=12345)
    counts = Counter(zip(*(part.tolist() for part in found), strict=True))
    places = allowed(0, 6, frames, groups, 5)
    assert set(counts) == places
    expected = draws / len(places)
    chi_square = sum((counts[place] - expected) ** 2 / expected for place in places)
    assert chi_square < len(places) - 1 + 5 * (2 * len(places)) ** 0.5
