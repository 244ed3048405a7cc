"""Batches of every kind on a device: dequantised, turned, placed; what travels, what stays, what is handed out when."""

from dataclasses import replace
from itertools import islice

import nibabel
import numpy as np
import pytest
import torch

import fmristream
from fmristream.errors import CorruptDataError, SpaceError, UsageError
from fmristream.stream.batch import Batch
from fmristream.stream.device import DeviceLoader, place, scatter_by_torch, scatter_of
from tests.stream.nifti_runs import converted
from tests.stream.test_normalization import brain_like

GRID = (5, 4, 6)


def batch_of(packed: np.ndarray, positions: np.ndarray, fill: np.ndarray, **more) -> Batch:
    count = len(packed)
    return Batch(
        packed=torch.from_numpy(packed),
        positions=torch.from_numpy(positions),
        grid=GRID,
        fill=torch.from_numpy(fill),
        **{
            "valid": torch.ones(count, dtype=torch.bool),
            "window": torch.arange(count),
            "start": torch.zeros(count, dtype=torch.int64),
            "subject": [f"s{row}" for row in range(count)],
            "run": [f"r{row}" for row in range(count)],
            "targets": {"age": torch.arange(count, dtype=torch.float32)},
            "global_size": count,
            "position": 0,
        }
        | more,
    )


def some_positions(rng: np.random.Generator, voxels: int) -> np.ndarray:
    """Places in GRID in ascending order, a tenth of the voxels cut off."""
    positions = np.sort(rng.choice(int(np.prod(GRID)), voxels, replace=False))
    positions[rng.random(voxels) < 0.1] = -1
    return positions


def by_hand(values: np.ndarray, positions: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """(b, c, t, v) in a loop, voxel by voxel: (b, c, x, y, z, t)."""
    placed = np.broadcast_to(fill[:, :, None, None], (*values.shape[:3], int(np.prod(GRID)))).astype(values.dtype)
    for sample in range(len(values)):
        own = positions if positions.ndim == 1 else positions[sample]
        for voxel, where in enumerate(own):
            if where >= 0:
                placed[sample, :, :, where] = values[sample, :, :, voxel]
    return np.moveaxis(placed.reshape(*values.shape[:3], *GRID), 2, -1)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_floats_are_placed_as_they_are(dtype):
    rng = np.random.default_rng(1)
    packed = rng.standard_normal((3, 2, 4, 50)).astype(dtype)
    positions, fill = some_positions(rng, 50), rng.standard_normal((3, 2)).astype("f4")
    moved = batch_of(packed, positions, fill).to("cpu")
    assert moved.bold.dtype == torch.from_numpy(packed).dtype
    np.testing.assert_array_equal(moved.bold.numpy(), by_hand(packed, positions, fill))
    whole = batch_of(packed, positions, fill).to("cpu", dtype=torch.float32)
    np.testing.assert_array_equal(whole.bold.numpy(), by_hand(packed.astype("f4"), positions, fill))


def test_integers_are_scaled_voxel_by_voxel_with_the_numbers_of_their_run():
    rng = np.random.default_rng(2)
    packed = rng.integers(-(2**15), 2**15, (3, 1, 4, 50)).astype("i2")
    scale, offset = (rng.standard_normal((2, 50)).astype("f4") for _ in range(2))
    row = np.array([1, 0, 1])
    positions, fill = some_positions(rng, 50), np.zeros((3, 1), "f4")
    more = {"scale": scale, "offset": offset, "scale_row": row}
    moved = batch_of(packed, positions, fill, **{k: torch.from_numpy(v) for k, v in more.items()}).to("cpu")
    values = packed * scale[row][:, None, None] + offset[row][:, None, None]
    assert values.dtype == np.float32
    assert moved.bold.dtype == torch.float32
    np.testing.assert_array_equal(moved.values.numpy(), values)
    np.testing.assert_array_equal(moved.bold.numpy(), by_hand(values, positions, fill))


def test_integers_of_a_stored_run_become_its_z_scores(tmp_path):
    clips = fmristream.StreamingDataset(converted(tmp_path, {"1": brain_like("i2")}), window=4)
    run, [window] = clips.runs[0], clips.locate(1)[1:]
    reader = clips.dataset.reader(run)
    stored = reader.read_stored(window, window + 4).astype("i4") - reader.reference
    delta, sd = (moment.astype("f4") for moment in reader.moments)
    scale = np.where(sd > 0, 1 / np.where(sd > 0, sd, 1), 0).astype("f4")
    more = {"scale": scale[None], "offset": -(delta * scale)[None], "scale_row": np.array([0])}
    batch = batch_of(
        stored.astype("i2")[None, None],
        clips.positions,
        np.zeros((1, 1), "f4"),
        **{name: torch.from_numpy(values) for name, values in more.items()},
    )
    placed = place(batch.values, batch.positions, clips.grid, batch.fill).movedim(2, -1)
    np.testing.assert_allclose(placed[0].numpy(), clips[1]["bold"], atol=2e-5)


def test_integers_without_their_scale_are_refused():
    batch = batch_of(np.zeros((1, 1, 2, 3), "i2"), np.arange(3), np.zeros((1, 1), "f4"))
    with pytest.raises(UsageError, match="without scale"):
        batch.to("cpu")


def test_samples_of_different_spaces_lie_each_in_its_own_place():
    rng = np.random.default_rng(3)
    packed = rng.standard_normal((4, 1, 3, 30)).astype("f4")
    positions = np.stack([some_positions(rng, 30) for _ in range(2)])
    positions[1, 20:] = -1  # a space with fewer voxels
    row, fill = np.array([0, 1, 1, 0]), rng.standard_normal((4, 1)).astype("f4")
    moved = batch_of(packed, positions, fill, positions_row=torch.from_numpy(row)).to("cpu")
    np.testing.assert_array_equal(moved.bold.numpy(), by_hand(packed, positions[row], fill))


@pytest.mark.parametrize("cut", [False, True])
def test_what_other_devices_run_gives_the_bits_of_the_kernel(cut):
    rng = np.random.default_rng(4)
    positions = some_positions(rng, 50)
    positions = torch.from_numpy(positions if cut else np.sort(rng.choice(120, 50, replace=False)))
    where = scatter_of(positions, "cpu")
    assert (where.source is None) is not cut
    for dtype in (torch.float32, torch.float16):
        packed = torch.from_numpy(rng.standard_normal((2, 2, 3, 50))).to(dtype)
        placed = torch.full((2, 2, 3, 120), -7, dtype=dtype)
        scatter_by_torch(packed, where, placed)
        ours = place(packed, positions, GRID, torch.full((2, 2), -7.0))
        assert torch.equal(placed.view(ours.shape), ours)


def test_a_batch_placed_by_the_loader_is_only_moved():
    placed = torch.randn(2, 1, 3, *GRID)
    batch = batch_of(np.zeros((2, 1, 3, 1), "f4"), np.arange(1), np.zeros((2, 1), "f4"))
    batch = replace(batch, packed=None, placed=placed)
    assert torch.equal(batch.to("cpu").bold, placed.movedim(2, -1))
    assert batch.to("cpu", dtype=torch.float16).bold.dtype == torch.float16
    with pytest.raises(UsageError, match="output='packed'"):
        _ = batch.values


def test_views_are_batches_of_their_rows():
    packed = np.arange(4 * 6, dtype="f4").reshape(4, 1, 2, 3)
    side = {"x": torch.arange(8.0).reshape(4, 2)}
    batch = batch_of(
        packed, np.arange(3), np.zeros((4, 1), "f4"), views=2, side=side, lengths=torch.tensor([2, 1, 2, 2])
    )
    first, second = batch.view(0), batch.view(1)
    assert torch.equal(torch.cat([first.packed, second.packed]), batch.packed)
    assert (first.run, second.run) == (["r0", "r1"], ["r2", "r3"])
    assert torch.equal(second.side["x"], side["x"][2:])
    assert torch.equal(second.targets["age"], torch.tensor([2.0, 3.0]))
    assert second.views == 1
    assert second.positions is batch.positions
    assert torch.equal(second.to("cpu").bold, batch.to("cpu").bold[2:])
    assert first.frames_valid.tolist() == [[True, True], [True, False]]
    with pytest.raises(UsageError, match="has 2"):
        batch.view(2)


def test_padding_samples_and_frames_after_the_end_are_not_valid():
    more = {"valid": torch.tensor([True, False])}
    batch = batch_of(np.zeros((2, 1, 3, 2), "f4"), np.arange(2), np.zeros((2, 1), "f4"), **more)
    assert batch.frames_valid.tolist() == [[True] * 3, [False] * 3]


CODES = ["LPS", "SAR", "RAS"]


@pytest.fixture(scope="module")
def tilted(tmp_path_factory):
    """One run whose axes run to L, A and S, and the volume that is in it."""
    stored = brain_like("i2", shape=(5, 6, 4, 12))
    affine = ((-2.0, 0.1, 0.0, 5.0), (0.1, 3.0, 0.0, 6.0), (0.0, 0.0, 4.0, 7.0))
    return converted(tmp_path_factory.mktemp("tilted"), {"1": stored}, srow=affine), stored


@pytest.mark.parametrize("codes", CODES)
def test_a_dataset_streams_in_the_orientation_that_was_asked_for(tilted, codes):
    url, stored = tilted
    clips = fmristream.StreamingDataset(url, window=4, normalize="none", orientation=codes)
    affine = clips.runs[0].affine_matrix
    here = nibabel.io_orientation(affine)
    turn = nibabel.orientations.ornt_transform(here, nibabel.orientations.axcodes2ornt(codes))
    expected = nibabel.apply_orientation(stored[..., :4], turn)
    assert clips.orientation == codes
    np.testing.assert_array_equal(clips[0]["bold"][0], expected)
    with fmristream.StreamingLoader(clips, batch_size=2) as loader:
        batch = next(iter(loader))
    np.testing.assert_array_equal(batch.to("cpu").bold[0, 0].numpy(), expected)
    assert batch.orientation == codes
    sizes = nibabel.affines.voxel_sizes(affine)
    np.testing.assert_allclose(batch.voxel_sizes_mm, [sizes["LRPAIS".index(code) // 2] for code in codes], rtol=1e-6)


def test_the_grid_pads_what_was_turned(tilted):
    url, _ = tilted
    plain = fmristream.StreamingDataset(url, window=4, orientation="RAS")[0]["bold"][0]
    padded = fmristream.StreamingDataset(url, window=4, orientation="RAS", grid=(8, 8, 8))[0]["bold"][0]
    np.testing.assert_array_equal(padded[2:7, 1:7, 2:6], plain)  # the larger half comes first: 5 in 8, 6 in 8, 4 in 8
    assert np.abs(padded).sum() == np.abs(plain).sum()


def test_without_an_orientation_nothing_turns(tilted):
    url, stored = tilted
    clips = fmristream.StreamingDataset(url, window=4, normalize="none")
    assert clips.orientation == "LAS"
    np.testing.assert_array_equal(clips[0]["bold"][0], stored[..., :4])
    with pytest.raises(UsageError, match="one letter each"):
        fmristream.StreamingDataset(url, window=4, orientation="up")


def told(batches) -> list[tuple]:
    return [(batch.position, batch.window.tolist(), batch.bold.clone()) for batch in batches]


def same(one: list[tuple], other: list[tuple]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_device_loader_hands_out_what_the_loader_has(cohort_url, ahead):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3)
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        expected = [told(loader) for _ in range(2)]
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", ahead=ahead) as ours:
        assert len(ours) == len(expected[0])
        assert same(told(ours), expected[0])
        assert same(told(ours), expected[1])


def test_its_state_is_that_of_the_batch_in_hand_and_nothing_prepared_is_lost(cohort_url):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3)
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", ahead=2) as ours:
        whole = told(ours)
        ours.load_state_dict({**ours.state_dict(), "consumed": 0})
        begun = told(islice(ours, 3))
        state = ours.state_dict()
        assert state["consumed"] == 15
        rest = told(ours)  # the iteration before was left with batches on the way
        assert same(begun + rest, whole)
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu") as resumed:
        resumed.load_state_dict(state)
        assert same(told(resumed), rest)


def test_a_loader_that_was_put_elsewhere_is_followed(cohort_url):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3)
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", ahead=2) as ours:
        whole = told(ours)
        ours.loader.load_state_dict({**ours.state_dict(), "consumed": 10})
        assert same(told(islice(ours, 3)), whole[2:5])
        ours.loader.load_state_dict({**ours.state_dict(), "consumed": 5})
        assert same(told(ours), whole[1:])


def test_epochs_are_gone_to_and_counted_from_the_batch_in_hand(cohort_url):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3)
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        epochs = [told(loader) for _ in range(3)]
    lengths = [len(epoch) for epoch in epochs]
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cpu", ahead=3) as ours:
        ours.set_epoch(1)
        assert (ours.epoch, len(ours)) == (1, lengths[1])
        begun = told(islice(ours, lengths[1] - 1))
        assert (ours.loader.epoch, ours.epoch, len(ours)) == (2, 1, lengths[1])  # the loader has read further
        ours.set_epoch(1)  # the habit of calling it does not begin the epoch anew
        assert same(begun + told(ours), epochs[1])
        assert ours.epoch == 2
        ours.set_epoch(0)
        assert same(told(ours), epochs[0])
        assert same(told(islice(ours.forever(), lengths[1] + lengths[2])), epochs[1] + epochs[2])
        assert ours.counts is None  # of local files
        with pytest.raises(UsageError, match="0 or more"):
            ours.set_epoch(-1)
    with (
        DeviceLoader(fmristream.StreamingLoader(fmristream.StreamingDataset(cohort_url), batch_size=3), "cpu") as ours,
        pytest.raises(UsageError, match="one pass"),
    ):
        next(ours.forever())


def test_it_passes_over_an_evaluation_split_again_from_the_start(cohort_url):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="val")
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=3), "cpu") as ours:
        first = told(ours)
        next(iter(ours))
        assert same(told(ours), first)


def test_what_was_prepared_before_a_failure_is_handed_out_first(tmp_path):
    url = converted(tmp_path, {"1": brain_like("i2", shape=(4, 4, 4, 40))})
    clips = fmristream.StreamingDataset(url, window=4)
    [chunks] = [path for path in (tmp_path / "dataset").glob("runs/*/residual/c/*/*") if path.is_file()]
    data = bytearray(chunks.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    chunks.write_bytes(data)
    with fmristream.StreamingLoader(clips, batch_size=1) as loader:
        seen = before_failure(loader)
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=1), "cpu", ahead=3) as ours:
        assert before_failure(ours) == seen > 3


def before_failure(batches) -> int:
    """How many batches come before the error."""
    count = 0
    try:
        for _ in batches:
            count += 1
    except CorruptDataError:
        return count
    raise AssertionError("no error")


def test_grayordinates_are_told_from_volumes_when_they_are_to_be_placed():
    batch = batch_of(np.zeros((1, 1, 2, 3), "f4"), np.arange(3), np.zeros((1, 1), "f4"))
    batch = replace(batch, positions=None, grid=None)
    assert batch.to("cpu").placed is None
    with pytest.raises(SpaceError, match="grayordinates"):
        _ = batch.bold


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_bits_of_the_cpu(cohort_url):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3, grid=(8, 8, 8))
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        expected = told(batch.to("cpu") for batch in loader)
    with DeviceLoader(fmristream.StreamingLoader(clips, batch_size=5), "cuda") as ours:
        assert same([(p, w, bold.cpu()) for p, w, bold in told(ours)], expected)
