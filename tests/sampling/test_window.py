"""Windows of runs, numbered through, against counting them one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.sampling.window import Window, WindowTable

WINDOWS = st.builds(Window, length=st.integers(1, 25), stride=st.integers(1, 25))


def counted(frames: list[int], window: Window) -> list[tuple[int, int]]:
    """(run, first frame) of every window, found by trying every start."""
    return [
        (run, start)
        for run, count in enumerate(frames)
        for start in range(count)
        if start % window.stride == 0 and start + window.length <= count
    ]


@given(frames=st.lists(st.integers(0, 80), max_size=12), window=WINDOWS)
def test_numbers_mean_the_windows_that_counting_finds(frames, window):
    table = WindowTable(frames, window)
    expected = counted(frames, window)
    assert table.total == len(expected)
    runs, starts, _ = table.locate(np.arange(table.total))
    assert list(zip(runs.tolist(), starts.tolist(), strict=True)) == expected


@given(frames=st.integers(0, 200), window=WINDOWS)
def test_the_count_of_one_run_is_that_of_its_starts(frames, window):
    assert window.count_in(frames) == len(counted([frames], window))


def test_runs_shorter_than_a_window_are_stepped_over():
    table = WindowTable([3, 0, 10, 2, 5, 1], Window(length=5, stride=5))
    runs, starts, _ = table.locate(np.array([0, 1, 2]))
    assert runs.tolist() == [2, 2, 4]
    assert starts.tolist() == [0, 5, 0]


def test_numbers_may_be_asked_for_in_any_order_and_repeatedly():
    table = WindowTable([10, 10], Window(length=4, stride=2))
    runs, starts, _ = table.locate(np.array([7, 0, 7]))
    assert runs.tolist() == [1, 0, 1]
    assert starts.tolist() == [6, 0, 6]


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (1, 0), (-5, 1), (5, -1)])
def test_a_window_without_frames_or_steps_is_refused(length, stride):
    with pytest.raises(UsageError, match=f"window {length} with stride {stride}"):
        Window(length=length, stride=stride)
