"""Every network trains: two steps in float32 and bfloat16, with and without activation checkpointing, and compiled.

A family is one row of FAMILIES. What its loss measures is not tested here, only that it is the same in all these ways.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.contrastive import nt_xent
from train.masked_objectives import joint_loss, masked_mse
from train.models.attention import batch_order
from train.models.brainlm import Brainlm
from train.models.brainlm import Layer as BrainlmLayer
from train.models.brainlm_config import brainlm_config, vitmae_config
from train.models.brainlm_heads import FineTuned
from train.models.brainlm_vitmae import BrainlmVitmae
from train.models.brainlm_vitmae import Layer as VitmaeLayer
from train.models.cnn_rnn import FrameBlock, build_cnn_rnn
from train.models.cnn_rnn_config import cnn_rnn_config
from train.models.mae4d import build_mae4d, build_mae4d_pretrain, rebuilding_losses
from train.models.mae4d_layers import Layer as Mae4dLayer
from train.models.series_masking import Masking
from train.models.series_nets import build_lstm, build_mlp
from train.models.swift import Block, build_swift
from train.models.tff import BertLayer, build_tff
from train.models.tff_config import tff_config
from train.models.windows import plan_pieces
from train.reconstruction import tff_losses

SWIFT = {
    "img_size": [8, 12, 8, 5],
    "patch_size": [2, 3, 2, 1],
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [2, 2, 2, 2],
    "first_window_size": [2, 2, 2, 2],
}
TFF = {"img_size": [11, 9, 10, 4], "intermediate_vec": 24, "bert_intermediate_size": 32, "num_attention_heads": 4}
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
}
TOKENS = WIDTHS | {
    "decoder_hidden_size": 16,
    "num_timepoints_per_voxel": 20,
    "timepoint_patching_size": 5,
    "conv_kernel_size": 7,
}
IMAGE = WIDTHS | {"decoder_hidden_size": 12, "image_size": 24, "patch_size": 4}
CNN_RNN = {"img_size": [8, 12, 8, 5], "channels": [8, 16], "hidden": 10, "frame_chunk": 2}
MAE = {
    "img_size": [8, 12, 8, 5],
    "patch_size": [4, 4, 4, 1],
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2}
SERIES_NET = {"parcels": 6, "frames": 20}
LABELS = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
SUBJECTS = torch.tensor([3, 4])


@dataclass(frozen=True, kw_only=True)
class Family:
    """A network: how it is built (with checkpointing or without), what it eats, and what it is to make smaller.

    `block` gives one of its repeated parts with inputs, where no other row has tried that part already.
    """

    build: Callable[[bool], nn.Module]
    inputs: tuple[Tensor, ...]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    block: Callable[[], tuple[nn.Module, tuple[Any, ...]]] | None = None
    rough: float = 0.05  # how far a bfloat16 loss may be from the float32 one, relative
    autocasts: bool = True  # autocast leaves recurrences on the CPU in float32, and heads are so everywhere


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def class_loss(model, inputs):
    return F.binary_cross_entropy_with_logits(model(*inputs), LABELS)


def pair_loss(model, inputs):
    return nt_xent(model(*inputs).view(2, 2, -1), SUBJECTS).mean()


def rebuilding_loss(model, inputs):
    return torch.stack(list(tff_losses(model(*inputs), *inputs).values())).sum()


def hidden_loss(model, inputs):
    generator = torch.Generator().manual_seed(0)
    result = model(*inputs, masking=Masking(ratio=0.75), generator=generator)
    return masked_mse(result.series, inputs[0], result.hidden)


def patch_loss(model, inputs):
    return rebuilding_losses(model(*inputs, generator=torch.Generator().manual_seed(0))).mean()


def task_loss(model, inputs):
    return F.binary_cross_entropy_with_logits(model(*inputs).outputs, LABELS)


def task_and_hidden_loss(model, inputs):
    generator = torch.Generator().manual_seed(0)
    outputs, result = model(*inputs, masking=Masking(ratio=0.2), generator=generator)
    task = F.binary_cross_entropy_with_logits(outputs, LABELS)
    return joint_loss(task, masked_mse(result.series, inputs[0], result.hidden))


def swift(**options):
    return lambda checkpointing: build_swift(SWIFT | options | {"checkpointing": checkpointing})


def tff(phase):
    return lambda checkpointing: build_tff(phase, TFF | {"frame_chunk": 2, "recompute": checkpointing})


def brainlm(checkpointing):
    return Brainlm(brainlm_config(TOKENS), checkpointing=checkpointing)


def vitmae(checkpointing):
    return BrainlmVitmae(vitmae_config(IMAGE), checkpointing=checkpointing)


def tuned(network, **options):
    return lambda checkpointing: FineTuned(network(checkpointing), outputs=1, **options)


def sized(build, options):
    return lambda checkpointing: build(options | {"checkpointing": checkpointing})


def swift_block():
    plan = plan_pieces((4, 4, 4, 5), (2, 2, 2, 2), (1, 1, 1, 1))
    order = batch_order(torch.from_numpy(plan.index), plan.groups, batch=2, tokens=320, has_padding=True)
    return Block(8, 2), (draw(640, 8), order)


def mlp_block():
    # Without dropout: what a compiled graph draws is its own.
    return build_mlp(SERIES_NET | {"dropout": 0.0}), COURSES


VOLUMES = (draw(4, 1, 8, 12, 8, 5),)
TWO_CHANNELS = (draw(4, 2, 11, 9, 10, 3),)
SERIES = (draw(4, 6, 20), draw(6, 3))
COURSES = SERIES[:1]
FAMILIES: Mapping[str, Family] = {
    "swift": Family(build=swift(), inputs=VOLUMES, loss=class_loss, block=swift_block),
    "swift v2": Family(build=swift(head="v2"), inputs=VOLUMES, loss=class_loss),
    "swift emb": Family(build=swift(head="emb", outputs=16), inputs=VOLUMES, loss=pair_loss, rough=0.1),
    "tff1": Family(build=tff("tff1"), inputs=TWO_CHANNELS, loss=rebuilding_loss),
    "tff2": Family(build=tff("tff2"), inputs=TWO_CHANNELS, loss=rebuilding_loss),
    "tff3": Family(
        build=tff("tff3"),
        inputs=TWO_CHANNELS,
        loss=class_loss,
        block=lambda: (BertLayer(tff_config(TFF | {"dropout_transformer": 0.0})), (draw(2, 5, 24),)),
    ),
    "tff-contrast": Family(build=tff("tff-contrast"), inputs=TWO_CHANNELS, loss=pair_loss, rough=0.1),
    "brainlm": Family(
        build=brainlm,
        inputs=SERIES,
        loss=hidden_loss,
        block=lambda: (BrainlmLayer(16, 2, 24, brainlm_config(TOKENS)), (draw(2, 9, 16),)),
    ),
    "brainlm-vitmae": Family(
        build=vitmae,
        inputs=SERIES,
        loss=hidden_loss,
        block=lambda: (VitmaeLayer(16, 2, 24, vitmae_config(IMAGE)), (draw(2, 9, 16),)),
    ),
    "brainlm tuned": Family(build=tuned(brainlm), inputs=SERIES, loss=task_loss),
    "brainlm tuned whole": Family(build=tuned(brainlm, learning="all"), inputs=SERIES, loss=task_and_hidden_loss),
    "brainlm-vitmae head": Family(build=tuned(vitmae, pooling="mean", learning="head"), inputs=SERIES, loss=task_loss),
    "cnn_rnn": Family(
        build=sized(build_cnn_rnn, CNN_RNN),
        inputs=VOLUMES,
        loss=class_loss,
        block=lambda: (FrameBlock(8, 16, cnn_rnn_config(CNN_RNN)), (draw(3, 8, 8, 12, 8),)),
    ),
    "cnn_rnn lstm": Family(build=sized(build_cnn_rnn, CNN_RNN | {"rnn": "lstm"}), inputs=VOLUMES, loss=class_loss),
    "mae4d": Family(
        build=sized(build_mae4d, MAE),
        inputs=VOLUMES,
        loss=class_loss,
        block=lambda: (Mae4dLayer(16, 2, 2), (draw(2, 9, 16),)),
    ),
    "mae4d-pretrain": Family(build=sized(build_mae4d_pretrain, MAE | DECODER), inputs=VOLUMES, loss=patch_loss),
    "mlp": Family(build=sized(build_mlp, SERIES_NET), inputs=COURSES, loss=class_loss, block=mlp_block),
    "lstm": Family(
        build=sized(build_lstm, SERIES_NET | {"hidden": 8}), inputs=COURSES, loss=class_loss, autocasts=False
    ),
}
BLOCKS = [name for name, family in FAMILIES.items() if family.block]


def two_steps(family, *, bf16, checkpointing):
    """The losses before the first step, between the two, and after them; dropout draws the same in every way."""
    torch.manual_seed(0)
    model = family.build(checkpointing)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    torch.manual_seed(1)
    losses = []
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = family.loss(model, family.inputs)
        losses.append(loss.item())
        if step == 2:
            break
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad is (parameter.grad is not None), name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_give_equal_losses_in_both_precisions_with_and_without_checkpointing(name):
    family = FAMILIES[name]
    exact = two_steps(family, bf16=False, checkpointing=False)
    assert torch.isfinite(torch.tensor(exact)).all()
    assert exact[2] != exact[0], "the steps changed something"
    assert two_steps(family, bf16=False, checkpointing=True) == pytest.approx(exact, rel=1e-5)
    rough = two_steps(family, bf16=True, checkpointing=False)
    assert rough == pytest.approx(exact, rel=family.rough)
    assert (rough != exact) is family.autocasts, "autocast reaches the network"
    assert two_steps(family, bf16=True, checkpointing=True) == pytest.approx(rough, rel=1e-3)


def loss_and_gradients(block, inputs):
    block.zero_grad()
    loss = block(*inputs).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in block.parameters()]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_compiled_block_has_no_break_and_gives_equal_losses_and_gradients(name, backend):
    torch.manual_seed(0)
    block, inputs = FAMILIES[name].block()
    expected = loss_and_gradients(block, inputs)
    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
