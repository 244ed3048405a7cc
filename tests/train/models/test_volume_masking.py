"""Masks hide exactly what their mode says, by each sample's own noise."""

import pytest
import torch

from fmristream.errors import UsageError
from train.models.volume_masking import VolumeMasking, split_tokens

GRID, TIMES = (3, 4, 2), 5
# 19 of the 24 places hold brain.
PLACES = torch.tensor([place for place in range(24) if place not in (0, 1, 7, 16, 23)])
SHARES = {
    "random": VolumeMasking(mode="random", ratio=0.75),
    "tube": VolumeMasking(mode="tube", ratio=0.9),
    "window": VolumeMasking(mode="window", ratio=0.8, window=(2, 4, 1, 2)),
    "span": VolumeMasking(mode="span", ratio=0.4),
    "future": VolumeMasking(mode="future", ratio=0.4),
}


def noise_for(masking, batch=6, seed=0):
    size = masking.noise_size(places=len(PLACES), times=TIMES, grid=GRID)
    return torch.rand(batch, size, generator=torch.Generator().manual_seed(seed))


def hidden_table(masking, noise):
    """(b, times, places): true where hidden."""
    split = split_tokens(masking, noise, places=PLACES, times=TIMES, grid=GRID)
    table = torch.zeros(len(noise), TIMES * len(PLACES), dtype=torch.bool)
    return table.scatter(1, split.hidden, torch.ones_like(split.hidden, dtype=torch.bool)).view(-1, TIMES, len(PLACES))


@pytest.mark.parametrize(
    ("mode", "hidden"), [("random", 71), ("tube", 85), ("window", 76), ("span", 38), ("future", 38)]
)
def test_every_sample_hides_the_same_number_and_each_token_is_shown_or_hidden(mode, hidden):
    masking = SHARES[mode]
    split = split_tokens(masking, noise_for(masking), places=PLACES, times=TIMES, grid=GRID)
    # 95 x .75 = 71.25; 19 x .9 = 17.1 places of 5 times; 95 x .8 = 76; 5 x .4 = 2 times of 19 places.
    assert split.hidden.shape == (6, hidden)
    assert masking.hidden_tokens(places=19, times=5) == hidden
    assert torch.equal(torch.cat(split, dim=1).sort(dim=1).values, torch.arange(95).expand(6, 95))
    assert all((tokens.diff(dim=1) > 0).all() for tokens in split)


@pytest.mark.parametrize("mode", SHARES)
def test_a_mask_is_that_of_its_own_row_of_noise_in_any_batch(mode):
    masking = SHARES[mode]
    noise = noise_for(masking)
    together = hidden_table(masking, noise)
    apart = torch.cat([hidden_table(masking, rows) for rows in (noise[:1], noise[1:4], noise[4:])])
    assert torch.equal(together, apart)
    assert torch.equal(hidden_table(masking, noise.flip(0)), together.flip(0))
    if mode != "future":
        assert len(together.flatten(1).unique(dim=0)) > 1


def test_small_noise_is_shown():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.4, 0.6, 0.8, 0.2, 0.3]])
    split = split_tokens(
        VolumeMasking(mode="random", ratio=0.75), noise, places=torch.arange(4), times=2, grid=(4, 1, 1)
    )
    assert split.shown.tolist() == [[1, 6]]
    assert split.hidden.tolist() == [[0, 2, 3, 4, 5, 7]]
    tube = split_tokens(
        VolumeMasking(mode="tube", ratio=0.75), noise[:, :4], places=torch.arange(4), times=2, grid=(4, 1, 1)
    )
    assert tube.shown.tolist() == [[1, 5]]


def test_a_tube_hides_the_same_places_at_all_times():
    table = hidden_table(SHARES["tube"], noise_for(SHARES["tube"]))
    assert torch.equal(table, table[:, :1].expand_as(table))
    assert table[:, 0].sum(1).tolist() == [17] * 6


def test_windows_are_hidden_whole_but_for_one():
    masking = SHARES["window"]
    table = hidden_table(masking, noise_for(masking))
    block = {}
    for number, place in enumerate(PLACES.tolist()):
        x, y, z = place // 8, place // 2 % 4, place % 2
        block.setdefault((x // 2, y // 4, z), []).append(number)
    for sample in table:
        shares = [
            sample[first : first + 2, members].float().mean().item()
            for first in (0, 2, 4)
            for members in block.values()
        ]
        assert sum(0 < share < 1 for share in shares) <= 1
        assert sum(share == 1 for share in shares) >= 1
        assert sum(share == 0 for share in shares) >= 1


def test_a_span_is_one_stretch_of_time_that_begins_anywhere():
    masking = SHARES["span"]
    table = hidden_table(masking, noise_for(masking, batch=200))
    assert torch.equal(table, table[:, :, :1].expand_as(table))
    starts = {tuple(times.nonzero().flatten().tolist()) for times in table[:, :, 0]}
    assert starts == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert hidden_table(masking, torch.ones(1, 1))[0, :, 0].tolist() == [False, False, False, True, True]


def test_the_future_is_the_end_whatever_the_noise():
    table = hidden_table(SHARES["future"], torch.zeros(2, 0))
    assert table.all(dim=2).tolist() == [[False, False, False, True, True]] * 2


def test_equal_noise_keeps_tubes_whole():
    masking = SHARES["tube"]
    table = hidden_table(masking, torch.zeros(1, 19))
    assert torch.equal(table, table[:, :1].expand_as(table))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tubes"}, "mask must be one of random, tube, window, span, future, got 'tubes'"),
        ({"ratio": 1.0}, "mask_ratio must lie between 0 and 1, got 1.0"),
        ({"ratio": 0}, "mask_ratio must lie between 0 and 1, got 0"),
        ({"ratio": True}, "mask_ratio must lie between 0 and 1, got True"),
        ({"window": (2, 2, 2)}, "mask_window must be a list of 4 whole numbers above 0"),
        ({"window": (2, 2, 2, 0)}, "mask_window must be a list of 4 whole numbers above 0"),
    ],
)
def test_masking_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        VolumeMasking(**options)


@pytest.mark.parametrize(
    ("mode", "ratio", "message"),
    [
        ("span", 0.95, "would hide 5 of 5 times"),
        ("tube", 0.01, "would hide 0 of 19 places"),
        ("random", 0.999, "would hide 95 of 95 patches"),
    ],
)
def test_a_share_that_leaves_nothing_to_show_or_to_hide_is_refused(mode, ratio, message):
    with pytest.raises(UsageError, match=message):
        VolumeMasking(mode=mode, ratio=ratio).hidden_tokens(places=19, times=5)


def test_noise_of_another_size_is_refused():
    with pytest.raises(UsageError, match=r"mask tube: noise must be \(batch, 19\) for 19 places, 5 times"):
        split_tokens(SHARES["tube"], torch.zeros(2, 95), places=PLACES, times=TIMES, grid=GRID)
