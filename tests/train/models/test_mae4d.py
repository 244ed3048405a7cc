"""The 4-D masked autoencoder reads only what is shown, counts only brain, trains in every precision, and learns."""

import numpy as np
import pytest
import torch

from fmristream.errors import UsageError
from tests.train.models.plain_mae4d import multihead, plain_decoder, plain_encoder, table
from tests.train.models.test_mae4d_patches import ball
from train.masked_objectives import masked_mse
from train.models.mae4d import build_mae4d, build_mae4d_pretrain, rebuilding_losses

SIZE, FRAMES = (9, 8, 7), 6
ENCODER = {
    "img_size": [*SIZE, FRAMES],
    "patch_size": [4, 4, 3, 2],
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2,
}
PRETRAIN = ENCODER | {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4, "mask_ratio": 0.75}
MASKS = [
    {"mask": "random"},
    {"mask": "tube"},
    {"mask": "window", "mask_window": [1, 2, 2, 2]},
    {"mask": "span", "mask_ratio": 0.34},
    {"mask": "future", "mask_ratio": 0.34},
]
BRAIN = ball(SIZE)
OUTSIDE = ~torch.from_numpy(BRAIN)[..., None]


def small(build=build_mae4d_pretrain, *, seed=0, **options):
    """A network of the ball's patches with every parameter at random, norms too."""
    torch.manual_seed(seed)
    model = build((PRETRAIN if build is build_mae4d_pretrain else ENCODER) | options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.set_brain(BRAIN)
    return model


def clips(batch=2, channels=1, frames=FRAMES, seed=1):
    return torch.randn(batch, channels, *SIZE, frames, generator=torch.Generator().manual_seed(seed))


def noise_of(model, batch=2, frames=FRAMES, seed=2):
    return torch.rand(batch, model.noise_size(frames), generator=torch.Generator().manual_seed(seed))


def weights_of(module):
    """The parameters, and the tables of positions that no checkpoint holds."""
    return dict(module.named_parameters()) | {f"positions.{n}": t for n, t in module.positions.named_buffers()}


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_an_encoder_of_which_nothing_is_hidden_equals_torchs_own_transformer(positions):
    model = small(build_mae4d, positions=positions).double()
    x = clips().double()
    patches, places = model.encoder.cut(x), model.encoder.patches.places.tolist()
    expected = plain_encoder(patches, weights_of(model.encoder), places, heads=3)
    torch.testing.assert_close(model.features(x), expected, rtol=0, atol=1e-10)
    assert expected.shape == (2, 1 + 3 * model.encoder.patches.count, 24)


@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["mask"])
def test_what_is_predicted_equals_the_plain_oracle(mask, decoder):
    model = small(decoder=decoder, in_chans=2, **mask).double()
    x = clips(channels=2).double()
    with torch.no_grad():
        rebuilt = model(x, noise=noise_of(model))
        patches, places = model.encoder.cut(x), model.encoder.patches.places.tolist()
        latent = plain_encoder(patches, weights_of(model.encoder), places, 3, rebuilt.shown)
        predicted = plain_decoder(
            latent, weights_of(model.decoder), places, 3, 4, rebuilt.shown, cross=decoder == "cross"
        )
    torch.testing.assert_close(rebuilt.latent, latent, rtol=0, atol=1e-10)
    for sample in range(2):
        hidden = rebuilt.hidden[sample]
        torch.testing.assert_close(rebuilt.predicted[sample], predicted[sample, hidden], rtol=0, atol=1e-10)
        assert torch.equal(rebuilt.target[sample], patches[sample, hidden])


def test_sinusoidal_positions_are_sines_of_time_and_of_each_axis():
    model = small(build_mae4d, positions="sinusoidal")
    positions = model.encoder.positions
    rates = 10000.0 ** -(np.arange(12) / 12)
    np.testing.assert_allclose(positions.time[2, :12], np.sin(2 * rates), atol=1e-6)
    np.testing.assert_allclose(positions.time[2, 12:], np.cos(2 * rates), atol=1e-6)
    # Place (2, 1, 0) of a grid of 3 x 2 x 3; 8 of the 24 channels for each axis.
    row, third = positions.space[2 * 6 + 1 * 3 + 0].numpy(), 10000.0 ** -(np.arange(4) / 4)
    expected = [wave(place * third) for place in (2, 1, 0) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(row, np.concatenate(expected), atol=1e-6)
    assert "positions.time" not in model.encoder.state_dict()
    learned = small(build_mae4d).encoder.positions
    assert not torch.equal(learned.time, positions.time)
    assert all(parameter.requires_grad for parameter in learned.parameters())
    assert len(list(learned.parameters())) == 2
    assert table(weights_of(model.encoder), [0, 1], 3).unique(dim=0).shape == (6, 24)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["mask"])
def test_what_is_hidden_is_never_read(mask):
    model, x = small(**mask).eval(), clips()
    noise = noise_of(model)
    seen = model(x, noise=noise)
    hidden = model.volumes(torch.ones_like(seen.predicted), seen.hidden, frames=FRAMES) > 0
    assert 0 < hidden.sum() < hidden.numel()
    blind = model(x.masked_fill(hidden, float("nan")), noise=noise)
    assert torch.equal(seen.latent, blind.latent)
    assert torch.equal(seen.predicted, blind.predicted)


def test_what_is_shown_is_read():
    model, x = small().eval(), clips()
    noise = noise_of(model)
    seen = model(x, noise=noise)
    hidden = model.volumes(torch.ones_like(seen.predicted), seen.hidden, frames=FRAMES) > 0
    other = model(torch.where(hidden | OUTSIDE, x, x + 1), noise=noise)
    assert not torch.allclose(seen.latent, other.latent)


def test_what_is_outside_the_brain_changes_neither_prediction_nor_loss():
    model, x = small().eval(), clips()
    noise = noise_of(model)
    expected, found = model(x, noise=noise), model(x.masked_fill(OUTSIDE, float("nan")), noise=noise)
    assert torch.equal(found.predicted, expected.predicted)
    assert torch.equal(rebuilding_losses(found), rebuilding_losses(expected))
    # Predictions of what is outside do not count either: the weights of such values get no gradient.
    rebuilding_losses(expected).sum().backward()
    never = ~expected.counted.flatten(0, 1).any(dim=0)
    assert never.any()
    assert not model.decoder.pred.weight.grad[never].any()


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["mask"])
def test_the_loss_is_the_squared_error_of_the_hidden_voxels_of_the_brain(mask):
    model, x = small(in_chans=2, **mask).eval(), clips(channels=2)
    rebuilt = model(x, noise=noise_of(model))
    hidden = (model.volumes(torch.ones_like(rebuilt.predicted), rebuilt.hidden, frames=FRAMES) > 0).numpy()
    picture = model.volumes(rebuilt.predicted, rebuilt.hidden, frames=FRAMES).detach().double().numpy()
    assert not hidden[:, :, ~BRAIN].any()
    squares = [((picture[n] - x[n].double().numpy()) ** 2)[hidden[n]] for n in range(2)]
    np.testing.assert_allclose(rebuilding_losses(rebuilt).detach(), [part.mean() for part in squares], rtol=1e-5)
    together = masked_mse(rebuilt.predicted, rebuilt.target, rebuilt.counted)
    np.testing.assert_allclose(together.item(), np.concatenate(squares).mean(), rtol=1e-5)
    assert int(rebuilt.counted.sum()) == hidden.sum()


def test_a_target_may_be_normalised_by_patch():
    model, x = small(normalise_target=True), clips()
    noise = noise_of(model)
    target, counted = model(x, noise=noise)[1:3]
    scaled = model(7 * x + 3, noise=noise).target
    torch.testing.assert_close(scaled, target, atol=1e-4, rtol=1e-3)
    values = target[0, 0][counted[0, 0]]
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_sample_is_rebuilt_alike_in_any_batch():
    model, x = small().eval(), clips(batch=4)
    noise = noise_of(model, batch=4)
    together = model(x, noise=noise)
    apart = [model(x[rows], noise=noise[rows]) for rows in (slice(0, 1), slice(1, 4))]
    assert torch.equal(together.hidden, torch.cat([part.hidden for part in apart]))
    torch.testing.assert_close(rebuilding_losses(together), torch.cat([rebuilding_losses(part) for part in apart]))


def test_noise_comes_from_the_generator_alone():
    model, x = small(mask="random"), clips()
    first, again, other = (model(x, generator=torch.Generator().manual_seed(seed)).hidden for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_a_head_reads_the_pooled_tokens(pooling):
    model = small(build_mae4d, pooling=pooling, outputs=3)
    x = clips()
    with torch.no_grad():
        tokens, found = model.features(x).double(), model(x)
        if pooling == "attention":
            weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
            query = weights["pool.query_token"].repeat(2, 1, 1)
            pooled = multihead(weights, "pool.attn.", 3)(query, tokens[:, 1:], tokens[:, 1:])[0][:, 0]
        else:
            pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
        expected = pooled @ model.output_head.head.weight.double().T + model.output_head.head.bias.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, found, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"pooling": "cls"}, {"pooling": "attention", "head": "v2"}])
def test_a_probe_leaves_the_encoder_as_it_is_and_training_reaches_everything(options):
    probe, whole = (small(build_mae4d, learning=learning, **options) for learning in ("head", "all"))
    for model in (probe, whole):
        model(clips()).square().sum().backward()
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in probe.encoder.parameters())
    assert all(parameter.grad is not None for name, parameter in probe.named_parameters() if "encoder." not in name)
    assert all(parameter.grad is not None for parameter in whole.parameters())


def train_two_steps(build, *, bf16, checkpointing, **options):
    model = small(build, checkpointing=checkpointing, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            given = {"noise": noise_of(model, seed=step)} if build is build_mae4d_pretrain else {}
            result = model(clips(seed=step), **given)
        loss = rebuilding_losses(result).mean() if given else (result - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (build_mae4d_pretrain, {}),
        (build_mae4d_pretrain, {"decoder": "cross", "mask": "random", "positions": "sinusoidal"}),
        (build_mae4d, {"pooling": "attention"}),
    ],
    ids=["self", "cross", "head"],
)
def test_two_training_steps_agree_in_both_precisions_with_and_without_checkpointing(build, options):
    exact = train_two_steps(build, bf16=False, checkpointing=False, **options)
    assert train_two_steps(build, bf16=False, checkpointing=True, **options) == pytest.approx(exact, rel=1e-6)
    rough = train_two_steps(build, bf16=True, checkpointing=False, **options)
    assert rough == pytest.approx(exact, rel=0.05)
    assert train_two_steps(build, bf16=True, checkpointing=True, **options) == pytest.approx(rough, rel=1e-3)
    assert exact[1] != exact[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_compiled_layer_gives_the_same_values_and_gradients(kind, backend):
    layer = small(decoder=kind).decoder.layers[0]
    inputs = [torch.randn(2, size, 16, generator=torch.Generator().manual_seed(size)) for size in (9, 5)]
    inputs = inputs[:1] if kind == "self" else inputs
    gradients = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        layer.zero_grad()
        out = function(*inputs)
        out.square().mean().backward()
        gradients.append([out.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["mask"])
def test_a_whole_model_compiles_in_one_graph(mask):
    model, x = small(**mask).eval(), clips()
    noise = noise_of(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tuple(compiled(x, noise=noise)), tuple(model(x, noise=noise)))


def test_a_supervised_network_is_exported():
    model, x = small(build_mae4d, pooling="attention").eval(), clips()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def correlated_clips(batch, generator):
    """One network with a slow time course, of either sign, and a little noise; each voxel at mean 0 and SD 1 over time."""
    weights = torch.sin(torch.linspace(-2, 2, SIZE[0] * SIZE[1] * SIZE[2])).view(*SIZE, 1)
    courses = torch.randn(batch, FRAMES + 4, generator=generator).unfold(1, 5, 1).mean(2)
    bold = weights * courses[:, None, None, None, None]
    bold = bold + 0.05 * torch.randn(bold.shape, generator=generator)
    return (bold - bold.mean(-1, keepdim=True)) / bold.std(-1, keepdim=True, correction=0)


@pytest.mark.parametrize("decoder", ["self", pytest.param("cross", marks=pytest.mark.full)])
def test_training_rebuilds_correlated_signal_that_was_never_seen_better_than_zero_does(decoder):
    torch.manual_seed(0)
    model = build_mae4d_pretrain(PRETRAIN | {"decoder": decoder})
    model.set_brain(BRAIN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, held_out = torch.Generator().manual_seed(0), correlated_clips(32, torch.Generator().manual_seed(1))
    noise = noise_of(model, batch=32)

    def error_beside_zero():
        with torch.no_grad():
            rebuilt = model(held_out, noise=noise)
        zero = masked_mse(torch.zeros_like(rebuilt.target), rebuilt.target, rebuilt.counted)
        return (masked_mse(rebuilt.predicted, rebuilt.target, rebuilt.counted) / zero).item()

    before = error_beside_zero()
    for _ in range(225):
        loss = rebuilding_losses(model(correlated_clips(16, generator), generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 1
    assert error_beside_zero() < 0.8


def test_short_clips_have_the_first_times():
    model, short = small(build_mae4d), small(build_mae4d, img_size=[*SIZE, 4])
    weights = model.state_dict()
    weights["encoder.positions.time"] = weights["encoder.positions.time"][:2]
    short.load_state_dict(weights)
    x = clips(frames=4)
    assert torch.equal(model(x), short(x))


@pytest.mark.parametrize(
    "shape", [(2, 2, *SIZE, 6), (2, 1, 9, 8, 8, 6), (2, 1, *SIZE, 8), (2, 1, *SIZE, 5), (2, 1, *SIZE, 0), (2, *SIZE, 6)]
)
def test_bold_of_another_shape_is_refused(shape):
    with pytest.raises(UsageError, match=r"expected \(batch, 1, 9, 8, 7, at most 6 in steps of 2\)"):
        small(build_mae4d)(torch.zeros(shape))


def test_noise_for_another_number_of_clips_is_refused():
    model = small()
    with pytest.raises(UsageError, match="3 rows of noise for 2 clips"):
        model(clips(), noise=noise_of(model, batch=3))


def test_a_mask_of_the_brain_that_leaves_nothing_to_hide_is_refused_at_once():
    model = small()
    one = np.zeros(SIZE, dtype=bool)
    one[0, 0, 0] = True
    with pytest.raises(UsageError, match=r"mask tube with mask_ratio 0\.75 would hide 1 of 1 places"):
        model.set_brain(one)


def test_the_published_size_has_as_many_parameters_as_its_parts():
    with torch.device("meta"):
        model = build_mae4d_pretrain({"img_size": [91, 109, 91, 16], "size": "b"})
    assert model.config.grid == (12, 14, 12)
    layer = 12 * 768**2 + 13 * 768
    encoder = 12 * layer + 2048 * 768 + 768 + 768 + (12 * 14 * 12 + 4) * 768 + 2 * 768
    decoder = 4 * (12 * 512**2 + 13 * 512) + 769 * 512 + 512 + (2016 + 4) * 512 + 2 * 512 + 513 * 2048
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == encoder == 88_181_760
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == decoder


def test_a_size_gives_widths_that_options_may_change():
    model = build_mae4d({"img_size": [8, 8, 8, 4], "size": "t", "depth": 2, "outputs": 3})
    assert (model.num_features, len(model.encoder.layers), model.output_head.head.out_features) == (192, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": [9, 8, 7]}, "img_size must be a list of 4 whole numbers above 0"),
        ({"patch_size": [4, 4, 3, 0]}, "patch_size must be a list of 4 whole numbers above 0"),
        ({"img_size": [9, 8, 7, 5]}, "clips of 5 frames are no multiple of the 2 frames of a patch"),
        ({"embed_dim": 26}, "num_heads 3 does not divide the 26 channels of embed_dim"),
        ({"decoder_heads": 3}, "decoder_heads 3 does not divide the 16 channels of decoder_dim"),
        ({"embed_dim": 27}, "embed_dim must be even and 6 or more"),
        ({"depth": 0}, "depth must be a whole number above 0, got 0"),
        ({"decoder": "both"}, "decoder must be one of self, cross, got 'both'"),
        ({"positions": "none"}, "positions must be one of learned, sinusoidal"),
        ({"checkpointing": 1}, "checkpointing must be true or false"),
        ({"normalise_target": "yes"}, "normalise_target must be true or false"),
        ({"mask": "block"}, "mask must be one of random, tube"),
        ({"mask_ratio": 1.5}, "mask_ratio must lie between 0 and 1"),
        ({"mask_window": [2, 2]}, "mask_window must be a list of 4"),
        ({"mask": "span", "mask_ratio": 0.9}, "would hide 3 of 3 times"),
        ({"masking": None}, "say what is hidden by mask, mask_ratio and mask_window"),
        ({"mask_ratoi": 0.5}, "mae4d-pretrain has no option mask_ratoi; did you mean mask_ratio"),
        ({"outputs": 1}, "mae4d-pretrain has no option outputs"),
        ({"size": "h"}, "mae4d-pretrain has no size 'h'; known: t, s, b"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(UsageError, match=message):
        build_mae4d_pretrain(PRETRAIN | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, cls, attention"),
        ({"learning": "none"}, "learning must be one of all, head"),
        ({"head": "v9"}, "there is no head 'v9'"),
        ({"outputs": 0}, "outputs must be a whole number above 0"),
        ({"mask": "tube"}, "mae4d has no option mask"),
        ({"embed_dims": 24}, "did you mean embed_dim"),
    ],
)
def test_a_supervised_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(UsageError, match=message):
        build_mae4d(ENCODER | change)


def test_a_config_without_the_size_of_the_data_names_it():
    for build in (build_mae4d, build_mae4d_pretrain):
        with pytest.raises(UsageError, match="needs img_size"):
            build({})
