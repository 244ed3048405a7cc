"""SwiFT computes the published function, from any memory layout, on any grid that the published code accepts."""

import os
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fmristream.errors import UsageError
from tests.train.models.plain_swift import plain_swift
from tools.golden import read_case
from tools.parity_swift import check_published_swift, check_swift
from train.models import build_model
from train.models.load import WeightsError, load_backbone
from train.models.swift import LARGE_STAGE, MLP_CHUNK, Swift, build_swift, resize_tables, stretch_table
from train.models.swift_config import swift_config

GOLDEN = Path(__file__).parents[2] / "golden"
WHOLE_GOLDEN = os.environ.get("FMRISTREAM_GOLDEN", "")
SMALL = {
    "img_size": [8, 12, 8, 5],
    "patch_size": [2, 3, 2, 1],
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [2, 2, 2, 2],
    "first_window_size": [2, 2, 2, 2],
    "last_layer_full_MSA": False,
}


def small_bold(batch=2, seed=0):
    return torch.randn(batch, 1, *SMALL["img_size"], generator=torch.Generator().manual_seed(seed))


def read_golden(name):
    """A case of the repository, or of the whole folder of them, which is too large for it."""
    folder = GOLDEN if (GOLDEN / f"{name}.json").exists() else WHOLE_GOLDEN
    if not folder:
        pytest.skip(f"{name}: FMRISTREAM_GOLDEN names no folder of golden cases")
    return read_case(Path(folder), name)


@pytest.mark.parametrize(
    ("case", "compared"), [("swift_a1", 19 + 90 - 5), ("swift_a2", 21 + 143 - 5), ("swift_a3", 17 + 61 - 5)]
)
def test_golden_features_heads_losses_and_gradients_are_equal(case, compared):
    rows = check_swift(read_golden(case))
    assert [row for row in rows if not row.is_within] == []
    assert len(rows) == compared + 1, "all stored outputs, all parameters and the input"
    assert {row.group for row in rows} == {"features", "heads", "losses", "activations", "gradients (relative)"}


def test_golden_features_at_the_published_size_are_equal():
    rows = check_published_swift(read_case(GOLDEN, "pub_swift_36"))
    assert [row for row in rows if not row.is_within] == []
    assert len(rows) == 7 + 4 * 4 + 1


@pytest.mark.parametrize("name", ["swift_a1", "swift_a2", "swift_a3"])
def test_the_oracle_itself_gives_the_golden_features(name):
    case = read_golden(name)
    weights = {key.removeprefix("model."): tensor for key, tensor in case.tensors("weights").items()}
    io = case.tensors("io")
    features = plain_swift(io["x"].float(), weights, case["config"])
    torch.testing.assert_close(features, io["feature"], rtol=0, atol=1e-5)


@st.composite
def small_configs(draw):
    stages = draw(st.integers(2, 3))
    coarsest = draw(st.tuples(*[st.integers(1, 3 if stages == 2 else 2)] * 3))
    patch = draw(st.tuples(*[st.integers(1, 2)] * 3))
    frames = draw(st.integers(1, 7))
    windows = st.lists(st.integers(1, 5), min_size=4, max_size=4)
    heads = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=stages, max_size=stages))
    return {
        "img_size": [*(n * 2 ** (stages - 1) * p for n, p in zip(coarsest, patch, strict=True)), frames],
        "patch_size": [*patch, 1],
        "embed_dim": 4,
        "depths": draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)),
        "num_heads": heads,
        "window_size": draw(windows),
        "first_window_size": draw(windows),
        "in_chans": draw(st.integers(1, 2)),
        "c_multiplier": draw(st.integers(1, 2)),
        "last_layer_full_MSA": draw(st.booleans()),
    }


@settings(max_examples=100, deadline=None)
@given(config=small_configs(), batch=st.integers(1, 2), short=st.integers(0, 3), seed=st.integers(0, 99))
def test_features_and_gradients_equal_those_of_rolled_masked_windows(config, batch, short, seed):
    torch.manual_seed(seed)
    backbone = Swift(swift_config(config)).double()
    frames = max(1, config["img_size"][3] - short)
    x = torch.randn(batch, config["in_chans"], *config["img_size"][:3], frames, dtype=torch.float64, requires_grad=True)
    weights = dict(backbone.named_parameters())
    features, expected = backbone(x), plain_swift(x, weights, config)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    probe = torch.randn_like(features)
    leaves = [x, *weights.values()]
    ours = torch.autograd.grad((features * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves)
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-9)


def test_a_stage_large_enough_for_chunks_equals_rolled_masked_windows_too():
    config = SMALL | {"img_size": [32, 30, 32, 5], "patch_size": [2, 3, 2, 1], "embed_dim": 4, "num_heads": [1, 2]}
    tokens = 16 * 10 * 16 * 5 * 2
    assert tokens > LARGE_STAGE
    assert tokens % MLP_CHUNK, "the last chunk is a short one"
    torch.manual_seed(0)
    backbone = Swift(swift_config(config))
    weights = dict(backbone.named_parameters())
    x = torch.randn(2, 1, 32, 30, 32, 5)
    features, expected = backbone(x), plain_swift(x, weights, config)
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    probe = torch.randn_like(features)
    ours = torch.autograd.grad((features * probe).sum(), list(weights.values()))
    theirs = torch.autograd.grad((expected * probe).sum(), list(weights.values()))
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), expected, rtol=0, atol=2e-5)


def test_a_permuted_view_gives_what_its_contiguous_copy_gives():
    backbone = Swift(swift_config(SMALL))
    bold = small_bold()
    frames_first = bold.permute(0, 5, 1, 2, 3, 4).contiguous().permute(0, 2, 3, 4, 5, 1)
    reversed_axes = bold.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    for view in (frames_first, reversed_axes):
        assert not view.is_contiguous()
        assert torch.equal(backbone(view), backbone(bold))


def test_a_sample_does_not_depend_on_its_batch():
    backbone = Swift(swift_config(SMALL)).eval()
    bold = small_bold(batch=3)
    together = backbone(bold)
    for number in range(3):
        torch.testing.assert_close(
            together[number : number + 1], backbone(bold[number : number + 1]), rtol=0, atol=1e-5
        )


def test_clips_of_changing_length_give_what_a_fresh_model_gives():
    backbone = Swift(swift_config(SMALL))
    bold = small_bold()
    first = backbone(bold)
    short = backbone(bold[..., :3])
    fresh = Swift(swift_config(SMALL))
    fresh.load_state_dict(backbone.state_dict())
    assert torch.equal(fresh(bold[..., :3]), short)
    assert torch.equal(backbone(bold), first)


def test_a_checkpoint_holds_the_published_names_and_nothing_else():
    case = read_case(GOLDEN, "swift_a3")
    config = {k: v for k, v in case["config"].items() if k not in ("precision", "clf_head_version", "attn_drop_rate")}
    published = {name for name in case["weights"] if not name.startswith("model.norm.")}
    assert set(build_model("swift", config).state_dict()) == published


@pytest.mark.parametrize("head", ["v1", "v2", "emb"])
def test_every_parameter_gets_a_gradient(head):
    model = build_model("swift", SMALL | {"head": head, "outputs": 3})
    out = model(small_bold())
    assert out.shape == (2, 3)
    out.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_bfloat16_autocast_stays_near_float32_and_scores_in_float32():
    torch.manual_seed(0)
    model = build_model("swift", SMALL)
    exact = model(small_bold())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(small_bold())
    rough.sum().backward()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_training_step_lowers_the_loss():
    torch.manual_seed(0)
    model = build_model("swift", SMALL)
    bold, target = small_bold(batch=4), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(bold), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_parameters_are_counted_as_published():
    config = read_case(GOLDEN, "pub_swift_36")["config"]
    options = {k: v for k, v in config.items() if k not in ("precision", "clf_head_version", "attn_drop_rate")}
    backbone = Swift(swift_config(options))
    assert sum(prod(parameter.shape) for parameter in backbone.parameters()) == 4_315_212 - 2 * 288
    assert backbone.num_features == 288


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": [8, 12, 10, 5]}, "10 voxels along z are no multiple of 4"),
        ({"img_size": [8, 12, 8]}, "img_size must be a list of 4 whole numbers"),
        ({"patch_size": [2, 3, 2, 5]}, "make its last number 1"),
        ({"patch_size": [2, 0, 2, 1]}, "patch_size must be a list of 4 whole numbers above 0"),
        ({"num_heads": [3, 4]}, "3 heads do not divide the 8 channels of stage 0"),
        ({"depths": [2, 2, 2]}, "must name the same stages"),
        ({"depths": [2], "num_heads": [2]}, "two or more"),
        ({"embed_dim": 8.0}, "embed_dim must be a whole number above 0, got 8.0"),
        ({"last_layer_full_MSA": 1}, "must be true or false"),
        ({"embed": 8}, "swift has no option embed; did you mean embed_dim?"),
        ({"outputs": 0}, "outputs must be a whole number above 0"),
        ({"head": "v3"}, "there is no head 'v3'"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        build_model("swift", SMALL | change)


def test_a_config_without_sizes_says_what_is_missing():
    with pytest.raises(UsageError, match="swift needs img_size, patch_size, depths, num_heads"):
        build_model("swift", {"embed_dim": 8})
    with pytest.raises(UsageError, match="there is no model 'swif'"):
        build_model("swif", SMALL)


@pytest.mark.parametrize("shape", [(2, 2, 8, 12, 8, 5), (2, 1, 8, 12, 8, 0), (2, 1, 8, 8, 8, 5), (1, 8, 12, 8, 5)])
def test_bold_of_another_shape_is_refused(shape):
    for longer_clips in ("refuse", "interpolate"):
        with pytest.raises(UsageError, match=r"expected \(batch, 1, 8, 12, 8, 1 to 5\)"):
            build_model("swift", SMALL | {"longer_clips": longer_clips})(torch.zeros(shape))


def long_bold(frames, batch=2):
    return torch.randn(batch, 1, *SMALL["img_size"][:3], frames, generator=torch.Generator().manual_seed(1))


def test_a_longer_clip_is_refused_unless_the_recipe_says_how():
    with pytest.raises(UsageError, match=r"a clip of 6 frames is longer than the time tables, which hold 5"):
        build_swift(SMALL)(long_bold(6))


@pytest.mark.parametrize("frames", [6, 9, 14])
def test_longer_clips_read_tables_stretched_from_their_first_to_their_last_frame(frames):
    trained = Swift(swift_config(SMALL | {"longer_clips": "interpolate"}))
    config = swift_config(SMALL | {"img_size": [*SMALL["img_size"][:3], frames]})
    weights = resize_tables(trained.state_dict(), config, how="interpolate", source="a.safetensors")
    longer = Swift(config)
    load_backbone(longer, weights, source="a.safetensors")
    torch.testing.assert_close(trained(long_bold(frames)), longer(long_bold(frames)), rtol=0, atol=1e-6)
    for name, table in weights.items():
        if name.endswith("time_embed"):
            rows = trained.get_parameter(name).flatten(0, -2).unsqueeze(0)
            oracle = F.interpolate(rows, size=frames, mode="linear", align_corners=True)
            torch.testing.assert_close(table.flatten(0, -2), oracle[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "frames"), [(5, 12), (5, 3), (1, 4), (4, 1), (3, 3)])
def test_a_stretched_table_is_linear_between_its_rows_and_hands_them_its_gradient(rows, frames):
    table = torch.randn(3, rows, dtype=torch.float64, requires_grad=True)
    stretched = stretch_table(table, frames)
    places = np.linspace(0, rows - 1, frames)
    oracle = np.stack([np.interp(places, np.arange(rows), row) for row in table.detach().numpy()])
    np.testing.assert_allclose(stretched.detach().numpy(), oracle, atol=1e-12)
    stretched.sum().backward()
    assert table.grad.sum().item() == pytest.approx(3 * frames), "every frame's gradient reaches some row"


def test_a_checkpointed_longer_clip_teaches_the_trained_tables():
    model = build_swift(SMALL | {"longer_clips": "interpolate", "checkpointing": True})
    model(long_bold(7)).sum().backward()
    gradients = [tables.time_embed.grad for tables in model.model.pos_embeds]
    assert all(bool((gradient != 0).any(1).all()) for gradient in gradients)


def test_tables_of_weights_are_cut_or_stretched_and_then_load_strictly():
    weights = dict(build_swift(SMALL).state_dict()) | {"model.norm.weight": torch.ones(16)}
    short, long = (swift_config(SMALL | {"img_size": [*SMALL["img_size"][:3], frames]}) for frames in (3, 8))
    cut = resize_tables(weights, short, how="slice", source="a.safetensors")
    load_backbone(Swift(short), cut, source="a.safetensors")
    name = "model.pos_embeds.1.time_embed"
    assert torch.equal(cut[name], weights[name][..., :3])
    assert weights[name].shape[-1] == 5, "what was given is unchanged"
    load_backbone(Swift(long), resize_tables(weights, long, how="interpolate", source=""), source="a.safetensors")
    with pytest.raises(WeightsError, match="2 names do not fit"):
        load_backbone(Swift(long), weights, source="a.safetensors")
    with pytest.raises(UsageError, match="time tables of 5 frames cannot be cut to 8"):
        resize_tables(weights, long, how="slice", source="a.safetensors")
    with pytest.raises(UsageError, match="by slice or interpolate, got 'nearest'"):
        resize_tables(weights, long, how="nearest", source="a.safetensors")


def test_weights_of_another_spatial_grid_are_refused():
    weights = build_swift(SMALL).state_dict()
    other = swift_config(SMALL | {"img_size": [8, 12, 16, 5]})
    with pytest.raises(
        WeightsError, match=r"a\.safetensors: trained on a grid of 4 x 4 x 4 tokens in stage 0, the model has"
    ):
        resize_tables(weights, other, how="slice", source="a.safetensors")
    with pytest.raises(WeightsError, match="no position tables"):
        resize_tables({"a": torch.zeros(1)}, other, how="slice", source="a.safetensors")


def losses_and_gradients(model, bold):
    model.zero_grad()
    loss = (model(bold) - 1).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("grid", [SMALL["img_size"], [32, 30, 32, 5]], ids=["small", "with chunks"])
def test_checkpointing_changes_neither_losses_nor_gradients(grid):
    options = SMALL | {"img_size": grid, "embed_dim": 4, "num_heads": [1, 2]}
    bold = torch.randn(2, 1, *grid)
    plain, lean = build_swift(options), build_swift(options | {"checkpointing": True})
    lean.load_state_dict(plain.state_dict())
    expected = losses_and_gradients(plain, bold)
    torch.testing.assert_close(losses_and_gradients(lean, bold), expected, rtol=1e-5, atol=1e-7)


def test_checkpointing_keeps_only_what_enters_a_block():
    kept = {}
    for checkpointing in (False, True):
        tensors = {}

        def pack(tensor, tensors=tensors):
            tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        model = build_swift(SMALL | {"checkpointing": checkpointing})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(small_bold()).sum()
        kept[checkpointing] = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    assert kept[True] < kept[False] / 3


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.full),
        pytest.param("inductor", True, marks=pytest.mark.full),
    ],
)
def test_the_compiled_model_has_no_break_and_gives_the_same_losses_and_gradients(backend, checkpointing):
    model = build_swift(SMALL | {"depths": [2, 1], "checkpointing": checkpointing})
    expected = losses_and_gradients(model, small_bold())
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(losses_and_gradients(compiled, small_bold()), expected, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_takes_other_clips_once_they_are_planned():
    model = build_swift(SMALL | {"depths": [1, 1], "longer_clips": "interpolate"})
    model.model.plan_clips(7)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(long_bold(7)), model(long_bold(7)), rtol=0, atol=1e-5)
        model.model.plan_clips(3)
        torch.testing.assert_close(compiled(long_bold(3)), model(long_bold(3)), rtol=0, atol=1e-5)


def test_a_clip_that_was_not_planned_is_not_compiled_silently():
    model = build_swift(SMALL)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="got 3; call plan_clips before you compile"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(small_bold()[..., :3])
