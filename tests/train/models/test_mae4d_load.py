"""An encoder goes from pre-training to a head by name, with a mask that somebody has chosen."""

import numpy as np
import pytest
import torch

from fmristream import StreamingDataset, StreamingLoader
from fmristream.errors import UsageError
from tests.train.models.test_mae4d import BRAIN, PRETRAIN, SIZE, clips, small
from train.models.load import WeightsError
from train.models.mae4d import build_mae4d, build_mae4d_pretrain, rebuilding_losses
from train.models.mae4d_load import load_encoder, resize_times
from train.models.mae4d_patches import brain_from_bold, brain_from_positions

OTHER = BRAIN.copy()
OTHER[0] = True


def test_a_pretrained_encoder_gives_the_same_features_under_a_head():
    pretrained, model = small(seed=1), small(build_mae4d, seed=2, pooling="attention")
    head = {name: tensor.clone() for name, tensor in model.state_dict().items() if "encoder." not in name}
    weights = {f"module.{name}": tensor for name, tensor in pretrained.state_dict().items()}
    loaded = load_encoder(model, weights, source="pretrained.safetensors")
    assert loaded.tensors == len(pretrained.encoder.state_dict())
    assert set(loaded.ignored) == {name for name in pretrained.state_dict() if name.startswith("decoder.")}
    assert torch.equal(model.features(clips()), pretrained.features(clips()))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in head.items())


def test_pre_training_goes_on_with_its_decoder_or_with_a_new_one():
    trained, model = small(seed=1), small(seed=2)
    assert load_encoder(model, trained.state_dict(), source="a").ignored == {}
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())
    fresh, headed = small(seed=3), small(build_mae4d, seed=4)
    decoder = {name: tensor.clone() for name, tensor in fresh.decoder.state_dict().items()}
    assert set(load_encoder(fresh, headed.state_dict(), source="a").ignored) == {
        "output_head.head.weight",
        "output_head.head.bias",
    }
    assert torch.equal(fresh.features(clips()), headed.features(clips()))
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in fresh.decoder.state_dict().items())


def test_an_encoder_goes_from_one_head_to_another():
    first, second = small(build_mae4d, seed=1, pooling="attention", outputs=3), small(build_mae4d, seed=2)
    load_encoder(second, first.state_dict(), source="a")
    assert torch.equal(second.features(clips()), first.features(clips()))


def test_weights_that_do_not_fit_are_refused_with_a_table_and_nothing_changes():
    model, other = small(build_mae4d), small(embed_dim=12, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"shape +encoder\.cls_token  model \[1, 1, 24\]  weights \[1, 1, 12\]"):
        load_encoder(model, other.state_dict(), source="a")
    weights = small(seed=1).state_dict()
    lacking = {name: tensor for name, tensor in weights.items() if name != "encoder.norm.bias"}
    with pytest.raises(WeightsError, match=r"missing +encoder\.norm\.bias"):
        load_encoder(model, lacking, source="a")
    with pytest.raises(WeightsError, match=r"unexpected strange"):
        load_encoder(model, weights | {"strange": torch.zeros(1)}, source="a")
    with pytest.raises(WeightsError, match=r"encoder\.patches\.brain  model \[9, 8, 7\]  weights \[9, 8, 6\]"):
        load_encoder(model, weights | {"encoder.patches.brain": torch.ones(9, 8, 6, dtype=torch.bool)}, source="a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_that_differ_must_be_decided_between():
    weights = small(seed=1).state_dict()
    model = small(build_mae4d)
    model.set_brain(OTHER)
    shared = int((OTHER & BRAIN).sum())
    with pytest.raises(
        WeightsError, match=f"brain has {BRAIN.sum()} voxels and the model's {OTHER.sum()}, {shared} of them the same"
    ):
        load_encoder(model, weights, source="a")
    load_encoder(model, weights, source="a", brain="model")
    assert torch.equal(model.encoder.patches.brain, torch.from_numpy(OTHER))
    assert model.features(clips()).shape[1] == 1 + 3 * model.encoder.patches.count
    load_encoder(model, weights, source="a", brain="weights")
    assert torch.equal(model.encoder.patches.brain, torch.from_numpy(BRAIN))
    assert torch.equal(model.features(clips()), small(seed=1).features(clips()))
    with pytest.raises(UsageError, match="brain must be same, weights or model, got 'mine'"):
        load_encoder(model, weights, source="a", brain="mine")


def test_a_model_without_a_mask_takes_that_of_the_weights():
    torch.manual_seed(0)
    model = build_mae4d_pretrain(PRETRAIN)
    load_encoder(model, small(seed=1).state_dict(), source="a")
    assert torch.equal(model.encoder.patches.brain, torch.from_numpy(BRAIN))
    assert model.noise_size(6) == model.encoder.patches.count < 18


def test_a_whole_state_with_its_mask_loads_and_rebuilds_alike():
    trained, model = small(seed=1), build_mae4d_pretrain(PRETRAIN)
    model.load_state_dict(trained.state_dict())
    found, expected = (net(clips(), generator=torch.Generator().manual_seed(0)) for net in (model, trained))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_tables_of_times_are_cut_or_stretched():
    weights = small(seed=1).state_dict()
    for name in ("encoder.positions.time", "decoder.positions.time"):
        table = weights[name]
        assert torch.equal(resize_times(weights, times=2, how="slice")[name], table[:2])
        longer = resize_times(weights, times=5, how="interpolate")[name]
        halves = [table[0], (table[0] + table[1]) / 2, table[1], (table[1] + table[2]) / 2, table[2]]
        torch.testing.assert_close(longer, torch.stack(halves))
    model = build_mae4d_pretrain(PRETRAIN | {"img_size": [*SIZE, 10]})
    model.load_state_dict(resize_times(weights, times=5, how="interpolate"))
    assert model(clips(frames=10)).predicted.shape[0] == 2


def test_tables_that_cannot_be_resized_are_refused():
    weights = small().state_dict()
    with pytest.raises(UsageError, match="3 trained times cannot be cut to 4; choose how='interpolate'"):
        resize_times(weights, times=4, how="slice")
    with pytest.raises(UsageError, match="times must be 1 or more and how be slice or interpolate"):
        resize_times(weights, times=0, how="slice")
    with pytest.raises(WeightsError, match="no learned table of times"):
        resize_times(small(positions="sinusoidal").state_dict(), times=2, how="slice")


def test_the_brain_of_a_stream_is_where_its_clips_have_signal(cohort):
    clips_of_cohort = StreamingDataset(cohort, window=4, split="train", seed=0, grid=(14, 13, 12))
    loader = StreamingLoader(clips_of_cohort, batch_size=4)
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    brain = brain_from_positions(clips_of_cohort.positions, clips_of_cohort.grid)
    assert np.array_equal(brain, brain_from_positions(batch.positions, batch.grid))
    assert np.array_equal(brain, brain_from_bold(batch.bold))
    model = build_mae4d_pretrain(PRETRAIN | {"img_size": [14, 13, 12, 4]})
    model.set_brain(brain)
    rebuilt = model(batch.bold, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(rebuilding_losses(rebuilt)).all()
    assert torch.equal(model.encoder.patches.join(model.encoder.cut(batch.bold)), batch.bold)
