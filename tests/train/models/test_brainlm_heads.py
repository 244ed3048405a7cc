"""Heads read the cls token or the mean of the others, and only what can learn asks for a gradient."""

import pytest
import torch
from torch.nn import functional as F

from fmristream.errors import UsageError
from tests.train.models.test_brainlm import series_and_xyz, small
from train.masked_objectives import joint_loss, masked_mse
from train.models.brainlm_heads import FineTuned
from train.models.series_masking import Masking

KINDS = pytest.mark.parametrize("kind", ["brainlm", "vitmae"])


@KINDS
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_are_the_head_of_the_pooled_tokens_of_an_unhidden_window(kind, pooling):
    tuned = FineTuned(small(kind), outputs=3, pooling=pooling).eval()
    series, xyz = series_and_xyz()
    latent = tuned.model.features(series, xyz)
    pooled = latent[:, 0] if pooling == "cls" else latent[:, 1:].mean(1)
    head = tuned.output_head
    expected = head.linear3(F.gelu(head.linear2(F.gelu(head.linear1(pooled)))))
    found = tuned(series, xyz)
    torch.testing.assert_close(found.outputs, expected)
    assert found.outputs.shape == (2, 3)
    assert found.reconstruction is None


@KINDS
def test_a_linear_probe_is_one_map_of_the_pooled_tokens_and_learns_alone(kind):
    tuned = FineTuned(small(kind), outputs=3, pooling="mean", learning="head", head="linear").eval()
    series, xyz = series_and_xyz()
    weight, bias = tuned.output_head.linear.weight, tuned.output_head.linear.bias
    expected = tuned.model.features(series, xyz)[:, 1:].mean(1) @ weight.T + bias
    torch.testing.assert_close(tuned(series, xyz).outputs, expected)
    learning = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert learning == {"output_head.linear.weight", "output_head.linear.bias"}


@KINDS
def test_task_and_reconstruction_learn_together(kind):
    tuned, (series, xyz) = FineTuned(small(kind), outputs=1, learning="all"), series_and_xyz()
    found = tuned(series, xyz, masking=Masking(ratio=0.2), generator=torch.Generator().manual_seed(0))
    reconstruction = masked_mse(found.reconstruction.series, series, found.reconstruction.hidden)
    joint_loss(found.outputs.square().mean(), reconstruction).backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())


@KINDS
@pytest.mark.parametrize(
    ("learning", "beginnings"), [("encoder", ("model.vit.", "output_head.")), ("head", ("output_head.",))]
)
def test_what_gets_no_gradient_asks_for_none(kind, learning, beginnings):
    tuned, (series, xyz) = FineTuned(small(kind), outputs=1, learning=learning), series_and_xyz()
    tuned(series, xyz).outputs.square().sum().backward()
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == name.startswith(beginnings), name


def test_scores_are_float32_under_autocast():
    tuned, (series, xyz) = FineTuned(small("brainlm"), outputs=1), series_and_xyz()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tuned(series, xyz).outputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": 0}, "outputs must be a whole number above 0"),
        ({"outputs": 1, "head": "liner"}, "head 'liner' must be one of mlp, linear"),
        ({"outputs": 1, "pooling": "max"}, "must be cls or mean"),
        ({"outputs": 1, "learning": "decoder"}, "all, encoder or head"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        FineTuned(small("brainlm"), **options)
