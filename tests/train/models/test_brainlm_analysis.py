"""Forecasts, perturbations, networks and anomalies have the values that are known from how the case was made."""

import numpy as np
import pytest
import torch
from torch import nn

from fmristream.errors import UsageError
from tests.train.models.test_brainlm import series_and_xyz, small
from train.models.brainlm_analysis import (
    AnomalyScores,
    Perturbation,
    anomaly_scores,
    connectivity,
    forecast,
    mean_attention,
    nearest,
    perturb,
    read_networks,
    row_similarity,
    vote_accuracy,
)
from train.models.series_masking import Masking, Reconstruction, choose_random

PATCH = 2
# Next frame of each parcel from the last frame of all: 0 persists, 1 follows twice 0, 2 is halved.
DYNAMICS = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.5]])


class KnownDynamics(nn.Module):
    """A model whose answers are known: it continues a linear law frame by frame, and fills hidden tokens with 0."""

    patch, num_features, masking = PATCH, 1, Masking()

    def forward(self, series, xyz, *, masking, noise=None, generator=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        b, parcels, frames = series.shape
        if masking.mode == "auto_encode":
            tokens = parcels * frames // PATCH
            noise = torch.rand(b, tokens, generator=generator) if noise is None else noise
            choice = choose_random(b, tokens, masking.ratio, noise)
            hidden = choice.hidden.repeat_interleave(PATCH, dim=1).view(series.shape)
            return Reconstruction(torch.zeros_like(series), hidden, None, choice.hidden, choice.restore)
        predicted = series.clone()
        predicted[:, :, -masking.frames :] = float("nan")
        for frame in range(frames - masking.frames, frames):
            predicted[:, :, frame] = predicted[:, :, frame - 1] @ DYNAMICS.T
        return Reconstruction(predicted, torch.arange(frames) >= frames - masking.frames, None, None, None)


XYZ = torch.zeros(3, 3)


def known_future(history, frames):
    series = history.clone()
    for _ in range(frames):
        series = torch.cat([series, (series[:, :, -1] @ DYNAMICS.T)[:, :, None]], dim=2)
    return series[:, :, history.shape[2] :]


@pytest.mark.parametrize("step", [1, 3, None])
def test_a_roll_out_continues_the_law_of_the_series(step):
    history = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    model = KnownDynamics().train()
    found = forecast(model, history, XYZ, frames=7, window=6, step=step)
    torch.testing.assert_close(found, known_future(history, 7))
    assert model.training


def test_a_perturbed_parcel_moves_those_that_follow_it_and_no_other():
    history = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    found = perturb(KnownDynamics(), history, XYZ, Perturbation(parcel=0, frames=2, shift=3.0), frames=4, window=6)
    expected = torch.tensor([3.0, 6.0, 0.0])[None, :, None].expand(2, 3, 4)
    torch.testing.assert_close(found.response, expected)
    np.testing.assert_allclose(found.effect, [3.0, 6.0, 0.0], rtol=1e-6)
    torch.testing.assert_close(found.baseline, known_future(history, 4))
    lines = found.report(["visual", "motor", "limbic"], rows=2).splitlines()
    assert lines[0] == "Parcel visual: last 2 frames x 1 + 3; forecast of 4 frames, 2 windows"
    assert lines[4:] == ["| motor | 6 |", "| visual | 3 |"]


def test_a_scaled_past_leaves_the_given_history_as_it_was():
    history = torch.ones(1, 3, 6)
    found = perturb(KnownDynamics(), history, XYZ, Perturbation(parcel=2, frames=4, scale=5.0), frames=1, window=6)
    assert found.response[0, :, 0].tolist() == [0.0, 0.0, 2.0]
    assert torch.equal(history, torch.ones(1, 3, 6))


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_a_real_model_predicts_the_future_from_the_past_alone(kind):
    series, xyz = series_and_xyz(frames=25)
    model = small(kind)
    found = forecast(model, series, xyz, frames=12, window=20)
    assert found.shape == (2, 6, 12)
    first = Masking(mode="predict_last_pixel", frames=model.patch)
    window = torch.cat([series[:, :, -(20 - model.patch) :], torch.full((2, 6, model.patch), 7.0)], dim=2)
    with torch.no_grad():
        expected = model.eval()(window, xyz, masking=first).series[:, :, -model.patch :]
    torch.testing.assert_close(found[:, :, : model.patch], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "at least 1 frame"),
        ({"window": 12}, r"needs a history \(b, parcels, 10 or more\)"),
        ({"step": 6}, "a step must be 1 to 5 frames of a window of 6, got 6"),
    ],
)
def test_a_forecast_that_cannot_be_made_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        forecast(KnownDynamics(), torch.ones(1, 3, 9), XYZ, **({"frames": 4, "window": 6} | change))


@pytest.mark.parametrize(("parcel", "frames", "message"), [(3, 1, "the series has 3"), (0, 5, "change 1 to 4 of them")])
def test_a_perturbation_that_the_forecast_would_not_see_is_refused(parcel, frames, message):
    with pytest.raises(UsageError, match=message):
        perturb(
            KnownDynamics(), torch.ones(1, 3, 9), XYZ, Perturbation(parcel=parcel, frames=frames), frames=2, window=6
        )


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="not finite"):
        forecast(KnownDynamics(), torch.full((1, 3, 9), float("nan")), XYZ, frames=1, window=6)


def test_votes_and_ties_are_those_counted_by_hand():
    labels = np.array([0, 0, 1, 1, 1])
    # Outvoted right, outvoted wrong, outvoted right, unanimously right, unanimously wrong.
    neighbours = np.array([[2, 1, 1], [3, 0, 4], [3, 4, 0], [2, 4, 2], [0, 1, 0]])
    assert vote_accuracy(neighbours, labels) == pytest.approx(3 / 5)
    # Ties go to the nearer: right, wrong, right; then unanimous; then a tie again.
    assert vote_accuracy(np.array([[1, 2], [2, 0], [3, 0], [2, 4], [3, 0]]), labels) == pytest.approx(4 / 5)
    similarity = np.array([[9.0, 1.0, 2.0], [5.0, 9.0, 5.0], [0.0, 3.0, 9.0]])
    assert nearest(similarity, 2).tolist() == [[2, 1], [0, 2], [1, 0]]


def test_similarity_of_rows_is_their_correlation():
    features = np.random.default_rng(0).normal(size=(4, 7))
    np.testing.assert_allclose(row_similarity(features), np.corrcoef(features), atol=1e-12)
    assert not row_similarity(np.ones((2, 3))).any()


def test_connectivity_is_the_mean_correlation_and_constant_parcels_have_none():
    windows = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.mean([np.corrcoef(window) for window in windows.numpy()], axis=0)
    np.testing.assert_allclose(connectivity(windows), expected, atol=1e-12)
    windows[:, 1] = 2.0
    assert not connectivity(windows)[1].any()


def attentive_model(strength):
    """The real token model, its first layer attending to tokens of equal mean signal, as strongly as told."""
    model = small("brainlm", num_hidden_layers=1)
    with torch.no_grad():
        embeddings, attention = model.vit.embeddings, model.vit.encoder.layer[0].attention.self
        for parameter in [*embeddings.parameters(), *attention.parameters()]:
            parameter.zero_()
        embeddings.pos_embedding.pe.zero_()
        embeddings.signal_embedding_projection.weight[0] = 1 / model.patch
        attention.query.weight[0, 0] = attention.key.weight[0, 0] = strength
    return model


def networks_case(*, coupled):
    """24 parcels at random places, two networks: by the sign of the mean, and by a shared course if coupled."""
    generator = torch.Generator().manual_seed(2)
    networks = np.arange(24) % 2
    noise = torch.randn(3, 24, 20, generator=generator)
    course = torch.randn(3, 2, 20, generator=generator)[:, networks]
    windows = 0.3 * (noise - noise.mean(2, keepdim=True)) + (course if coupled else 0)
    if not coupled:
        windows = windows + torch.tensor([2.0, -2.0])[networks][None, :, None]
    return windows, torch.randn(24, 3, generator=generator), ["visual" if n else "motor" for n in networks]


def test_networks_that_only_attention_knows_are_read_from_attention():
    windows, xyz, networks = networks_case(coupled=False)
    found = read_networks(attentive_model(3.0), windows, xyz, networks)
    assert (found.parcels, found.networks, found.attention) == (24, 2, 1.0)
    mean, low, high = found.chance
    assert low < mean < high < 1.0
    assert 0.3 < mean < 0.6
    assert low <= found.connectivity <= high
    assert low - 0.1 <= found.position <= high + 0.1
    lines = found.report().splitlines()
    assert lines[0] == "24 parcels, 2 networks, 5 nearest neighbours, leave one out"
    assert lines[4] == "| attention | 1.000 |"
    assert lines[7] == f"| chance | {mean:.3f} ({low:.3f} to {high:.3f}) |"


def test_networks_that_attention_does_not_know_are_not_read_from_it():
    windows, xyz, networks = networks_case(coupled=True)
    found = read_networks(attentive_model(0.0), windows, xyz, networks, neighbours=3)
    assert found.connectivity == 1.0
    assert found.attention <= found.chance[2]


def test_uniform_attention_is_uniform():
    windows, xyz, _ = networks_case(coupled=True)
    np.testing.assert_allclose(mean_attention(attentive_model(0.0), windows, xyz), 1 / 24, rtol=1e-6)


@pytest.mark.parametrize(
    ("networks", "neighbours", "message"),
    [(["a"] * 23, 5, "do not belong together"), (["a"] * 24, 24, "neighbours must number 1 to 23")],
)
def test_a_read_out_of_what_does_not_belong_together_is_refused(networks, neighbours, message):
    windows, xyz, _ = networks_case(coupled=True)
    with pytest.raises(UsageError, match=message):
        read_networks(attentive_model(1.0), windows, xyz, networks, neighbours=neighbours)


def test_errors_of_hidden_values_and_of_the_future_are_those_computed_by_hand():
    runs = [torch.full((3, 8), 2.0), torch.tensor([[1.0], [3.0], [5.0]]) * torch.ones(3, 12)]
    found = anomaly_scores(KnownDynamics(), runs, XYZ, window=8, hidden=0.3)
    # What is hidden is filled with 0; two frames are predicted from constant ones.
    np.testing.assert_allclose(found.reconstruction, [[4.0, 4.0, 4.0], [1.0, 9.0, 25.0]])
    np.testing.assert_allclose(found.forecast, [[0, 4, (1 + 1.5**2) / 2], [0, 1, (2.5**2 + 3.75**2) / 2]])
    np.testing.assert_allclose(found.by_run[:, 0], [4, 35 / 3])
    lines = found.report(["first", "second"], ["a", "b", "c"]).splitlines()
    assert lines[0] == "2 runs, 3 parcels"
    assert lines[4].startswith("| second | 11.67 |")
    assert lines[4].endswith("| c | c |")


def test_every_value_is_hidden_and_every_frame_after_the_context_predicted():
    ramp = torch.arange(11.0).repeat(3, 1)
    found = anomaly_scores(KnownDynamics(), [ramp], XYZ, window=4, hidden=0.45)
    # Parcel 0 is predicted by its last value: off by 1 and 2; windows start at 0, 2, 4, 6 and 7.
    assert found.forecast[0, 0] == pytest.approx(2.5)
    assert found.reconstruction.shape == (1, 3)
    assert (found.reconstruction > 0).all()


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_scores_of_a_real_model_are_repeatable_and_find_the_noisy_parcel(kind):
    runs = [series_and_xyz(seed=seed)[0][0] for seed in range(5)]
    xyz = series_and_xyz()[1]
    odd = runs[0].clone()
    odd[4] += 30 * torch.randn(20, generator=torch.Generator().manual_seed(9))
    model = small(kind)
    reference = anomaly_scores(model, runs, xyz, window=20)
    found, again = (anomaly_scores(model, [odd], xyz, window=20) for _ in range(2))
    np.testing.assert_array_equal(found.reconstruction, again.reconstruction)
    z = found.against(reference)
    assert z.reconstruction[0].argmax() == z.forecast[0].argmax() == 4


def test_scores_against_a_reference_are_robust_z_of_logs():
    reference = AnomalyScores(reconstruction=np.exp([[0.0], [1.0], [3.0]]), forecast=np.exp([[1.0], [2.0], [2.5]]))
    found = AnomalyScores(reconstruction=np.exp([[4.0]]), forecast=np.exp([[0.0]])).against(reference)
    assert found.reconstruction[0, 0] == pytest.approx(3 / 1.4826)
    assert found.forecast[0, 0] == pytest.approx(-2 / (1.4826 * 0.5))


def test_scores_need_runs_as_long_as_a_window_and_three_reference_runs():
    with pytest.raises(UsageError, match=r"run 1: expected \(parcels, 8 frames or more\), got \(3, 7\)"):
        anomaly_scores(KnownDynamics(), [torch.ones(3, 8), torch.ones(3, 7)], XYZ, window=8)
    with pytest.raises(UsageError, match="hides 12 of 12 tokens"):
        anomaly_scores(KnownDynamics(), [torch.ones(3, 8)], XYZ, window=8, hidden=0.99)
    two = AnomalyScores(reconstruction=np.ones((2, 3)), forecast=np.ones((2, 3)))
    with pytest.raises(UsageError, match="three reference runs or more, got 2"):
        two.against(two)
