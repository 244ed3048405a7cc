"""Controls of time order move true frames only, keep every sample's frames, and do not depend on who computes them."""

import pytest
import torch

from fmristream.errors import UsageError
from train.order_ablation import (
    ABLATIONS,
    ablate,
    averaged_frames,
    reversed_frames,
    shuffle_keys,
    shuffled_frames,
)

LENGTHS = torch.tensor([5, 3, 1])


def counted(*shape, time_axis=-1):
    """Whole tensors of which every frame holds its number, from 1."""
    frames = torch.arange(1.0, shape[time_axis] + 1)
    places = [1] * len(shape)
    places[time_axis] = -1
    return frames.view(places).expand(shape).clone()


def test_reversed_frames_are_worked_out_by_hand():
    found = reversed_frames(counted(3, 2, 5), lengths=LENGTHS)[:, 0].tolist()
    assert found == [[5, 4, 3, 2, 1], [3, 2, 1, 4, 5], [1, 2, 3, 4, 5]]
    assert reversed_frames(counted(1, 2, 5))[0, 1].tolist() == [5, 4, 3, 2, 1]


def test_averaged_frames_are_worked_out_by_hand():
    found = averaged_frames(counted(3, 2, 5), lengths=LENGTHS)[:, 0].tolist()
    assert found == [[3, 3, 3, 3, 3], [2, 2, 2, 4, 5], [1, 2, 3, 4, 5]]


def test_shuffled_frames_are_the_same_frames_in_another_order():
    found = shuffled_frames(counted(3, 2, 40), [1, 2, 3], lengths=torch.tensor([40, 30, 1]))[:, 0]
    assert found.sort(dim=1).values.tolist() == [list(range(1, 41))] * 3
    assert found[1, 30:].tolist() == list(range(31, 41))
    assert found[2].tolist() == list(range(1, 41))
    assert (found[0] != torch.arange(1, 41)).sum() > 30
    assert found[0, :30].tolist() != found[1, :30].tolist()


def test_a_shuffle_is_pinned_down_by_its_key():
    # Draws promise the same numbers in every release; another order here would make old controls another experiment.
    keys = shuffle_keys(3, [0, 1])
    assert shuffled_frames(counted(2, 1, 6), keys)[:, 0].int().tolist() == PINNED


PINNED = [[2, 3, 6, 5, 4, 1], [2, 6, 4, 5, 3, 1]]


def test_all_orders_are_equally_likely():
    keys = shuffle_keys(1, range(6000))
    found = shuffled_frames(counted(6000, 1, 3), keys)[:, 0].int()
    _, counts = found.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000).abs() < 150).all()  # 5 SD of a count


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_samples_shuffle_does_not_depend_on_the_batch_it_is_in(ranks):
    x, samples = torch.randn(7, 2, 3, 4, 2, 9), [4, 8, 15, 16, 23, 42, 99]
    lengths = torch.tensor([9, 8, 7, 9, 1, 2, 9])
    together = shuffled_frames(x, shuffle_keys(5, samples), lengths=lengths)
    parts = [
        shuffled_frames(x[rank::ranks], shuffle_keys(5, samples[rank::ranks]), lengths=lengths[rank::ranks])
        for rank in range(ranks)
    ]
    for rank, part in enumerate(parts):
        assert torch.equal(part, together[rank::ranks])


def test_seed_epoch_and_sample_all_decide():
    keys = {*shuffle_keys(0, [1, 2]), *shuffle_keys(1, [1, 2]), *shuffle_keys(0, [1, 2], epoch=1)}
    assert len(keys) == 6
    assert shuffle_keys(0, torch.tensor([1, 2])) == shuffle_keys(0, [1, 2])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_bold_and_side_series_keep_together(ablation):
    bold, side = counted(3, 2, 3, 4, 2, 5), counted(3, 5, 2, time_axis=1)
    keys = shuffle_keys(0, range(3))
    found = ablate(bold, ablation, keys=keys, lengths=LENGTHS)
    beside = ablate(side, ablation, keys=keys, lengths=LENGTHS, time_axis=1)
    assert found.shape == bold.shape
    assert torch.equal(found[:, 0, 0, 0, 0], beside[:, :, 0])
    assert torch.equal(found.amax((1, 2, 3, 4)), found.amin((1, 2, 3, 4)))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_what_comes_after_the_true_end_neither_moves_nor_mixes_in(ablation):
    x = torch.randn(3, 2, 5)
    filled = x.clone()
    for row, length in enumerate(LENGTHS):
        filled[row, :, length:] = torch.nan
    plain, found = (ablate(t, ablation, keys=[1, 2, 3], lengths=LENGTHS) for t in (x, filled))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(found[row, :, :length], plain[row, :, :length])
        assert torch.equal(plain[row, :, length:], x[row, :, length:])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_input_stays_and_gradients_pass(ablation):
    x = torch.randn(2, 3, 4, requires_grad=True)
    before = x.detach().clone()
    (ablate(x, ablation, keys=[1, 2]) * torch.randn(2, 3, 4)).sum().backward()
    assert torch.equal(x.detach(), before)
    assert (x.grad != 0).all()


def test_half_precision_is_averaged_in_float32():
    x = torch.full((1, 1, 4096), 1.001, dtype=torch.bfloat16)
    x[..., 0] = 300
    expected = x.float().mean().bfloat16()
    assert torch.equal(averaged_frames(x), expected.expand(1, 1, 4096))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ablation": "sorted"}, "no control 'sorted' of time order; known: shuffled, reversed, averaged"),
        ({"ablation": "shuffled"}, "need a key for each sample"),
        ({"ablation": "shuffled", "keys": [1]}, "2 samples need as many keys to be shuffled by, got 1"),
        ({"ablation": "reversed", "lengths": torch.tensor([5, 6])}, r"lengths must lie in 1 to 5.*got \[5, 6\]"),
        ({"ablation": "reversed", "lengths": torch.tensor([0, 5])}, r"lengths must lie in 1 to 5.*got \[0, 5\]"),
        ({"ablation": "averaged", "lengths": torch.tensor([5])}, r"lengths must be \(2,\) whole numbers"),
        ({"ablation": "reversed", "time_axis": 0}, "axis 0 of .* is not time"),
        ({"ablation": "reversed", "time_axis": 3}, "axis 3 of .* is not time"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    ablation = arguments.pop("ablation")
    with pytest.raises(UsageError, match=message):
        ablate(torch.zeros(2, 3, 5), ablation, **arguments)
