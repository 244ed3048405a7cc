"""Both BrainLMs compute the published function, hide what they say, load strictly and train in every precision."""

import os
import re
from pathlib import Path

import pytest
import torch

from fmristream.errors import UsageError
from tests.train.models.plain_brainlm import plain_brainlm, plain_vitmae
from tools.golden import read_case
from tools.parity_brainlm import check_brainlm, check_published_brainlm, check_published_vitmae, check_vitmae
from train.masked_objectives import masked_mse
from train.models.brainlm import Brainlm, load_brainlm
from train.models.brainlm_config import BRAINLM_SIZES, VITMAE_SIZES, brainlm_config, vitmae_config
from train.models.brainlm_heads import FineTuned
from train.models.brainlm_vitmae import BrainlmVitmae, load_vitmae
from train.models.load import WeightsError
from train.models.series_masking import NOTHING, Masking

GOLDEN = Path(__file__).parents[2] / "golden"
WHOLE_GOLDEN = os.environ.get("FMRISTREAM_GOLDEN", "")
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 20,
}
TOKENS = WIDTHS | {"num_timepoints_per_voxel": 20, "timepoint_patching_size": 5, "conv_kernel_size": 7}
IMAGE = WIDTHS | {"decoder_hidden_size": 12, "image_size": 24, "patch_size": 4}
PREDICT = [Masking(mode=mode, ratio=0.55) for mode in ("predict_last", "predict_last_pixel")]


def small(kind, seed=0, *, checkpointing=False, **options):
    """A network with every parameter at random, norms and tokens too."""
    torch.manual_seed(seed)
    if kind == "brainlm":
        model = Brainlm(brainlm_config(TOKENS | options), checkpointing=checkpointing)
    else:
        model = BrainlmVitmae(vitmae_config(IMAGE | options), checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def series_and_xyz(batch=2, parcels=6, frames=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, parcels, frames, generator=generator), torch.randn(parcels, 3, generator=generator)


def assert_golden(rows, groups):
    assert [row for row in rows if not row.is_within] == []
    assert {row.group for row in rows} == groups


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.75, 0.9])
@pytest.mark.parametrize(
    "options", [{}, {"use_tanh_decoder": True, "conv_kernel_size": None, "num_attention_heads": 4}]
)
def test_the_token_model_equals_the_plain_oracle(ratio, options):
    model = small("brainlm", **options).double().eval()
    series, xyz = (values.double() for values in series_and_xyz(frames=15))
    xyz = xyz * torch.tensor([[[1.0]], [[2.0]]])
    noise = torch.rand(2, 6 * 3)
    result = model(series, xyz, masking=Masking(ratio=ratio), noise=noise)
    latent, predicted = plain_brainlm(series, xyz, model.state_dict(), model.config, noise, ratio)
    torch.testing.assert_close(result.latent, latent, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.series, predicted, rtol=0, atol=1e-10)
    assert result.hidden_tokens.sum(1).tolist() == [18 - int(18 * (1 - ratio))] * 2


@pytest.mark.parametrize(("parcels", "frames"), [(18, 14), (24, 24), (7, 11)])
@pytest.mark.parametrize("masking", [NOTHING, Masking(ratio=0.75), *PREDICT], ids=lambda masking: masking.mode)
def test_the_image_model_equals_the_plain_oracle(masking, parcels, frames):
    model = small("vitmae").double().eval()
    series = series_and_xyz(parcels=parcels, frames=frames)[0].double()
    result = model(series, masking=masking, noise=torch.rand(2, 36))
    order, kept = result.restore.argsort(1), int((~result.hidden_tokens[0]).sum())
    blank = int(frames * 0.55) if masking.mode == "predict_last_pixel" else 0
    latent, predicted = plain_vitmae(series, model.state_dict(), model.config, order, kept, blank)
    torch.testing.assert_close(result.latent, latent, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.series, predicted, rtol=0, atol=1e-10)


def test_golden_values_of_the_token_model_at_a_published_size_are_equal():
    rows = check_published_brainlm(read_case(GOLDEN, "pub_brainlm_256"))
    assert_golden(rows, {"outputs", "losses", "masking", "statistics", "counts"})
    assert len(rows) == 5 + 2 * 4 + 1


@pytest.mark.full
def test_golden_values_of_the_image_model_at_a_published_size_are_equal():
    rows = check_published_vitmae(read_case(GOLDEN, "pub_brainlm_vitmae_111m_a"))
    assert_golden(rows, {"outputs", "losses", "masking", "statistics", "counts"})


@pytest.mark.skipif(not WHOLE_GOLDEN, reason="FMRISTREAM_GOLDEN names no folder of golden cases")
@pytest.mark.parametrize(("name", "check"), [("brainlm_a", check_brainlm), ("brainlm_vitmae_a", check_vitmae)])
def test_golden_values_losses_and_gradients_are_equal(name, check):
    groups = {"outputs", "losses", "masking", "counts", "gradients (relative)"}
    rows = check(read_case(Path(WHOLE_GOLDEN), name))
    assert_golden(rows, groups | {"activations"} if name == "brainlm_a" else groups)


@pytest.mark.parametrize(
    ("case", "build", "unused"),
    [
        ("pub_brainlm_256", lambda: Brainlm(brainlm_config({"size": "5m"})), "decoder.decoder_pred."),
        ("pub_brainlm_vitmae_111m_a", lambda: BrainlmVitmae(vitmae_config({"size": "111m"})), "nothing"),
    ],
)
def test_a_checkpoint_holds_the_published_names_and_shapes_and_nothing_else(case, build, unused):
    with torch.device("meta"):
        own = {name: list(tensor.shape) for name, tensor in build().state_dict().items()}
    published = read_case(GOLDEN, case)["tensors"]
    assert own == {name: entry["shape"] for name, entry in published.items() if not name.startswith(unused)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_sizes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        tokens = {size: Brainlm(brainlm_config({"size": size})) for size in BRAINLM_SIZES}
        images = {size: BrainlmVitmae(vitmae_config({"size": size})) for size in VITMAE_SIZES}
    assert parameters(tokens["13m"]) == 13_429_292 - 393_984
    assert parameters(tokens["5m"]) == 5_047_724 - 197_376
    counts = {
        size: parameters(model) + sum(table.numel() for table in model.buffers()) for size, model in images.items()
    }
    assert counts["111m"] == 112_590_080
    assert round(counts["650m"] / 1e6, 1) == 658.3
    encoder = parameters(images["650m"].vit) + images["650m"].vit.embeddings.position_embeddings.numel()
    assert round(encoder / 1e6, 1) == 631.7
    assert round(counts["13m"] / 1e6) == 13


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
@pytest.mark.parametrize("masking", [Masking(ratio=0.75), *PREDICT], ids=lambda masking: masking.mode)
def test_what_is_hidden_is_never_read(kind, masking):
    model = small(kind).eval()
    series, xyz = series_and_xyz()
    seen = model(series, xyz, masking=masking, generator=torch.Generator().manual_seed(0))
    blind = model(
        series.masked_fill(seen.hidden, float("nan")),
        xyz,
        masking=masking,
        generator=torch.Generator().manual_seed(0),
    )
    assert 0 < seen.hidden.sum() < seen.hidden.numel()
    assert torch.equal(seen.series, blind.series)


def test_predicting_modes_hide_whole_tokens_or_exact_frames():
    series, xyz = series_and_xyz()
    hidden = {masking.mode: small("vitmae")(series, xyz, masking=masking).hidden for masking in PREDICT}
    # 11 of 20 frames: the picture's frames 11 to 21, of which the patches from column 12 on are whole.
    assert hidden["predict_last_pixel"].all(1)[0].tolist() == [False] * 9 + [True] * 11
    assert hidden["predict_last"].all(1)[0].tolist() == [False] * 10 + [True] * 10
    tokens = small("brainlm")(series, xyz, masking=PREDICT[0]).hidden
    assert tokens.all(1)[0].tolist() == [False] * 10 + [True] * 10


def test_noise_comes_from_the_generator_alone():
    model, (series, xyz) = small("brainlm").eval(), series_and_xyz()
    first, again, other = (
        model(series, xyz, masking=Masking(ratio=0.75), generator=torch.Generator().manual_seed(seed)).hidden
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_features_are_those_of_a_window_of_which_nothing_is_hidden(kind):
    model, (series, xyz) = small(kind).eval(), series_and_xyz()
    tokens = 24 if kind == "brainlm" else 36
    noise = torch.arange(tokens).expand(2, tokens)
    torch.testing.assert_close(model.features(series, xyz), model(series, xyz, masking=NOTHING, noise=noise).latent)


@pytest.mark.parametrize("masking", [NOTHING, *PREDICT], ids=lambda masking: masking.mode)
def test_the_image_model_sorts_parcels_by_y_and_back(masking):
    model, (series, xyz) = small("vitmae").eval(), series_and_xyz()
    xyz = xyz[xyz[:, 1].argsort()]
    shuffle = torch.tensor([3, 0, 5, 1, 4, 2])
    noise = torch.zeros(2, 36)
    expected = model(series, masking=masking, noise=noise)
    found = model(series[:, shuffle], xyz[shuffle], masking=masking, noise=noise)
    assert torch.equal(found.series, expected.series[:, shuffle])
    assert torch.equal(found.hidden, expected.hidden[:, shuffle])


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_attention_between_parcels_follows_their_order_and_sums_to_one(kind):
    model, (series, xyz) = small(kind).eval(), series_and_xyz()
    shuffle = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = model.parcel_attention(series, xyz, layer=0)
    found = model.parcel_attention(series[:, shuffle], xyz[shuffle], layer=0)
    torch.testing.assert_close(found, expected[:, shuffle][:, :, shuffle])
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, 6))
    assert expected.std() > 1e-4


def train_two_steps(kind, *, bf16, checkpointing):
    model = small(kind, checkpointing=checkpointing)
    series, xyz = series_and_xyz(batch=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            result = model(series, xyz, masking=Masking(ratio=0.75), generator=generator)
        loss = masked_mse(result.series, series, result.hidden)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_two_training_steps_agree_in_both_precisions_with_and_without_checkpointing(kind):
    exact = train_two_steps(kind, bf16=False, checkpointing=False)
    assert train_two_steps(kind, bf16=False, checkpointing=True) == pytest.approx(exact, rel=1e-6)
    rough = train_two_steps(kind, bf16=True, checkpointing=False)
    assert rough == pytest.approx(exact, rel=0.05)
    assert train_two_steps(kind, bf16=True, checkpointing=True) == pytest.approx(rough, rel=1e-3)
    assert exact[1] != exact[0]


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_training_lowers_the_masked_loss(kind):
    torch.manual_seed(0)
    model = small(kind)
    series, xyz = series_and_xyz(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        result = model(series, xyz, masking=Masking(ratio=0.2), generator=torch.Generator().manual_seed(0))
        loss = masked_mse(result.series, series, result.hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_a_compiled_layer_gives_the_same_values_and_gradients(kind, backend):
    layer = small(kind).vit.encoder.layer[0]
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (layer, compiled):
        layer.zero_grad()
        out = function(x)
        out.square().mean().backward()
        gradients.append([out.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("masking", [Masking(ratio=0.75), *PREDICT], ids=lambda masking: masking.mode)
@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_a_whole_model_compiles_in_one_graph(kind, masking):
    model, (series, xyz) = small(kind).eval(), series_and_xyz()
    noise = torch.rand(2, 24 if kind == "brainlm" else 36)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(series, xyz, masking=masking, noise=noise)
    torch.testing.assert_close(found, model(series, xyz, masking=masking, noise=noise))


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_features_are_exported(kind):
    model, (series, xyz) = FineTuned(small(kind), outputs=2).eval(), series_and_xyz()
    exported = torch.export.export(model, (series, xyz)).module()
    torch.testing.assert_close(exported(series, xyz).outputs, model(series, xyz).outputs)


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_a_published_state_dict_loads_completely(kind):
    load, model = {"brainlm": load_brainlm, "vitmae": load_vitmae}[kind], small(kind, seed=1)
    unused = {"decoder.decoder_pred.weight": torch.zeros(3, 16)} if kind == "brainlm" else {}
    weights = small(kind, seed=2).state_dict()
    loaded = load(model, {f"module.{name}": tensor for name, tensor in (weights | unused).items()}, source="a")
    assert set(loaded.ignored) == set(unused)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["brainlm", "vitmae"])
def test_weights_that_do_not_fit_are_refused_with_a_table(kind):
    load, model = {"brainlm": load_brainlm, "vitmae": load_vitmae}[kind], small(kind)
    weights = small(kind, hidden_size=8, decoder_hidden_size=8).state_dict()
    del weights["vit.layernorm.bias"]
    weights["decoder.strange"] = torch.zeros(2)
    with pytest.raises(WeightsError) as caught:
        load(model, weights, source="brainlm.safetensors")
    text = str(caught.value)
    assert re.search(r"brainlm\.safetensors: \d+ names do not fit the model, of \d+ expected", text)
    assert "shape      vit.embeddings.cls_token  model [1, 1, 16]  weights [1, 1, 8]" in text
    with pytest.raises(WeightsError, match=r"unexpected decoder\.strange  model -  weights \[2\]"):
        load(model, model.state_dict() | {"decoder.strange": torch.zeros(2)}, source="a")
    rest = {name: tensor for name, tensor in model.state_dict().items() if name != "vit.layernorm.bias"}
    with pytest.raises(WeightsError, match=r"missing    vit\.layernorm\.bias  model \[16\]  weights -"):
        load(model, rest, source="a")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("brainlm", {"hiden_size": 8}, "did you mean hidden_size"),
        ("brainlm", {"size": "1b"}, "no size '1b'; known: 5m, 13m"),
        ("brainlm", {"num_timepoints_per_voxel": 21}, "21 frames are no multiple of 5"),
        ("brainlm", {"decoder_hidden_size": 8}, "must equal hidden_size"),
        ("brainlm", {"num_landmarks": 32}, "make them equal"),
        ("brainlm", {"conv_kernel_size": 4}, "odd number"),
        ("brainlm", {"loss_fn": "huber"}, "expected mse or mae"),
        ("brainlm", {"mask_ratio": 1.0}, r"mask_ratio must lie in \[0, 1\)"),
        ("brainlm", {"num_attention_heads": 3}, "3 heads do not divide the 16 channels"),
        ("brainlm", {"num_hidden_layers": 0}, "whole number above 0"),
        ("brainlm", {"hidden_act": "relu"}, "expected gelu"),
        ("vitmae", {"image_size": 25}, "no multiple of patch_size 4"),
        ("vitmae", {"norm_pix_loss": True}, "norm_pix_loss is not supported"),
        ("vitmae", {"train_mode": "predict"}, "expected auto_encode, predict_last or predict_last_pixel"),
        ("vitmae", {"decoder_hidden_size": 18, "decoder_num_attention_heads": 2}, "multiple of 4"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(kind, options, message):
    build = {"brainlm": (brainlm_config, TOKENS), "vitmae": (vitmae_config, IMAGE)}[kind]
    with pytest.raises(UsageError, match=message):
        build[0](build[1] | options)


def test_a_configuration_without_sizes_names_what_is_missing():
    with pytest.raises(UsageError, match="needs hidden_size, num_hidden_layers"):
        brainlm_config({})


@pytest.mark.parametrize(
    ("kind", "frames", "xyz", "masking", "message"),
    [
        ("brainlm", 25, (6, 3), NOTHING, "at most 20, got"),
        ("brainlm", 18, (6, 3), NOTHING, "a multiple of 5"),
        ("brainlm", 20, (5, 3), NOTHING, "expected xyz of 6 parcels"),
        ("brainlm", 20, (6, 3), Masking(mode="predict_last", frames=7), "a token is 5 frames"),
        ("brainlm", 20, (6, 3), Masking(mode="predict_last", frames=20), "hide 1 to 19"),
        ("vitmae", 25, (6, 3), NOTHING, "at most 24 of each"),
        ("vitmae", 20, (6, 2), NOTHING, "expected xyz of 6 parcels"),
        ("vitmae", 20, (6, 3), Masking(mode="predict_last", frames=1), "hides no whole patch"),
    ],
)
def test_a_series_that_does_not_fit_is_refused(kind, frames, xyz, masking, message):
    with pytest.raises(UsageError, match=message):
        small(kind)(torch.zeros(1, 6, frames), torch.zeros(xyz), masking=masking)


def test_noise_of_another_shape_is_refused():
    series, xyz = series_and_xyz()
    with pytest.raises(UsageError, match=r"noise must be \(batch, tokens\) = \(2, 24\), got \(2, 23\)"):
        small("brainlm")(series, xyz, noise=torch.zeros(2, 23))
