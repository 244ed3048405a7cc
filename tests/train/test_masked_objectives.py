"""Losses of what was not seen have the values that one computes by hand, and the gradients of those values alone."""

import pytest
import torch

from fmristream.errors import UsageError
from train.masked_objectives import (
    future_l1,
    future_mask,
    future_mse,
    joint_loss,
    masked_l1,
    masked_mean,
    masked_mse,
)

PREDICTED = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 5.0]])
TARGET = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 1.0]])
MASK = torch.tensor([[False, True, True, False], [True, False, False, False]])


def test_masked_losses_are_means_over_the_masked_values_of_the_whole_batch():
    assert masked_mse(PREDICTED, TARGET, MASK).item() == pytest.approx((4 + 9 + 4) / 3)
    assert masked_l1(PREDICTED, TARGET, MASK).item() == pytest.approx((2 + 3 + 2) / 3)


def test_only_masked_values_get_a_gradient():
    predicted = PREDICTED.clone().requires_grad_()
    masked_mse(predicted, TARGET, MASK).backward()
    assert torch.equal(predicted.grad, 2 * (PREDICTED - TARGET) * MASK / 3)


def test_what_is_not_masked_may_be_anything():
    target = TARGET.masked_fill(~MASK, float("nan"))
    predicted = PREDICTED.clone().requires_grad_()
    loss = masked_l1(predicted, target, MASK)
    loss.backward()
    assert loss.item() == pytest.approx(7 / 3)
    assert torch.isfinite(predicted.grad).all()


def test_nothing_masked_costs_nothing():
    predicted = PREDICTED.clone().requires_grad_()
    loss = masked_mse(predicted, TARGET, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0
    assert not predicted.grad.any()


def test_a_mask_over_time_counts_for_every_parcel():
    values = torch.arange(12.0).view(1, 3, 4)
    assert masked_mean(values, torch.tensor([False, False, False, True])).item() == pytest.approx((3 + 7 + 11) / 3)


def test_losses_compute_in_float32():
    large = torch.full((4,), 300.0, dtype=torch.float16)
    assert masked_mse(large, -large, torch.ones(4)).item() == 360_000


def test_future_losses_are_those_of_the_last_frames():
    assert future_mask(5, 2).tolist() == [False, False, False, True, True]
    assert future_mse(PREDICTED, TARGET, 2).item() == pytest.approx((9 + 9 + 0 + 16) / 4)
    assert future_l1(PREDICTED, TARGET, 1).item() == pytest.approx((3 + 4) / 2)


@pytest.mark.parametrize("frames", [0, 4])
def test_a_future_needs_a_past_and_a_frame(frames):
    with pytest.raises(UsageError, match="future frames must number 1 to 3 of a window of 4"):
        future_mse(PREDICTED, TARGET, frames)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(UsageError, match="expected the same"):
        masked_mse(PREDICTED, TARGET[:1], MASK)


def test_the_reconstruction_weighs_half_beside_a_task():
    assert joint_loss(torch.tensor(1.0), torch.tensor(3.0)).item() == 2.5
