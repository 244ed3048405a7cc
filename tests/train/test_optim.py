"""The learning rate is a function of the step; only matrices decay; state goes into a checkpoint and back."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fmristream.errors import ResumeError, UsageError
from train.config import OptimConfig
from train.models import build_model
from train.models.depth import layer_depths
from train.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, config=config, total_steps=14) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[14] == pytest.approx(0.1)
    assert learning_rate(99, config=config, total_steps=14) == pytest.approx(0.1)


@given(st.integers(0, 50), st.integers(1, 100), st.floats(0, 1))
def test_the_rate_stays_between_its_ends_and_never_rises_after_the_warm_up(warmup, total, ratio):
    config = OptimConfig(lr=2.0, warmup_steps=warmup, final_lr_ratio=ratio)
    rates = [learning_rate(step, config=config, total_steps=total) for step in range(total)]
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in rates)
    falling = rates[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))


def test_steps_fall_by_a_factor_to_the_floor_and_a_constant_rate_stays():
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="step", decay=0.5, decay_every=3, final_lr_ratio=0.2)
    rates = [learning_rate(step, config=config, total_steps=12) for step in range(12)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2]
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, config=config, total_steps=5) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def small_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def take_steps(model, optimizer, steps):
    inputs = torch.linspace(-1, 1, 20).reshape(5, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def test_vectors_are_not_decayed_and_matrices_are():
    model = small_model()
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(new, old * 0.95 if old.ndim > 1 else old)


def test_a_frozen_parameter_is_left_alone():
    model = small_model()
    model[0].weight.requires_grad_(False)
    held = {
        id(parameter) for group in make_optimizer(model, OptimConfig()).param_groups for parameter in group["params"]
    }
    assert id(model[0].weight) not in held
    assert len(held) == 5


def test_every_group_gets_the_rate():
    optimizer = make_optimizer(small_model(), OptimConfig())
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_clipping_returns_the_norm_before_and_zero_clips_nothing(max_norm):
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = math.sqrt(sum(parameter.numel() for parameter in model.parameters()))
    assert clip_gradients(model, max_norm=max_norm).item() == pytest.approx(norm)
    after = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    assert after == pytest.approx(max_norm or norm, rel=1e-5)


def test_restored_state_goes_on_bit_for_bit():
    model, config = small_model(), OptimConfig(lr=0.01)
    optimizer = make_optimizer(model, config)
    take_steps(model, optimizer, 3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    take_steps(model, optimizer, 4)

    other = small_model()
    again = make_optimizer(other, config)
    take_steps(other, again, 1)
    other.load_state_dict(weights)
    restore_optimizer(other, again, tensors)
    take_steps(other, again, 4)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_parameter_without_a_gradient_has_no_state_and_is_restored_so():
    model = small_model()
    optimizer = make_optimizer(model, OptimConfig())
    model(torch.ones(1, 4)).sum().backward()
    model[2].bias.grad = None
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    assert "exp_avg/2.bias" not in tensors
    assert tensors["step/0.weight"].shape == ()
    restore_optimizer(model, optimizer, tensors)
    assert set(optimizer_tensors(model, optimizer)) == set(tensors)


@pytest.mark.parametrize("name", ["exp_avg/9.weight", "exp_avg/0.bias"])
def test_state_of_another_model_is_refused(name):
    model = small_model()
    with pytest.raises(ResumeError, match=r"fits no parameter of this model"):
        restore_optimizer(model, make_optimizer(model, OptimConfig()), {name: torch.zeros(7)})


SERIES = {"parcels": 5, "frames": 8, "timepoint_patching_size": 4, "hidden_size": 8, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "intermediate_size": 8, "decoder_hidden_size": 8, "decoder_num_attention_heads": 2}
BRAINLM = SERIES | HEADS | {"decoder_num_hidden_layers": 2, "decoder_intermediate_size": 8}
PICTURE = {key: value for key, value in BRAINLM.items() if key != "timepoint_patching_size"}
SWIFT = {
    "img_size": [12, 12, 12, 8],
    "patch_size": [3, 3, 3, 1],
    "embed_dim": 6,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": [2, 2, 2, 4],
    "first_window_size": [2, 2, 2, 4],
}
VOLUMES = {"img_size": [8, 8, 8, 4], "in_chans": 1, "patch_size": [4, 4, 4, 2], "embed_dim": 12, "num_heads": 2}
TFF = {"img_size": [16, 16, 16, 2], "in_chans": 2, "intermediate_vec": 16, "num_attention_heads": 2}
# Model -> (options, layers, depth of some of its parameters).
DEPTHS = {
    "swift": (
        SWIFT,
        3,
        {
            "model.patch_embed.fc.weight": 0,
            "model.pos_embeds.0.time_embed": 1,
            "model.layers.0.blocks.0.norm1.weight": 1,
            "model.layers.0.blocks.1.attn.qkv.weight": 2,
            "model.layers.0.downsample.reduction.weight": 2,
            "model.pos_embeds.1.pos_embed": 3,
            "model.layers.1.blocks.0.mlp.linear1.bias": 3,
            "output_head.head.weight": 4,
        },
    ),
    "brainlm": (
        BRAINLM | {"outputs": 1},
        3,
        {
            "model.vit.embeddings.cls_token": 0,
            "model.vit.encoder.layer.0.output.dense.weight": 1,
            "model.vit.encoder.layer.2.output.dense.weight": 3,
            "model.vit.layernorm.weight": 4,
            "output_head.linear1.weight": 4,
        },
    ),
    "brainlm-vitmae": (
        PICTURE | {"image_size": 16, "patch_size": 8},
        3,
        {
            "vit.embeddings.cls_token": 0,
            "vit.encoder.layer.1.output.dense.weight": 2,
            "decoder.decoder_layers.0.output.dense.weight": 4,
        },
    ),
    "tff3": (
        TFF | {"transformer_hidden_layers": 2, "bert_intermediate_size": 8},
        2,
        {
            "encoder.down_block1.conv0.weight": 0,
            "transformer.bert.embeddings.position_embeddings.weight": 0,
            "transformer.bert.encoder.layer.0.intermediate.dense.weight": 1,
            "transformer.bert.encoder.layer.1.output.dense.weight": 2,
            "transformer.bert.pooler.dense.weight": 3,
            "regression_head.0.bias": 3,
        },
    ),
    "mae4d": (
        VOLUMES | {"depth": 2},
        2,
        {"encoder.embed.weight": 0, "encoder.layers.1.norm1.weight": 2, "encoder.norm.weight": 3},
    ),
    "mae4d-pretrain": (
        VOLUMES | {"depth": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2},
        2,
        {"encoder.cls_token": 0, "encoder.layers.0.norm1.weight": 1, "decoder.pred.weight": 3},
    ),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_rates_fall_from_layer_to_layer_below_the_head(name):
    options, layers, some = DEPTHS[name]
    model = build_model(name, options)
    depths, top = layer_depths(model)
    assert top == layers + 1
    assert {key: depths[key] for key in some} == some
    assert set(depths.values()) == set(range(layers + 2))
    optimizer = make_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.5, layer_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    place = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert place[id(parameter)]["lr"] == 0.1 * 0.5 ** (top - depths[key])
            assert place[id(parameter)]["weight_decay"] == (0.5 if parameter.ndim > 1 else 0.0)


def test_a_network_that_does_not_tell_its_layers_is_refused_only_where_they_are_to_differ():
    with pytest.raises(UsageError, match="Sequential does not tell its layers"):
        make_optimizer(small_model(), OptimConfig(layer_decay=0.75))
    with pytest.raises(UsageError, match="phase 1 has no transformer"):
        make_optimizer(build_model("tff1", TFF), OptimConfig(layer_decay=0.75))
    assert len(make_optimizer(small_model(), OptimConfig()).param_groups) == 2
