"""Copies of a run are known again, however they were written; other runs are not taken for copies."""

import math
from itertools import combinations

import nibabel
import numpy as np
import pytest
from nilearn.image import resample_img

from fmristream.errors import CorruptDataError
from fmristream.ingest.sources.synth import find_synth_runs, locate_synth
from fmristream.signal.grid import Grid
from fmristream.signal.sketch import MAX_BITS, RunSketch, Sketch, near_duplicates, similarity

COPY, OTHER = 0.7, 0.25


def sketch_of(data: np.ndarray, affine: np.ndarray, mask: np.ndarray | None = None) -> Sketch:
    """As it comes back from disk, of x y z t."""
    inside = np.ones(data.shape[:3], dtype=bool) if mask is None else mask
    made = RunSketch(
        Grid(shape=data.shape[:3], affine=tuple(affine.reshape(-1).tolist())), inside, frames=data.shape[3]
    )
    for frame in range(data.shape[3]):
        made.add(np.ascontiguousarray(data[..., frame][inside]))
    return Sketch.decode(made.finish().encode())


@pytest.fixture(scope="module")
def runs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two runs of each of two subjects: (x y z t, affine), 4 mm."""
    listing = find_synth_runs("synth://?subjects=2&runs=2&frames=120&shape=44x52x44", space="MNI")
    found = []
    for source in listing.runs:
        cohort, subject, run = locate_synth(source.url)
        frames = [frame.copy() for frame in cohort.run_frames(subject, run)]
        found.append((np.stack(frames, axis=-1), np.array(cohort.affine(), dtype=float)))
    return found


def test_other_runs_are_not_alike_of_the_same_subject_or_another(runs):
    sketches = [sketch_of(*run) for run in runs]
    assert all(abs(similarity(one, other).time) < OTHER for one, other in combinations(sketches, 2))
    assert list(near_duplicates(sketches)) == []
    assert all(len(sketch.encode()) <= 1100 for sketch in sketches)


def cropped(data, affine):
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ [2, 3, 1]
    return data[2:-2, 3:-1, 1:], moved


def flipped(data, affine):
    moved = affine.copy()
    moved[:3, 3] += affine[:3, 0] * (data.shape[0] - 1)
    moved[:3, 0] *= -1
    return data[::-1], moved


def eight_bits(data, affine):
    span = float(data.max()) - float(data.min())
    return np.rint((data - float(data.min())) / span * 255).astype("u1"), affine


def larger_voxels(data, affine):
    image = nibabel.Nifti1Image(data.astype("f4"), affine)
    size = np.abs(affine[0, 0]) * 1.5
    made = resample_img(image, target_affine=np.diag([size] * 3), force_resample=True, copy_header=True)
    return np.asarray(made.dataobj), made.affine


COPIES = {
    "other scaling": lambda data, affine: (data * 3.5 - 100, affine),
    "8 bits": eight_bits,
    "cropped": cropped,
    "flipped": flipped,
    "1.5 times the voxel size": larger_voxels,
    "without the first frames": lambda data, affine: (data[..., 5:], affine),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_alike(runs, how):
    original = sketch_of(*runs[0])
    found = similarity(original, sketch_of(*COPIES[how](*runs[0])))
    assert found.time > COPY
    assert found.lag == (5 if "first" in how else 0)
    assert found.image > 0.9


def test_a_copy_with_another_mask_is_alike(runs):
    data, affine = runs[0]
    mean = data.mean(axis=-1)
    found = similarity(sketch_of(data, affine), sketch_of(data, affine, mean > 0.35 * mean.max()))
    assert found.time > COPY


def test_near_duplicates_names_the_pairs(runs):
    data, affine = runs[1]
    sketches = [sketch_of(*run) for run in runs] + [sketch_of(*cropped(data[..., 3:], affine))]
    [(first, second, found)] = near_duplicates(sketches)
    assert (first, second, found.lag) == (1, 4, 3)
    [(first, second, found)] = near_duplicates(sketches[::-1])
    assert (first, second, found.lag) == (0, 3, -3)


def test_runs_that_say_nothing_are_alike_to_nobody():
    affine = np.diag([4.0, 4, 4, 1])
    constant = sketch_of(np.full((8, 8, 8, 40), 7, "<i2"), affine)
    short = sketch_of(np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype("f4"), affine)
    broken = sketch_of(np.full((8, 8, 8, 40), np.nan, "<f4"), affine)
    for one, other in combinations([constant, short, broken, constant, short, broken], 2):
        assert math.isnan(similarity(one, other).time)
    assert list(near_duplicates([constant, short, broken])) == []


def test_values_that_are_not_finite_or_beyond_float32_do_no_harm():
    rng = np.random.default_rng(0)
    data, affine = rng.normal(1000, 10, (12, 12, 12, 60)).astype("<f8"), np.diag([8.0, 8, 8, 1])
    holed = data.copy()
    holed[3, 3, 3], holed[5, 5, 5, 7] = np.nan, np.inf
    assert similarity(sketch_of(data, affine), sketch_of(holed, affine)).time > COPY
    holed[4, 4, 4, ::2] = 1e300
    sketch_of(holed, affine)


@pytest.mark.parametrize("dtype", ["|i1", "|u1", "<i2", "<u2", "<i4", "<f4"])
def test_blocks_are_summed_whatever_the_dtype_and_however_many_voxels(dtype):
    ends = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    for value in (ends.min, ends.max):
        whole = np.full((2, 3, 40_000, 2), value, dtype)  # 4e4 voxels of a block in a row: more than 2^31 in all
        whole[..., 1] = 0
        made = RunSketch(
            Grid(shape=whole.shape[:3], affine=tuple(np.diag([24, 24, 1e-4, 1.0]).reshape(-1).tolist())),
            np.ones(whole.shape[:3], dtype=bool), frames=2,
        )  # fmt: skip
        for frame in range(2):
            made.add(np.ascontiguousarray(whole[..., frame]).reshape(-1))
        expected = (
            np.float32(float(value) * 40_000)
            if np.dtype(dtype).kind in "iu"
            else np.float32(np.copysign(np.inf, value))
        )
        assert made._sums[0].tolist() == pytest.approx([expected] * 6, rel=1e-6)
        assert not made._sums[1].any()


def test_the_longest_runs_have_the_largest_sketch_of_a_kilobyte():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(3, 3, 3, 5000)).astype("f4")
    found = sketch_of(data, np.diag([20.0, 20, 20, 1]))
    assert found.signs.size == MAX_BITS
    assert len(found.encode()) < 1100


@pytest.mark.parametrize("cut", [0, 5, 13, 600, -1])
def test_bytes_that_are_no_sketch_are_refused(runs, cut):
    data = sketch_of(*runs[0]).encode()
    with pytest.raises(CorruptDataError):
        Sketch.decode(data[:cut])
    with pytest.raises(CorruptDataError):
        Sketch.decode(b"x" + data[1:])
