"""A checkpoint of TFF is loaded whole or refused, and one phase hands its parts to the next by name."""

import pytest
import torch

from fmristream.errors import UsageError
from train.models.load import WeightsError
from train.models.tff import build_tff
from train.models.tff_load import hand_over, load_tff, resize_positions

SIZES = {
    "img_size": [9, 9, 9, 4],
    "intermediate_vec": 24,
    "bert_intermediate_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}
COUNTERS = {
    "transformer.bert.embeddings.position_ids": torch.arange(8).unsqueeze(0),
    "transformer.bert.embeddings.word_embeddings.weight": torch.ones(1, 24),
}
POOLER = {
    "transformer.bert.pooler.dense.weight": torch.ones(24, 24),
    "transformer.bert.pooler.dense.bias": torch.ones(24),
}
POSITIONS = "transformer.bert.embeddings.position_embeddings.weight"


def network(phase, seed=0, **options):
    torch.manual_seed(seed)
    return build_tff(phase, SIZES | options)


def published(phase, seed=1):
    """What the published code would store: our names and those that it never uses."""
    unused = {"tff1": {}, "tff2": COUNTERS | POOLER, "tff3": COUNTERS}[phase]
    return {name: tensor.clone() for name, tensor in network(phase, seed).state_dict().items()} | unused


@pytest.mark.parametrize(("phase", "left_out"), [("tff1", 0), ("tff2", 4), ("tff3", 2)])
def test_a_published_checkpoint_of_the_same_phase_loads_whole(phase, left_out):
    model, weights = network(phase), published(phase)
    loaded = load_tff(model, weights, source="a.pth")
    assert loaded.tensors == len(model.state_dict()) == len(weights) - left_out
    assert len(loaded.ignored) == left_out
    assert all(loaded.ignored.values())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_phase_is_refused_with_a_table():
    model = network("tff3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_tff(model, published("tff2"), source="phase2.pth")
    sentence, *rows = str(caught.value).splitlines()
    assert sentence.startswith("phase2.pth: ")
    assert "names do not fit the model" in sentence
    assert rows[0] == "missing    regression_head.0.weight  model [1, 24]  weights -"
    assert rows[2].startswith("unexpected from_bert.out_of_bert.weight  model -")
    assert rows[-1].startswith("... and ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pooler_is_left_out_of_phase_2_alone():
    weights = published("tff3")
    del weights["transformer.bert.pooler.dense.bias"]
    with pytest.raises(WeightsError, match=r"missing    transformer\.bert\.pooler\.dense\.bias"):
        load_tff(network("tff3"), weights, source="a.pth")


def test_weights_of_another_width_are_refused_with_both_shapes():
    with pytest.raises(
        WeightsError, match=r"shape      into_bert\.into_bert\.weight  model \[32, 16\]  weights \[24, 16\]"
    ):
        load_tff(network("tff1", intermediate_vec=32), published("tff1"), source="a.pth")


def same_parts(model, weights, beginning):
    return [torch.equal(t, weights[name]) for name, t in model.state_dict().items() if name.startswith(beginning)]


def test_phase_1_hands_its_network_to_phase_2():
    model, weights = network("tff2"), published("tff1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = hand_over(model, weights, source="phase1.pth")
    assert done.copied == ("encoder", "into_bert", "from_bert", "decoder")
    assert done.fresh == ("transformer.cls_embedding", "transformer")
    assert done.left_out == {}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(same_parts(model, before, "transformer."))


@pytest.mark.parametrize("keep_cls", [False, True])
def test_phase_2_hands_encoder_and_transformer_to_phase_3(keep_cls):
    model, weights = network("tff3"), published("tff2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = hand_over(model, weights, source="phase2.pth", keep_cls=keep_cls)
    assert ("transformer.cls_embedding" in done.copied) is keep_cls
    assert ("transformer.cls_embedding" in done.fresh) is not keep_cls
    assert "regression_head" in done.fresh
    assert all(same_parts(model, weights, ("encoder.", "into_bert.", "transformer.bert.")))
    assert all(same_parts(model, weights if keep_cls else before, "transformer.cls_embedding."))
    assert all(same_parts(model, before, "regression_head."))
    assert done.left_out["decoder.decode_block.output_block.bias"] == "of a part that this phase does not have"
    assert ("begins anew" in done.left_out.get("transformer.cls_embedding.0.bias", "")) is not keep_cls
    assert set(COUNTERS) <= set(done.left_out)


def test_our_phase_2_has_no_pooler_to_hand_over():
    done = hand_over(network("tff3"), network("tff2", 1).state_dict(), source="ours")
    assert "transformer.bert.pooler" in done.fresh


def test_contrastive_pretraining_hands_over_all_but_its_projection():
    model, weights = network("tff3"), dict(network("tff-contrast", 1).state_dict())
    done = hand_over(model, weights, source="contrast", keep_cls=True)
    assert done.fresh == ("regression_head",)
    assert {name.split(".")[0] for name in done.left_out} == {"projection"}
    assert all(same_parts(model, weights, ("encoder.", "into_bert.", "transformer.")))


def test_the_prefix_of_ddp_is_stripped():
    weights = {f"module.{name}": tensor for name, tensor in published("tff1").items()}
    model = network("tff2")
    hand_over(model, weights, source="a.pth")
    assert torch.equal(model.encoder.down_block1.conv0.weight, weights["module.encoder.down_block1.conv0.weight"])


def test_a_shared_part_that_does_not_fit_and_names_of_no_part_are_refused_and_nothing_is_copied():
    weights = published("tff2")
    del weights["encoder.down_block1.conv0.bias"]
    weights["transformer.bert.encoder.layer.7.output.dense.bias"] = torch.zeros(24)
    weights["into_bert.into_bert.bias"] = torch.zeros(23)
    weights["model.head.bias"] = torch.zeros(1)
    model = network("tff3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        hand_over(model, weights, source="a.pth")
    assert [row.split()[:2] for row in str(caught.value).splitlines()[1:]] == [
        ["missing", "encoder.down_block1.conv0.bias"],
        ["shape", "into_bert.into_bert.bias"],
        ["unexpected", "transformer.bert.encoder.layer.7.output.dense.bias"],
        ["unexpected", "model.head.bias"],
    ]
    assert all(same_parts(model, before, ""))


def test_weights_of_something_else_are_refused():
    with pytest.raises(WeightsError, match="no weights of encoder and into_bert, which every phase of TFF has"):
        hand_over(network("tff2"), {"model.patch_embed.fc.weight": torch.zeros(2, 2)}, source="swift")


def test_positions_are_cut_or_stretched_as_asked():
    weights = published("tff3")
    table = weights[POSITIONS]
    cut = resize_positions(weights, places=5, how="slice")
    assert torch.equal(cut[POSITIONS], table[:5])
    longer = resize_positions(weights, places=14, how="interpolate")
    model = network("tff3", max_position_embeddings=14, img_size=[9, 9, 9, 13])
    load_tff(model, longer, source="stretched")
    stretched = longer[POSITIONS]
    assert stretched.shape == (14, 24)
    # 7 frames to 13: the window's own row and the ends stay, every second row is one of old, and others lie between.
    assert torch.equal(stretched[0], table[0])
    torch.testing.assert_close(stretched[1::2], table[1:])
    torch.testing.assert_close(stretched[2:-1:2], (table[1:-1] + table[2:]) / 2)
    assert weights[POSITIONS] is table


def test_positions_that_were_never_trained_are_not_made_up():
    with pytest.raises(UsageError, match="8 trained positions cannot be cut to 9; choose how='interpolate'"):
        resize_positions(published("tff3"), places=9, how="slice")
    with pytest.raises(UsageError, match="places must be 2 or more"):
        resize_positions(published("tff3"), places=1, how="interpolate")
    with pytest.raises(WeightsError, match="give the state of a phase with a transformer"):
        resize_positions(published("tff1"), places=9, how="slice")
