"""Which voxels a conversion stores: the runs' own masks, computed ones as nilearn computes them, given ones, or all."""

import json
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nilearn.masking import compute_epi_mask

import fmristream
from fmristream.errors import SourceError, UsageError
from fmristream.synth import Cohort
from tests.ingest.cohorts import bold, contents, convert, stored_bytes_of, write_runs
from tests.ingest.nifti_files import AFFINE, gzip_members, nifti_bytes

HEAD = (18, 20, 16)
MNI = "_space-MNI152NLin2009cAsym"


def head(seed: int, *, frames: int = 12, dtype: str = "int16") -> np.ndarray:
    """A brain in air, as nilearn expects one; each seed lies a little elsewhere."""
    cohort = Cohort(subjects=1, shape=HEAD, frames=frames, voxel_size_mm=11.0, seed=seed, dtype=dtype, masked=False)
    stored = np.stack([frame.copy() for frame in cohort.run_frames(0, 0)], axis=-1)
    return np.asfortranarray(np.roll(stored, seed % 3 - 1, axis=0))


def nilearn_mask(path: Path, frames: int | None = None) -> np.ndarray:
    """The oracle, on the image as nibabel opens it."""
    image = nibabel.load(path)
    if frames is not None:
        image = image.slicer[..., :frames]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asanyarray(compute_epi_mask(image).dataobj).astype(bool)


def write_derivative(root: Path, runs: dict[str, tuple[np.ndarray, np.ndarray | None]], *, mask_affine=AFFINE) -> str:
    """An fMRIPrep folder of (bold, brain mask) by subject."""
    description = {
        "Name": "x",
        "BIDSVersion": "1.8.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fMRIPrep"}],
    }
    root.mkdir()
    (root / "dataset_description.json").write_text(json.dumps(description))
    for subject, (stored, mask) in runs.items():
        folder = root / f"sub-{subject}" / "func"
        folder.mkdir(parents=True)
        stem = f"sub-{subject}_task-rest{MNI}_desc"
        (folder / f"{stem}-preproc_bold.nii.gz").write_bytes(gzip_members(nifti_bytes(stored)))
        if mask is not None:
            data = nifti_bytes(np.asfortranarray(mask.astype("u1")), srow=mask_affine)
            (folder / f"{stem}-brain_mask.nii.gz").write_bytes(gzip_members(data))
    return str(root)


def box(start: int, stop: int) -> np.ndarray:
    mask = np.zeros((7, 6, 5), dtype=bool)
    mask[start:stop, 1:5, 1:4] = True
    return mask


def masks_of(url: str) -> list[np.ndarray]:
    dataset = fmristream.open(url)
    return [dataset.space(run).mask for run in dataset.runs]


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
@pytest.mark.parametrize("frames", [None, 1, 5])
def test_a_computed_mask_is_nilearns_on_the_same_image(tmp_path, dtype, frames):
    source = write_runs(tmp_path / "in", {"sub-1_bold": head(1, dtype=dtype)})
    convert(source, str(tmp_path / "out"), mask="auto" if frames is None else f"first:{frames}")
    expected = nilearn_mask(tmp_path / "in" / "sub-1_bold.nii.gz", frames)
    assert 0.05 < expected.mean() < 0.6
    assert np.array_equal(masks_of(str(tmp_path / "out"))[0], expected)


@pytest.mark.parametrize("slope", [(0.5, 0.0), (2.0, -100.0)])
def test_a_computed_mask_is_of_scaled_values(tmp_path, slope):
    source = write_runs(tmp_path / "in", {"sub-1_bold": head(2)}, scl_slope=slope[0], scl_inter=slope[1])
    convert(source, str(tmp_path / "out"), mask="auto")
    assert np.array_equal(masks_of(str(tmp_path / "out"))[0], nilearn_mask(tmp_path / "in" / "sub-1_bold.nii.gz"))


def test_computed_masks_of_one_grid_are_united(tmp_path):
    runs = {f"sub-{seed}_bold": head(seed) for seed in range(3)}
    source = write_runs(tmp_path / "in", runs)
    convert(source, str(tmp_path / "out"), mask="auto")
    each = [nilearn_mask(tmp_path / "in" / f"{name}.nii.gz") for name in runs]
    union = np.logical_or.reduce(each)
    assert union.sum() > max(mask.sum() for mask in each)
    assert all(np.array_equal(mask, union) for mask in masks_of(str(tmp_path / "out")))
    dataset = fmristream.open(str(tmp_path / "out"))
    assert dataset.runs[0].voxels == union.sum()
    for name, stored in runs.items():
        assert contents(str(tmp_path / "out"))[name] == np.ascontiguousarray(stored[union].T).tobytes()


def test_what_is_not_finite_counts_as_zero_in_a_computed_mask_as_in_nilearn(tmp_path):
    stored = head(1, dtype="float32")
    stored[4:6, 5:8] = np.nan
    stored[0, 0, 0, 3] = np.inf
    source = write_runs(tmp_path / "in", {"sub-1_bold": stored})
    convert(source, str(tmp_path / "out"), mask="auto")
    assert np.array_equal(masks_of(str(tmp_path / "out"))[0], nilearn_mask(tmp_path / "in" / "sub-1_bold.nii.gz"))


@pytest.mark.parametrize("mask", ["auto", "first:4"])
@pytest.mark.parametrize("stored", [np.zeros((7, 6, 5, 9), "<i2"), bold(shape=(7, 6, 1, 9)), bold(shape=(2, 2, 2, 9))])
def test_a_mask_that_cannot_be_believed_is_not_used_and_that_is_said(tmp_path, mask, stored):
    source = write_runs(tmp_path / "in", {"sub-1_bold": stored})
    report = convert(source, str(tmp_path / "out"), mask=mask)
    assert report.exit_code == 0
    assert any("sub-1_bold" in text and "the whole volume is stored" in text for text in report.warnings)
    assert masks_of(str(tmp_path / "out"))[0].all()
    assert contents(str(tmp_path / "out")) == {"sub-1_bold": stored_bytes_of(stored)}


def test_a_run_whose_mask_is_not_believed_keeps_its_own_space_and_spoils_nobodys(tmp_path):
    runs = {"sub-1_bold": head(1), "sub-2_bold": np.zeros((*HEAD, 12), "<i2")}
    convert(write_runs(tmp_path / "in", runs), str(tmp_path / "out"), mask="auto")
    one, other = masks_of(str(tmp_path / "out"))
    assert np.array_equal(one, nilearn_mask(tmp_path / "in" / "sub-1_bold.nii.gz"))
    assert other.all()


def test_the_runs_own_masks_are_united_and_each_is_kept(tmp_path):
    runs = {"a": (bold(seed=1), box(1, 4)), "b": (bold(seed=2), box(3, 6))}
    report = convert(write_derivative(tmp_path / "in", runs), str(tmp_path / "out"), mask="auto")
    assert report.exit_code == 0
    dataset = fmristream.open(str(tmp_path / "out"))
    union = box(1, 6)
    assert all(np.array_equal(mask, union) for mask in masks_of(str(tmp_path / "out")))
    for run, (_, own) in zip(dataset.runs, runs.values(), strict=True):
        assert np.array_equal(dataset.reader(run).own_mask, own[union])
        assert run.outside == 0


def test_a_run_without_its_own_mask_gets_a_computed_one_into_the_union(tmp_path):
    own = np.zeros(HEAD, dtype=bool)
    own[0, 0, :3] = True
    source = write_derivative(tmp_path / "in", {"a": (head(1), own), "b": (head(2), None)})
    convert(source, str(tmp_path / "out"), mask="auto")
    computed = nilearn_mask(next((tmp_path / "in" / "sub-b").rglob("*_bold.nii.gz")))
    assert all(np.array_equal(mask, own | computed) for mask in masks_of(str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("mask", "affine", "reason"),
    [
        (np.ones((7, 6, 4), bool), AFFINE, "7 x 6 x 4"),
        (box(1, 4), ((2.0, 0, 0, 0), (0, 2.0, 0, 0), (0, 0, 2.0, 0)), "mm away"),
        (np.zeros((7, 6, 5), bool), AFFINE, "holds no voxel"),
    ],
)
def test_a_run_with_an_unusable_mask_is_left_out_and_the_reason_named(tmp_path, mask, affine, reason):
    runs = {"a": (bold(seed=1), box(1, 4)), "b": (bold(seed=2), None)}
    source = write_derivative(tmp_path / "in", runs)
    bad = tmp_path / "in" / "sub-b" / "func" / f"sub-b_task-rest{MNI}_desc-brain_mask.nii.gz"
    bad.write_bytes(gzip_members(nifti_bytes(np.asfortranarray(mask.astype("u1")), srow=affine)))
    report = convert(source, str(tmp_path / "out"), mask="auto")
    assert report.runs == 1
    assert len(report.quarantined) == 1
    assert "sub-b" in report.quarantined[0].name
    assert reason in report.quarantined[0].reason
    assert np.array_equal(masks_of(str(tmp_path / "out"))[0], box(1, 4))


def test_first_frames_are_asked_for_and_win_over_the_runs_own_masks(tmp_path):
    source = write_derivative(tmp_path / "in", {"a": (head(1), np.ones(HEAD, bool))})
    convert(source, str(tmp_path / "out"), mask="first:4")
    expected = nilearn_mask(next((tmp_path / "in").rglob("*_bold.nii.gz")), 4)
    assert np.array_equal(masks_of(str(tmp_path / "out"))[0], expected)
    run = fmristream.open(str(tmp_path / "out")).runs[0]
    assert run.outside == int((~expected).sum())  # the own mask has voxels that are not stored, and they are counted


def test_a_given_mask_is_used_as_it_is(tmp_path):
    stored, mask = bold(), np.random.default_rng(0).random((7, 6, 5)) < 0.3
    (tmp_path / "mask.nii.gz").write_bytes(gzip_members(nifti_bytes(np.asfortranarray(mask.astype("u1")))))
    source = write_runs(tmp_path / "in", {"sub-1_bold": stored})
    convert(source, str(tmp_path / "out"), mask=str(tmp_path / "mask.nii.gz"))
    assert np.array_equal(masks_of(str(tmp_path / "out"))[0], mask)
    assert contents(str(tmp_path / "out"))["sub-1_bold"] == np.ascontiguousarray(stored[mask].T).tobytes()


def test_a_given_mask_leaves_out_the_runs_on_another_grid(tmp_path):
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(np.ones((7, 6, 5), "u1")))
    runs = {"sub-1_bold": bold(), "sub-2_bold": bold(shape=(8, 6, 5, 20))}
    report = convert(write_runs(tmp_path / "in", runs), str(tmp_path / "out"), mask=str(tmp_path / "mask.nii"))
    assert (report.runs, report.exit_code) == (1, 3)
    assert report.quarantined[0].name == "sub-2_bold"
    assert "the given mask does not fit" in report.quarantined[0].reason


@pytest.mark.parametrize("content", [np.zeros((7, 6, 5), "u1"), np.ones((7, 6, 4), "u1")])
def test_a_given_mask_that_fits_no_run_converts_nothing(tmp_path, content):
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(content))
    source = write_runs(tmp_path / "in", {"sub-1_bold": bold()})
    with pytest.raises(SourceError, match="the given mask"):
        convert(source, str(tmp_path / "out"), mask=str(tmp_path / "mask.nii"))
    assert not (tmp_path / "out" / "generations").exists()


def test_a_given_mask_that_is_not_there_is_said_to_be_missing(tmp_path):
    source = write_runs(tmp_path / "in", {"sub-1_bold": bold()})
    with pytest.raises(UsageError, match=r"mask\.nii"):
        convert(source, str(tmp_path / "out"), mask=str(tmp_path / "mask.nii"))


@pytest.mark.parametrize("text", ["first:", "first:0", "first:-2", "first:x", ""])
def test_a_mask_option_that_means_nothing_is_refused(text):
    with pytest.raises(UsageError, match="--mask"):
        convert("synth://", "memory://never", mask=text)
