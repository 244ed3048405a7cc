"""The forms in which values come out: whichever path makes them, they are the same numbers."""

import numpy as np
import pytest
import torch

import fmristream
from fmristream.errors import CorruptDataError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.sampling.clip import Clip
from fmristream.shards import codec
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from fmristream.stream.rows import Scratch, Target
from tests.stream.nifti_runs import converted
from tests.stream.stores import PassingStore, opened_through
from tests.stream.test_normalization import brain_like

COHORT = "synth://?subjects=2&runs=1&shape=9x10x7&frames=29&seed=5"
LAYOUTS = {
    "lossless": {},
    "raw": {"codec": "raw"},
    "int8": {"codec": "int8"},
    "volume": {"layout": "volume"},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def dataset_url(request, tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp(request.param) / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(split="none", **LAYOUTS[request.param]))
    return url


def loaded(url, normalize: str = "voxel-zscore", *, grid=None, **options):
    clips = StreamingDataset(url, window=7, normalize=normalize, grid=grid)
    with StreamingLoader(clips, batch_size=4, threads=2, **options) as loader:
        return list(loader)


@pytest.mark.parametrize("normalize", ["voxel-zscore", "global-zscore", "none"])
def test_float16_is_float32_rounded_in_every_bit(dataset_url, normalize):
    wide, half = loaded(dataset_url, normalize), loaded(dataset_url, normalize, dtype="float16")
    for one, other in zip(wide, half, strict=True):
        assert other.packed.dtype == torch.float16
        assert torch.equal(one.packed.to(torch.float16), other.packed)


@pytest.mark.parametrize("normalize", ["voxel-zscore", "global-zscore"])
@pytest.mark.parametrize("grid", [None, (8, 12, 7)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_loader_places_is_what_the_batch_would(dataset_url, normalize, grid, dtype):
    packed = loaded(dataset_url, normalize, grid=grid, dtype=dtype)
    for one, other in zip(packed, loaded(dataset_url, normalize, grid=grid, dtype=dtype, output="placed"), strict=True):
        assert other.packed is None
        assert torch.equal(one.bold, other.bold)
        assert torch.equal(one.fill, other.fill)


def test_the_kernel_of_whole_spans_gives_what_recipes_give_frame_by_frame(dataset_url):
    clips = StreamingDataset(dataset_url, window=7)
    run, reader = clips.runs[0], clips.reader
    clip = Clip(run=0, start=3, length=11)
    at_once = np.empty((1, clip.length, run.voxels), np.float32)
    reader.fill(reader.request(run, clip), Target(at_once), Scratch())
    stored = np.empty((clip.length, clips.dataset.reader(run).padded_voxels), run.numpy_dtype)
    clips.dataset.reader(run).read_chunks(3, 14, stored)
    expected = np.empty_like(at_once)
    reader.prepared(run)(stored[:, : run.voxels], clip.frames, expected)
    assert np.array_equal(at_once, expected)


def test_without_the_libraries_functions_python_does_the_same(dataset_url):
    expected = loaded(dataset_url, dtype="float16")
    assert codec.entry_points() is not None
    there = codec.entry_points
    codec.entry_points = lambda: None  # as on a machine whose wheels do not export them
    try:
        found = loaded(dataset_url, dtype="float16")
    finally:
        codec.entry_points = there
    assert all(torch.equal(one.packed, other.packed) for one, other in zip(found, expected, strict=True))


def test_a_store_that_is_not_a_folder_gives_the_same(dataset_url):
    found = loaded(opened_through(dataset_url, PassingStore), dtype="float16")
    expected = loaded(dataset_url, dtype="float16")
    assert all(torch.equal(one.packed, other.packed) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("step", [2, 3])
def test_dilated_clips_read_their_own_chunks_and_no_others(dataset_url, step):
    clips = StreamingDataset(dataset_url, window=7)
    run, reader = clips.runs[0], clips.reader
    clip = Clip(run=0, start=2, length=8, step=step)
    request = reader.request(run, clip)
    lengths = clips.dataset.reader(run).lengths
    assert request.bytes == lengths[list(clip.frames)].sum()
    found, whole = np.empty((1, 8, run.voxels), np.float32), np.empty((1, 29, run.voxels), np.float32)
    reader.fill(request, Target(found), Scratch())
    reader.read(run, Clip(run=0, start=0, length=29), whole, Scratch())
    assert np.array_equal(found[0], whole[0, list(clip.frames)])


def test_residuals_are_the_values_once_they_are_scaled(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("int16") / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(split="none"))
    for one, other in zip(loaded(url), loaded(url, dtype="int16"), strict=True):
        assert other.packed.dtype == torch.int16
        assert other.scale.shape == other.offset.shape == (len(set(other.run)), one.packed.shape[-1])
        assert torch.allclose(one.packed, other.values, atol=1e-5)
        assert torch.allclose(one.bold, other.to("cpu").bold, atol=1e-5)


def test_residuals_under_a_recipe_that_is_no_scale_for_each_voxel_are_refused(dataset_url):
    with pytest.raises(UsageError, match="int16"):
        loaded(dataset_url, "global-zscore", dtype="int16")


@pytest.mark.parametrize(
    ("dtype", "shown"), [("f4", "<f4 is stored"), ("i4", "<i4 is stored"), ("u2", "more than that")]
)
def test_what_has_no_residuals_of_16_bits_is_refused_when_the_loader_is_made(tmp_path, dtype, shown):
    url = converted(tmp_path, {"1": brain_like("i2"), "2": brain_like(dtype, seed=1)})
    normalize = "voxel-zscore | clip:5" if dtype == "u2" else "voxel-zscore"
    clips = StreamingDataset(url, window=4, normalize=normalize)
    with pytest.raises(UsageError, match=f"dtype='int16'.*{shown}.*float16"):
        StreamingLoader(clips, batch_size=2, dtype="int16")
    other = StreamingDataset(url, window=4, normalize="none", where="subject == '1'")
    with StreamingLoader(other, batch_size=2, dtype="int16") as loader:
        assert next(iter(loader)).packed.dtype == torch.int16


def test_residuals_that_wrap_are_refused_when_the_loader_is_made(tmp_path):
    stored = np.full((4, 4, 4, 12), -30_000, dtype="i2", order="F")
    stored[..., 7] = 30_000
    clips = StreamingDataset(converted(tmp_path, {"1": stored}), window=4)
    with pytest.raises(UsageError, match=r"dtype='int16'.*run sub-1_.*do not fit 16 bits"):
        StreamingLoader(clips, batch_size=1, dtype="int16")


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"output": "grid"}, {"dtype": "int16", "output": "placed"}])
def test_forms_that_there_are_not_are_refused(dataset_url, options):
    with pytest.raises(UsageError, match=r"dtype="):
        loaded(dataset_url, **options)


def test_a_raw_chunk_that_is_damaged_is_noticed_at_its_first_touch(tmp_path):
    url = str(tmp_path / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(split="none", codec="raw"))
    clips = StreamingDataset(url, window=7)
    path = tmp_path / "dataset" / clips.dataset.reader(0).frames_array.object / "c/0/0"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(CorruptDataError, match="checksum"):
        clips[0]
    path.write_bytes(whole)
    clips[0]  # restored, it is read anew
