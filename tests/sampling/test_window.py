"""Clips of runs, numbered through, against counting them one by one."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.sampling.window import EventTable, WholeRuns, Window, WindowTable

WINDOWS = st.builds(Window, length=st.integers(1, 12), stride=st.integers(1, 25), step=st.integers(1, 3))
FRAMES = st.lists(st.integers(0, 80), max_size=12)
KEYS = st.integers(0, 2**64 - 1)


def counted(frames: list[int], window: Window) -> list[tuple[int, int]]:
    """(run, first frame) of every window, found by trying every start."""
    return [
        (run, start)
        for run, count in enumerate(frames)
        for start in range(count)
        if start % window.stride == 0 and start + (window.length - 1) * window.step < count
    ]


def located(table, **key) -> list[tuple[int, int]]:
    runs, starts, _ = table.locate(np.arange(table.total), **key)
    return list(zip(runs.tolist(), starts.tolist(), strict=True))


@given(frames=FRAMES, window=WINDOWS)
def test_numbers_mean_the_windows_that_counting_finds(frames, window):
    table = WindowTable(frames, window)
    expected = counted(frames, window)
    assert table.total == len(expected)
    assert located(table) == expected


@given(frames=st.integers(0, 200), window=WINDOWS)
def test_the_count_of_one_run_is_that_of_its_starts(frames, window):
    assert window.count_in(frames) == len(counted([frames], window))


@given(frames=FRAMES, window=WINDOWS, key=KEYS)
def test_shifted_windows_stay_in_their_run_and_before_the_next_one(frames, window, key):
    table = WindowTable(frames, window)
    for (run, start), (same, shifted) in zip(located(table), located(table, phase_key=key), strict=True):
        assert run == same
        assert start <= shifted < start + window.stride
        assert shifted + window.span <= frames[run]


@given(frames=st.integers(1, 40), window=WINDOWS)
def test_over_many_epochs_every_start_is_reached_by_one_number_alone(frames, window):
    table = WindowTable([frames], window)
    seen = {}
    for key in range(400):
        for number, (_, start) in enumerate(located(table, phase_key=key * 0x9E3779B97F4A7C15 % 2**64)):
            assert seen.setdefault(start, number) == number
    assert sorted(seen) == list(range(max(0, frames - window.span + 1)))


@given(frames=FRAMES, window=WINDOWS, alone=st.lists(st.booleans(), min_size=12, max_size=12))
def test_windows_without_room_for_a_second_one_in_their_run_are_not_counted(frames, window, alone):
    table = WindowTable(frames, window, is_alone=np.array(alone[: len(frames)], dtype=bool))
    has_room = [
        (run, start)
        for run, start in counted(frames, window)
        if not alone[run] or start >= window.span or start + 2 * window.span <= frames[run]
    ]
    assert located(table) == has_room


@given(frames=FRAMES, window=WINDOWS, key=KEYS)
def test_shifted_windows_keep_the_room_for_a_second_one(frames, window, key):
    table = WindowTable(frames, window, is_alone=np.ones(len(frames), dtype=bool))
    shifted = located(table, phase_key=key)
    assert len(set(shifted)) == table.total
    for (run, start), (same, moved) in zip(located(table), shifted, strict=True):
        assert run == same
        assert start <= moved < start + window.stride
        assert moved + window.span <= frames[run]
        assert moved >= window.span or moved + 2 * window.span <= frames[run]


def test_runs_shorter_than_a_window_are_stepped_over():
    table = WindowTable([3, 0, 10, 2, 5, 1], Window(length=5, stride=5))
    assert located(table) == [(2, 0), (2, 5), (4, 0)]


def test_numbers_may_be_asked_for_in_any_order_and_repeatedly():
    table = WindowTable([10, 10], Window(length=4, stride=2))
    runs, starts, lengths = table.locate(np.array([7, 0, 7]))
    assert runs.tolist() == [1, 0, 1]
    assert starts.tolist() == [6, 0, 6]
    assert lengths.tolist() == [4, 4, 4]


def test_clips_at_events_are_numbered_run_by_run():
    starts = [np.array([3, 3, 9]), np.zeros(0, dtype=np.int64), np.array([0])]
    table = EventTable(starts, Window(length=4, stride=4))
    assert located(table) == [(0, 3), (0, 3), (0, 9), (2, 0)]
    assert located(table, phase_key=5) == located(table)


def test_whole_runs_are_clips_of_their_own_lengths():
    table = WholeRuns([5, 0, 9], step=2)
    runs, starts, lengths = table.locate(np.arange(table.total))
    assert (runs.tolist(), starts.tolist(), lengths.tolist()) == ([0, 2], [0, 0], [3, 5])
    assert table.longest == 5


def test_a_hundred_million_windows_are_numbered_in_a_few_numbers_a_run():
    frames = np.full(1000, 100_019)
    tracemalloc.start()
    table = WindowTable(frames, Window(length=20, stride=1), is_alone=np.ones(1000, dtype=bool))
    runs, starts, _ = table.locate(np.array([0, 10**8 - 1]), phase_key=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.total == 10**8
    assert (runs.tolist(), starts.tolist()) == ([0, 999], [0, 99_999])
    assert peak < 2**20


@pytest.mark.parametrize(("length", "stride", "step"), [(0, 1, 1), (1, 0, 1), (-5, 1, 1), (5, -1, 1), (5, 1, 0)])
def test_a_window_without_frames_or_steps_is_refused(length, stride, step):
    with pytest.raises(UsageError, match=f"window {length} with stride {stride} and step {step}"):
        Window(length=length, stride=stride, step=step)
