"""Others read what was written with no fmristream code; and what is lost does not look like data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from fmristream.errors import CorruptDataError, ObjectMissingError
from fmristream.shards import codec
from fmristream.shards.dataset import open_dataset
from tests.shards.tiny_dataset import AFFINE, TinyRun, bold_like, small_shards, write_dataset

SHAPE = (4, 3, 2)
INTEGERS = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
FLOATS = ("<f4", "<f8")


def a_run(dtype: str) -> TinyRun:
    """13 frames with room to spare in the dtype, negative values where it has them."""
    volumes = bold_like(SHAPE, frames=13, dtype="<f8", seed=2)
    volumes = (volumes - 130) / 4 if dtype[1] == "i" else volumes * 0.6
    mask = np.ones(SHAPE, dtype=bool)
    mask[0, 0, 0] = False
    return TinyRun(name="run", subject="01", split="train", volumes=volumes.astype(dtype), mask=mask)


def full_range_run(dtype: str) -> TinyRun:
    info = np.iinfo(dtype)
    volumes = np.random.default_rng(0).integers(info.min, info.max, (13, *SHAPE), dtype=dtype, endpoint=True)
    return TinyRun(name="run", subject="01", split="train", volumes=volumes, mask=np.ones(SHAPE, dtype=bool))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a run into small shards; returns its Zarr group's folder."""

    def write(run: TinyRun) -> Path:
        small_shards(monkeypatch.setattr, 3 * 24 * run.volumes.itemsize)
        write_dataset(str(tmp_path / "data"), [run])
        return tmp_path / "data" / open_dataset(str(tmp_path / "data")).run(0).object

    return write


def with_zarr(folder: Path) -> np.ndarray:
    """(t, v) as any user of zarr-python reads it: added in the stored dtype."""
    group = zarr.open_group(str(folder), mode="r")
    if group.attrs["fmristream"]["encoding"] == "direct":
        return group["bold"][:]
    with np.errstate(over="ignore"):
        return group["residual"][:] + group["reference"][:]


def with_tensorstore(folder: Path, **options) -> np.ndarray:
    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}, **options}
        return tensorstore.open(spec, read=True).result().read().result()

    if (folder / "bold").exists():
        return read("bold")
    with np.errstate(over="ignore"):
        return read("residual") + read("reference")


@pytest.mark.parametrize("reader", [with_zarr, with_tensorstore])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_residual_plus_reference_is_what_was_written(written, reader, dtype):
    run = a_run(dtype)
    values = reader(written(run))
    assert values.dtype == np.dtype(dtype)
    assert values.tobytes() == run.values.tobytes()


@pytest.mark.parametrize("reader", [with_zarr, with_tensorstore])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_full_range_values_wrap_back_exactly(written, reader, dtype):
    run = full_range_run(dtype)
    assert reader(written(run)).tobytes() == run.values.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_keep_every_bit_of_nan_infinity_and_minus_zero(written, dtype):
    run = a_run(dtype)
    run.volumes.reshape(-1)[[1, 30, 60, 90]] = [np.nan, np.inf, -np.inf, -0.0]
    run.volumes.view(f"<u{run.volumes.itemsize}").reshape(-1)[40] = 0x7F800001 if dtype == "<f4" else 0x7FF0000000000001
    folder = written(run)
    assert with_zarr(folder).tobytes() == with_tensorstore(folder).tobytes() == run.values.tobytes()
    assert open_dataset(str(folder.parents[1])).reader(0).read_stored(0, 13).tobytes() == run.values.tobytes()


def test_the_group_says_what_a_stranger_needs(written):
    run = a_run("<i2")
    attributes = zarr.open_group(str(written(run)), mode="r").attrs["fmristream"]
    assert attributes["encoding"] == "difference"
    assert attributes["valid_range"] == [int(run.values.min()), int(run.values.max())]
    assert attributes["affine"] == list(AFFINE)
    assert (attributes["slope"], attributes["inter"], attributes["tr_s"]) == (1.0, 0.0, 0.72)
    assert (attributes["shape"], attributes["frames"], attributes["dtype"]) == (list(SHAPE), 13, "<i2")
    assert attributes["version"] == 1


def test_a_run_without_a_finite_value_has_no_valid_range(written):
    run = a_run("<f4")
    run.volumes[:] = np.nan
    assert zarr.open_group(str(written(run)), mode="r").attrs["fmristream"]["valid_range"] is None


def test_the_space_can_be_read_with_zarr_alone(written):
    run = a_run("<i2")
    folder = written(run)
    space = zarr.open_group(str(folder), mode="r").attrs["fmristream"]["space"]
    group = zarr.open_group(str(folder.parents[1] / "spaces" / space), mode="r")
    np.testing.assert_array_equal(group["mask"][:], run.mask)
    attributes = group.attrs["fmristream"]
    assert (attributes["kind"], attributes["shape"], attributes["voxels"]) == ("grid", list(SHAPE), 23)
    volumes = np.zeros((13, *SHAPE), dtype="<i2")
    volumes[:, group["mask"][:].astype(bool)] = with_zarr(folder)
    np.testing.assert_array_equal(volumes[:, run.mask], run.volumes[:, run.mask])


def lose_shard(folder: Path, number: int = 1) -> None:
    (folder / frames_name(folder) / "c" / str(number) / "0").unlink()


def lose_chunk(folder: Path, frame: int = 4) -> None:
    """As zarr-python itself does it: a chunk of nothing but fill values is left out of its shard."""
    array = zarr.open_array(str(folder / frames_name(folder)), mode="r+")
    array[frame] = array.fill_value


def frames_name(folder: Path) -> str:
    return "bold" if (folder / "bold").exists() else "residual"


LOSSES = [(lose_shard, slice(3, 6)), (lose_chunk, slice(4, 5))]


@pytest.mark.parametrize("lose", [lose_shard, lose_chunk])
@pytest.mark.parametrize("dtype", ["|u1", "<i2", "<f4"])
def test_our_reader_raises_where_a_chunk_or_shard_is_lost(written, lose, dtype):
    folder = written(a_run(dtype))
    lose(folder)
    dataset = open_dataset(str(folder.parents[1]))
    with pytest.raises((ObjectMissingError, CorruptDataError), match="c/1/0"):
        dataset.read(0)
    with pytest.raises((ObjectMissingError, CorruptDataError)):
        dataset.read(0, 4, 6)  # chunks this small have one length: what moved up is noticed at the end of the shard
    np.testing.assert_array_equal(dataset.read(0, 0, 3, packed=True), a_run(dtype).values[:3].astype("<f4"))
    np.testing.assert_array_equal(dataset.read(0, 6, 13, packed=True), a_run(dtype).values[6:].astype("<f4"))


@pytest.mark.parametrize("lose", [lose_shard, lose_chunk])
@pytest.mark.parametrize("dtype", ["|u1", "<i2", "<f4"])
def test_tensorstore_raises_when_told_not_to_fill(written, lose, dtype):
    folder = written(a_run(dtype))
    with_tensorstore(folder, fill_missing_data_reads=False)
    lose(folder)
    with pytest.raises(ValueError, match="missing"):
        with_tensorstore(folder, fill_missing_data_reads=False)


@pytest.mark.parametrize(("lose", "frames"), LOSSES)
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_in_zarr_python_every_lost_value_falls_outside_the_valid_range(written, lose, frames, dtype):
    run = a_run(dtype)
    folder = written(run)
    lose(folder)
    low, high = zarr.open_group(str(folder), mode="r").attrs["fmristream"]["valid_range"]
    assert high - low < 2 ** (8 * run.volumes.itemsize - 1), "the dtype leaves room"
    lost = np.zeros(13, dtype=bool)
    lost[frames] = True
    values = with_zarr(folder)
    valid = (values >= low) & (values <= high)
    assert not valid[lost].any()
    assert valid[~lost].all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_lost_reference_shows_as_well(written, dtype):
    folder = written(a_run(dtype))
    low, high = zarr.open_group(str(folder), mode="r").attrs["fmristream"]["valid_range"]
    (folder / "reference" / "c" / "0").unlink()
    values = with_zarr(folder)
    assert not ((values >= low) & (values <= high)).any()
    with pytest.raises(ObjectMissingError):
        open_dataset(str(folder.parents[1])).read(0)


def test_lost_masks_and_moments_do_not_look_like_masks_and_moments(written):
    folder = written(a_run("<i2"))
    root = folder.parents[1]
    space = zarr.open_group(str(folder), mode="r").attrs["fmristream"]["space"]
    shutil.rmtree(root / "spaces" / space / "mask" / "c")
    shutil.rmtree(folder / "moments" / "c")
    assert (zarr.open_group(str(root / "spaces" / space), mode="r")["mask"][:] == 128).all()
    assert np.isnan(zarr.open_group(str(folder), mode="r")["moments"][:]).all()


def test_the_stats_object_is_one_chunk_of_the_documented_codecs(written):
    run = a_run("<i2")
    folder = written(run)
    stats = folder.parents[1] / "stats" / folder.name.removesuffix(".zarr")
    padded = np.empty((2, 24), dtype="<f4")
    codec.decode_into(stats.read_bytes(), padded, what="stats")
    wide = run.values.astype(np.float64)
    reference = zarr.open_group(str(folder), mode="r")["reference"][:]
    np.testing.assert_allclose(padded[0, :23] + reference, wide.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(padded[1, :23], wide.std(axis=0), rtol=1e-6)
