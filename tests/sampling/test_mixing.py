"""Whose turn it is: shares are kept over any stretch, and positions of each stream follow one another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.sampling.mixing import Turns

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@settings(max_examples=10)
@given(weights=WEIGHTS)
def test_after_any_number_of_positions_each_stream_has_had_its_share(weights):
    turns = Turns(weights)
    shares = np.array(weights) / sum(weights)
    sources, _ = turns.at(np.arange(12_000))
    had = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, 12_001)[:, None] * shares
    assert (np.abs(had - due) < len(weights) + 1).all()  # 12,000 positions, weights to four decimals


@settings(max_examples=10)
@given(weights=WEIGHTS, start=st.integers(0, 10**9))
def test_positions_of_a_stream_follow_one_another_wherever_one_looks(weights, start):
    turns = Turns(weights)
    sources, own = turns.at(np.arange(start, start + 500))
    for source in set(sources.tolist()):
        mine = own[sources == source]
        assert (np.diff(mine) == 1).all()
    alone = np.concatenate([turns.at(np.array([position]))[1] for position in range(start, start + 500, 50)])
    assert np.array_equal(alone, own[::50])


def test_each_stream_begins_at_its_beginning():
    sources, own = Turns([3, 1]).at(np.arange(8))
    assert [own[sources == source].tolist() for source in (0, 1)] == [[0, 1, 2, 3, 4, 5], [0, 1]]


def test_the_turns_of_a_small_example_are_those_of_the_first_release():
    assert Turns([0.7, 0.3]).table.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert Turns([1, 1, 1]).table.tolist() == [0, 1, 2] or len(Turns([1, 1, 1]).table) == 10_000


def test_weights_are_relative():
    assert np.array_equal(Turns([7, 3]).table, Turns([0.7, 0.3]).table)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [float("inf")], [1, 1e-9]])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(UsageError, match="mixture"):
        Turns(weights)
