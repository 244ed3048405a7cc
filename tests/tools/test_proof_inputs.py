"""What networks are shown in the proof."""

import numpy as np
import torch

from tools.proof_inputs import channel_sds, scaled_by, shuffled_frames, static_mean

BOLD = torch.randn(3, 2, 4, 5, 3, 7, generator=torch.Generator().manual_seed(0))


def test_the_static_channel_is_the_mean_of_global_z_in_every_frame():
    changed, lengths = static_mean(None, (BOLD, "kept"))
    assert lengths == "kept"
    assert changed.shape == BOLD.shape
    torch.testing.assert_close(changed[:, 0], BOLD[:, 1])
    for frame in range(7):
        torch.testing.assert_close(changed[:, 1, ..., frame], BOLD[:, 0].mean(-1))


def test_channels_are_divided_by_their_own_scale():
    (changed,) = scaled_by(torch.tensor([2.0, 0.5], dtype=torch.float64))(None, (BOLD,))
    assert changed.dtype == BOLD.dtype
    torch.testing.assert_close(changed[:, 0], BOLD[:, 0] / 2)
    torch.testing.assert_close(changed[:, 1], BOLD[:, 1] * 2)


def test_scales_are_the_standard_deviations_over_all_windows_together():
    offset = BOLD + torch.tensor([-6.0, 0.5]).view(1, 2, 1, 1, 1, 1)
    found = channel_sds([offset[:2], offset[2:]])
    np.testing.assert_allclose(found, offset.numpy().astype(np.float64).std(axis=(0, 2, 3, 4, 5)), rtol=1e-9)
    (scaled,) = scaled_by(found)(None, (offset,))
    np.testing.assert_allclose(channel_sds([scaled]), [1, 1], rtol=1e-5)


def test_frames_are_shuffled_within_each_sample_in_an_order_of_its_own():
    series = torch.arange(6 * 4 * 20.0).view(6, 4, 20)
    (shuffled,) = shuffled_frames(5)(None, (series,))
    orders = (shuffled[:, 0] - series[:, 0, :1]).long()
    torch.testing.assert_close(shuffled, series.gather(-1, orders[:, None].expand_as(series)))
    torch.testing.assert_close(shuffled.sort(-1).values, series)
    assert len({tuple(order.tolist()) for order in orders}) == 6


def test_the_same_calls_shuffle_alike_and_the_next_call_otherwise():
    series = torch.arange(2 * 3 * 30.0).view(2, 3, 30)
    first, again, other = shuffled_frames(1), shuffled_frames(1), shuffled_frames(2)
    (a,), (b,), (c,) = (hook(None, (series,)) for hook in (first, again, other))
    torch.testing.assert_close(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, first(None, (series,))[0])


def test_a_hook_changes_what_a_network_sees_and_none_of_its_weights():
    network = torch.nn.Flatten()
    before = network(BOLD)
    handle = network.register_forward_pre_hook(shuffled_frames(0))
    assert not torch.equal(network(BOLD), before)
    assert not network.state_dict()
    handle.remove()
    torch.testing.assert_close(network(BOLD), before)
