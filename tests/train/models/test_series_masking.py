"""Tokens are hidden by rank of their noise, and put back where they were."""

import pytest
import torch

from fmristream.errors import UsageError
from train.models.series_masking import (
    Masking,
    choose_random,
    choose_tokens,
    choose_trailing,
    complete_tokens,
    draw_noise,
    take_tokens,
)

NOISE = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.1]])


def test_the_smallest_noise_is_shown_first_and_ties_keep_the_order_of_tokens():
    choice = choose_tokens(NOISE, 3)
    assert choice.shown.tolist() == [[1, 4, 3]]
    assert choice.restore.tolist() == [[3, 0, 4, 2, 1]]
    assert choice.hidden.tolist() == [[True, False, True, False, False]]


def test_a_share_rounds_to_as_many_shown_tokens_as_published():
    assert choose_random(1, 216, 0.2, torch.rand(1, 216)).shown.shape == (1, 172)
    assert choose_random(1, 4240, 0.2, torch.rand(1, 4240)).shown.shape == (1, 3392)


def test_trailing_tokens_are_hidden_whatever_the_noise():
    hidden = torch.tensor([False, True, False, True, False])
    choice = choose_trailing(hidden, 3, 1, NOISE)
    assert choice.hidden.tolist() == [hidden.tolist()]
    assert choice.shown.tolist() == [[4, 0, 2]]
    assert choose_trailing(hidden, 3, 1, None).shown.tolist() == [[0, 2, 4]]


def test_tokens_come_back_to_their_places_with_mask_tokens_between():
    tokens = torch.arange(10.0).view(1, 5, 2)
    choice = choose_tokens(NOISE, 3)
    full = complete_tokens(take_tokens(tokens, choice.shown), torch.full((1, 1, 2), -1.0), choice.restore)
    assert full.tolist() == [[[-1, -1], [2, 3], [-1, -1], [6, 7], [8, 9]]]


def test_noise_is_that_of_its_generator():
    first, again = (
        draw_noise(2, 3, device=torch.device("cpu"), generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "random"}, "known: auto_encode, predict_last, predict_last_pixel"),
        ({"ratio": 1.0}, r"must lie in \[0, 1\)"),
        ({"frames": 3}, "needs a predicting mode"),
        ({"mode": "predict_last", "frames": 0}, "a number above 0"),
    ],
)
def test_masking_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Masking(**options)


def test_hidden_frames_are_a_share_or_a_number_and_never_all_or_none():
    assert Masking(mode="predict_last", ratio=0.75).masked_frames(200) == 150
    assert Masking(mode="predict_last", frames=29).masked_frames(200) == 29
    with pytest.raises(UsageError, match="0 of 4 frames would be hidden"):
        Masking(mode="predict_last", ratio=0.2).masked_frames(4)
