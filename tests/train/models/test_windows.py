"""The pieces of a plan are exactly what roll, windows and mask let attend to each other."""

from collections import defaultdict
from math import prod

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.models import plain_swift
from train.models.windows import PADDING, cut_axis, plan_pieces, shrink_window


@st.composite
def shifted_windows(draw):
    sizes = draw(st.tuples(*[st.integers(1, 9)] * 4).filter(lambda sizes: prod(sizes) <= 1500))
    window = draw(st.tuples(*[st.integers(1, 5)] * 4))
    shift = tuple(draw(st.integers(0, length - 1)) for length in window)
    return sizes, window, shift


def plan_as_pieces(plan):
    pieces, start = [], 0
    for count, length in plan.groups:
        pieces += plan.index[start : start + count * length].reshape(count, length).tolist()
        start += count * length
    assert start == len(plan.index)
    return sorted(sorted(piece) for piece in pieces)


def masked_pieces(sizes, window, shift):
    """Tokens of one window with no mask between them, from rolled windows; padding is -1."""
    window, shift = plain_swift.shrink(sizes, window, shift)
    padded = tuple(-(-size // length) * length for size, length in zip(sizes, window, strict=True))
    numbers = torch.full(padded, PADDING)
    numbers[tuple(slice(size) for size in sizes)] = torch.arange(prod(sizes)).reshape(sizes)
    rolled = torch.roll(numbers, tuple(-step for step in shift), (0, 1, 2, 3))
    tokens = plain_swift.cut(rolled[None, ..., None], window).squeeze(-1)
    allowed = plain_swift.mask(padded, window, shift) == 0
    pieces = []
    for number, window_tokens in enumerate(tokens):
        by_row = defaultdict(list)
        for row, token in zip(allowed[number].tolist(), window_tokens.tolist(), strict=True):
            by_row[tuple(row)].append(token)
        pieces += [sorted(piece) for piece in by_row.values() if max(piece) >= 0]
    return sorted(pieces)


@given(shifted_windows())
def test_pieces_are_what_roll_windows_and_mask_allow(case):
    assert plan_as_pieces(plan_pieces(*case)) == masked_pieces(*case)


@given(shifted_windows())
def test_every_token_stands_in_a_plan_once(case):
    index = plan_pieces(*case).index
    np.testing.assert_array_equal(np.sort(index[index != PADDING]), np.arange(prod(case[0])))


@given(shifted_windows())
def test_groups_are_few_and_longest_first(case):
    lengths = [length for _, length in plan_pieces(*case).groups]
    assert lengths == sorted(set(lengths), reverse=True)
    assert len(lengths) <= 3**4


def test_an_axis_is_cut_into_shift_windows_and_rest():
    assert [len(piece) for piece in cut_axis(12, 4, 1)] == [1, 4, 4, 3]
    assert [len(piece) for piece in cut_axis(10, 4, 2)] == [2, 4, 4, 2]
    assert [len(piece) for piece in cut_axis(8, 4, 0)] == [4, 4]


def test_a_window_that_covers_an_axis_becomes_it_and_stays():
    assert shrink_window((4, 6, 3, 20), (4, 4, 4, 4), (2, 2, 2, 2)) == ((4, 4, 3, 4), (0, 2, 0, 2))


def test_the_published_first_stage_needs_five_calls():
    # 3 whole and 2 half windows along each spatial axis, 4 and 2 in time.
    plan = plan_pieces((16, 16, 16, 20), (4, 4, 4, 4), (2, 2, 2, 2))
    assert plan.groups == ((108, 256), (270, 128), (252, 64), (104, 32), (16, 16))
