"""TFF is the published network in its names and sizes, trains in every phase and precision, and says what it cannot take."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from tools.golden import read_case
from tools.parity_tff import check_published_tff
from train.contrastive import nt_xent
from train.log import read_history
from train.main import main
from train.models import build_model
from train.models.tff import PHASES, BertLayer, GreenUnit, build_tff
from train.models.tff_config import tff_config
from train.reconstruction import tff_losses

GOLDEN = Path(__file__).parents[2] / "golden"
# 11 x 9 x 10 becomes 2 x 2 x 2 by two channels: 16 numbers, so a width of 24 needs the linear map.
SMALL = {
    "img_size": [11, 9, 10, 4],
    "intermediate_vec": 24,
    "bert_intermediate_size": 32,
    "num_attention_heads": 4,
}
PUBLISHED = {"img_size": [75, 93, 81, 20]}


def small_bold(batch=2, frames=4):
    return torch.randn(batch, 2, 11, 9, 10, frames, generator=torch.Generator().manual_seed(0))


def network(phase, seed=0, **options):
    torch.manual_seed(seed)
    return build_tff(phase, SMALL | options)


def count(phase, **options):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_tff(phase, PUBLISHED | options).parameters())


@pytest.mark.parametrize(
    "phases", [("phase1",), pytest.param(("phase1", "phase2", "phase3"), marks=pytest.mark.full)], ids=len
)
def test_the_published_size_gives_the_published_numbers(phases):
    rows = check_published_tff(read_case(GOLDEN, "pub_tff_a"), phases)
    assert [row.name for row in rows if not row.is_within] == []
    assert {row.name for row in rows} >= {f"{phases[0]}.reconstructed.sample", phases[-1]}


def test_parameters_are_counted_as_published_but_for_those_that_are_never_used():
    word_embeddings, pooler = 2640, 2640 * 2640 + 2640
    assert count("tff1") == 7_271_359
    assert count("tff2") == 109_559_023 - word_embeddings - pooler
    assert count("tff3") == 102_568_207 - word_embeddings


@pytest.mark.parametrize(("width", "layers", "names"), [(16, 2, (124, 166, 128)), (24, 3, (126, 184, 146))])
def test_every_phase_has_as_many_names_as_published(width, layers, names):
    # Beside word embeddings and position ids in both later phases, and the pooler in phase 2.
    unused = (0, 4, 2)
    sizes = {"intermediate_vec": width, "transformer_hidden_layers": layers}
    ours = [len(network(phase, **sizes).state_dict()) for phase in ("tff1", "tff2", "tff3")]
    assert [own + left for own, left in zip(ours, unused, strict=True)] == list(names)


@pytest.mark.parametrize("grid", [(9, 9, 9), (17, 8, 3), (13, 11, 25)])
@pytest.mark.parametrize("width", [16, 20])
def test_frames_of_any_size_are_rebuilt_at_their_size(grid, width):
    model = network("tff2", img_size=[*grid, 3], intermediate_vec=width)
    assert model(torch.randn(2, 2, *grid, 3)).shape == (2, 1, *grid, 3)
    assert model(torch.randn(1, 2, *grid, 1)).shape == (1, 1, *grid, 1)


@pytest.mark.parametrize("phase", list(PHASES))
def test_every_parameter_gets_a_gradient(phase):
    model = network(phase)
    model(small_bold()).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_bert_layer_is_the_post_norm_layer_of_torch():
    config = tff_config(SMALL)
    layer = BertLayer(config).eval()
    oracle = nn.TransformerEncoderLayer(24, 4, 32, activation="gelu", layer_norm_eps=1e-12, batch_first=True).eval()
    attention = layer.attention["self"]
    parts = [attention.query, attention.key, attention.value]
    with torch.no_grad():
        oracle.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        oracle.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    oracle.self_attn.out_proj.load_state_dict(layer.attention["output"].dense.state_dict())
    oracle.norm1.load_state_dict(layer.attention["output"].LayerNorm.state_dict())
    oracle.linear1.load_state_dict(layer.intermediate["dense"].state_dict())
    oracle.linear2.load_state_dict(layer.output.dense.state_dict())
    oracle.norm2.load_state_dict(layer.output.LayerNorm.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x), oracle(x), rtol=0, atol=1e-5)


def test_frames_do_not_see_each_other_before_the_transformer():
    bold, changed = small_bold(), small_bold()
    changed[:, :, :, :, :, 2] += 1
    for phase, others_change in (("tff1", False), ("tff2", True)):
        model = network(phase).eval()
        difference = (model(bold) - model(changed)).abs().amax((0, 1, 2, 3, 4))
        assert difference[2] > 0
        assert bool((difference[[0, 1, 3]] > 0).all()) is others_change
        assert others_change or not (difference[[0, 1, 3]] > 0).any()


@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
def test_the_published_ends_of_phase_3_follow_the_same_linear_map(activation):
    plain, ended = network("tff3").eval(), network("tff3", activation=activation).eval()
    expected = getattr(F, activation)(plain(small_bold()))
    torch.testing.assert_close(ended(small_bold()), expected)
    assert set(plain.state_dict()) == set(ended.state_dict())


def loss_of(phase, model, bold):
    out = model(bold)
    if phase in ("tff1", "tff2"):
        return sum(tff_losses(out, bold).values())
    if phase == "tff3":
        return F.binary_cross_entropy_with_logits(out, torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
    return nt_xent(out.view(2, 2, -1), torch.tensor([3, 4])).mean()


def two_steps(phase, *, bf16, **options):
    """The losses of two steps and of a third window, with dropout on."""
    model, bold = network(phase, **options), small_bold(batch=4, frames=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    torch.manual_seed(1)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(phase, model, bold)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("phase", list(PHASES))
def test_two_steps_give_the_same_losses_with_and_without_recomputation_and_near_ones_in_bfloat16(phase):
    exact = two_steps(phase, bf16=False, frame_chunk=3)
    assert two_steps(phase, bf16=False, frame_chunk=3, recompute=True) == pytest.approx(exact, rel=1e-6)
    rough = two_steps(phase, bf16=True, frame_chunk=3)
    assert two_steps(phase, bf16=True, frame_chunk=3, recompute=True) == pytest.approx(rough, rel=1e-6)
    assert rough == pytest.approx(exact, rel=0.05, abs=0.02)
    assert exact[2] != exact[0]


def test_the_number_of_frames_at_once_does_not_matter():
    whole = network("tff2").eval()
    expected = whole(small_bold())
    for frame_chunk in (1, 3, 100):
        torch.testing.assert_close(network("tff2", frame_chunk=frame_chunk).eval()(small_bold()), expected)


def test_recomputation_keeps_less(monkeypatch):
    def kept(**options):
        model, sizes = network("tff2", **options), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(small_bold())
        return sum(sizes)

    assert kept(frame_chunk=1, recompute=True) < kept(frame_chunk=1) / 3


@pytest.mark.parametrize("block", ["green", "bert"])
def test_a_block_compiles_whole(block):
    config = tff_config(SMALL | {"dropout_green": 0.0, "dropout_transformer": 0.0})
    module, x = (
        (GreenUnit(8, 0.0), torch.randn(2, 8, 5, 4, 3))
        if block == "green"
        else (BertLayer(config), torch.randn(2, 5, 24))
    )
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    gradients = []
    for running in (module, compiled):
        module.zero_grad()
        running(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_a_recipe_builds_phase_3_by_name():
    model = build_model("tff3", SMALL | {"outputs": 2})
    out = model(small_bold())
    assert out.shape == (2, 2)
    assert out.dtype == torch.float32


def test_the_trainer_runs_phase_3(cohort, tmp_path):
    recipe = tmp_path / "tff.toml"
    recipe.write_text(f"""
        [data]
        url = "{cohort}"
        window = 4
        stride = 32
        [model]
        name = "tff3"
        in_chans = 1
        intermediate_vec = 16
        bert_intermediate_size = 32
        num_attention_heads = 4
        frame_chunk = 8
        recompute = true
        [train]
        steps = 2
        batch_size = 4
        precision = "bf16"
        [eval]
        bootstrap_draws = 20
    """)
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert [entry["step"] for entry in read_history(tmp_path / "run" / "log.jsonl").steps] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": [11, 9, 10]}, "img_size must be a list of 4 whole numbers"),
        ({"img_size": [8, 8, 8, 4]}, "one voxel after three halvings"),
        ({"img_size": [11, 9, 10, 30]}, "clips of 30 frames and the vector before them need more than the 30 places"),
        ({"intermediate_vec": 23}, "4 heads do not divide intermediate_vec 23"),
        ({"model_depth": 6}, "model_depth must be a multiple of 4"),
        ({"in_chans": 0}, "in_chans must be a whole number above 0, got 0"),
        ({"dropout_green": 1.0}, r"dropout_green must lie in \[0, 1\)"),
        ({"frame_chunk": -1}, "frame_chunk must be a number of frames"),
        ({"recompute": 1}, "recompute must be true or false"),
        ({"recompute": True}, "give frame_chunk too"),
        ({"width": 24}, "tff has no option width; known: img_size"),
        ({"intermediate_vek": 24}, r"did you mean intermediate_vec\?"),
        ({"outputs": 0}, "outputs must be a whole number above 0"),
        ({"activation": "softmax"}, "activation must be one of none, sigmoid, leaky_relu, got 'softmax'"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(change, message):
    with pytest.raises(UsageError, match=message):
        build_tff("tff3", SMALL | change)


def test_a_config_without_sizes_and_a_phase_that_is_not_are_refused():
    with pytest.raises(UsageError, match="tff needs img_size"):
        build_tff("tff1", {})
    with pytest.raises(UsageError, match="no phase 'tff4' of tff; known: tff1, tff2, tff3, tff-contrast"):
        build_tff("tff4", SMALL)
    with pytest.raises(UsageError, match="tff has no option outputs"):
        build_tff("tff1", SMALL | {"outputs": 1})


@pytest.mark.parametrize("shape", [(2, 1, 11, 9, 10, 4), (2, 2, 9, 11, 10, 4), (2, 2, 11, 9, 10, 5), (2, 11, 9, 10, 4)])
def test_bold_of_another_shape_is_refused(shape):
    with pytest.raises(UsageError, match=r"expected \(batch, 2, 11, 9, 10, 1 to 4\)"):
        network("tff1")(torch.zeros(shape))
