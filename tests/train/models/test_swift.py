"""SwiFT computes the published function, from any memory layout, on any grid that the published code accepts."""

import os
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.errors import UsageError
from tests.train.models.plain_swift import plain_swift
from tools.golden import read_case
from tools.parity_swift import check_published_swift, check_swift
from train.models import build_model
from train.models.swift import LARGE_STAGE, MLP_CHUNK, Swift
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


@pytest.mark.parametrize("shape", [(2, 2, 8, 12, 8, 5), (2, 1, 8, 12, 8, 6), (2, 1, 8, 8, 8, 5), (1, 8, 12, 8, 5)])
def test_bold_of_another_shape_is_refused(shape):
    with pytest.raises(UsageError, match=r"expected \(batch, 1, 8, 12, 8, 1 to 5\)"):
        build_model("swift", SMALL)(torch.zeros(shape))
