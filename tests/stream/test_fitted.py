"""Statistics of training runs: fitted once, kept under their digest, refused beside another split or dataset."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import fmristream
from fmristream.errors import CorruptDataError, ResumeError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.verify import verify
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import Atlas, atlas_of_labels
from fmristream.stream.fitted import Fitted, decode_fitted, encode_fitted, load_fitted, save_fitted, split_digest
from fmristream.stream.window_reader import Scratch
from tests.signal.array_runs import brain_like
from tests.stream.nifti_runs import converted

COHORT = "synth://?subjects=8&runs=2&shape=9x10x7&frames=29&seed=5"


def outputs(url: str, normalize: str, *, split: str | None, frames: int = 29, **options) -> np.ndarray:
    """(run, t, v) float64 of whole runs."""
    clips = fmristream.StreamingDataset(url, window=29, split=split, normalize=normalize, exact=True, **options)
    packed = np.empty((len(clips), 1, 29, clips.voxels), dtype=np.float32)
    for number in range(len(clips)):
        clips.read_packed(number, packed[number], Scratch())
    return packed[:, 0, :frames].astype(np.float64)


def training(url: str, normalize: str = "none", **options) -> fmristream.StreamingDataset:
    return fmristream.StreamingDataset(url, window=20, split="train", normalize=normalize, exact=True, **options)


def robust(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = values.reshape(-1, values.shape[-1])
    with np.errstate(all="ignore"):
        low, high = np.nanpercentile(np.where(flat == 0, np.nan, flat), (25, 75), axis=0)
    return np.median(flat, axis=0), high - low


def test_brainlms_scaling_is_of_training_runs_and_applies_to_all(cohort_url):
    fitted = fmristream.fit(training(cohort_url), "brainlm-robust")
    median, iqr = robust(outputs(cohort_url, "voxel-center", split="train"))
    np.testing.assert_allclose(fitted.values.arrays["median"], median, atol=1e-9)
    np.testing.assert_allclose(fitted.values.arrays["iqr"], iqr, atol=1e-9)
    assert (fitted.split, fitted.runs, fitted.frames, fitted.first_frames) == ("train", 12, 12 * 29, 200)
    centred = outputs(cohort_url, "voxel-center", split="test")
    moves = iqr > 0
    expected = np.where(moves, (centred - median) / np.where(moves, iqr, 1), 0)
    np.testing.assert_allclose(
        outputs(cohort_url, "brainlm-robust", split="test", fitted=[fitted]), expected, atol=1e-4
    )
    expected = np.where(moves, centred - median / np.where(moves, iqr, 1), 0)
    released = outputs(cohort_url, "brainlm-robust-released", split="test", fitted=[fitted])
    np.testing.assert_allclose(released, expected, atol=1e-3)


def test_the_first_frames_alone_can_be_taken(cohort_url):
    fitted = fmristream.fit(training(cohort_url), "cohort-robust", first_frames=10)
    median, _ = robust(outputs(cohort_url, "none", split="train", frames=10))
    np.testing.assert_allclose(fitted.values.arrays["median"], median)
    assert fitted.frames == 120


def test_moments_and_ranges_of_a_cohort(cohort_url):
    x = outputs(cohort_url, "none", split="train")
    flat, other = x.reshape(-1, x.shape[-1]), outputs(cohort_url, "none", split="val")
    for step, center, spread in (
        ("cohort-zscore", flat.mean(0), flat.std(0)),
        ("cohort-voxel-minmax", flat.min(0), np.ptp(flat, 0)),
        ("cohort-minmax", flat.min(), np.ptp(flat)),
    ):
        fitted = fmristream.fit(training(cohort_url), step)
        expected = np.where(spread > 0, (other - center) / np.where(spread > 0, spread, 1), 0)
        np.testing.assert_allclose(outputs(cohort_url, step, split="val", fitted=[fitted]), expected, atol=2e-5)


def test_components_are_fitted_behind_any_recipe_and_used_by_name(cohort_url):
    clips = training(cohort_url, "voxel-zscore")
    fitted = fmristream.fit(clips, "pca:6", name="six")
    reduced = fmristream.StreamingDataset(
        cohort_url, window=29, normalize="voxel-zscore | pca:4", fitted=[fitted], exact=True
    )
    assert (reduced.voxels, reduced.has_grid) == (4, False)
    z = outputs(cohort_url, "voxel-zscore", split=None)[3]
    arrays = fitted.values.arrays
    np.testing.assert_allclose(reduced[3]["packed"][0], (z - arrays["mean"]) @ arrays["components"][:4].T, atol=1e-4)
    with pytest.raises(UsageError, match="6 components were fitted; fit 7"):
        fmristream.StreamingDataset(cohort_url, window=29, normalize="voxel-zscore | pca:7", fitted=[fitted])
    with pytest.raises(UsageError, match=r"after 'frame-zscore', given were: pca of 'voxel-zscore'"):
        fmristream.StreamingDataset(cohort_url, window=29, normalize="frame-zscore | pca:4", fitted=[fitted])
    scaled = fmristream.fit(training(cohort_url, "voxel-zscore | pca:4", fitted=[fitted]), "cohort-zscore")
    both = outputs(cohort_url, "voxel-zscore | pca:4 | cohort-zscore", split="train", fitted=[fitted, scaled])
    np.testing.assert_allclose(both.std((0, 1)), 1, rtol=1e-4)


@pytest.fixture
def own(cohort_url, tmp_path) -> str:
    shutil.copytree(cohort_url, tmp_path / "dataset")
    return str(tmp_path / "dataset")


def test_an_object_is_kept_with_the_dataset_under_its_digest_and_read_by_others(own):
    fitted = fmristream.fit(training(own), "cohort-robust", name="scale")
    dataset = fmristream.open(own)
    key = save_fitted(fitted, dataset)
    assert key == f"fitted/scale-{fitted.digest[:16]}.safetensors"
    assert save_fitted(fitted, dataset) == key
    for name in ("scale", f"scale-{fitted.digest[:6]}", key.removeprefix("fitted/")):
        again = load_fitted(dataset, name)
        assert encode_fitted(again) == encode_fitted(fitted)
    foreign = load_file(f"{own}/{key}")  # the safetensors package
    np.testing.assert_array_equal(foreign["median"], fitted.values.arrays["median"])
    np.testing.assert_array_equal(
        outputs(own, "cohort-robust", split="val", fitted=[load_fitted(dataset, "scale")]),
        outputs(own, "cohort-robust", split="val", fitted=[fitted]),
    )
    assert fmristream.gc(own).objects == 0
    assert verify(own, deep=True).faults == ()
    assert load_fitted(dataset, "scale").runs == 12
    subjects = {run.subject for run in (dataset.runs[place] for place in range(len(dataset.runs)))}
    text = (Path(own) / key).read_bytes()[:2000].decode("latin-1")
    assert not [label for label in subjects if f'"{label}"' in text]


def test_statistics_that_know_a_withdrawn_subject_go_with_the_purge(own):
    dataset = fmristream.open(own)
    key = save_fitted(fmristream.fit(training(own), "cohort-zscore", name="old"), dataset)
    fmristream.withdraw(own, [dataset.runs[0].subject])
    fmristream.gc(own)
    assert (Path(own) / key).exists()  # the version before can still be opened
    clips = training(own)
    kept = save_fitted(fmristream.fit(clips, "cohort-zscore", name="new"), clips.dataset)
    fmristream.gc(own, purge=True)
    assert not (Path(own) / key).exists()
    assert (Path(own) / kept).exists()


def test_an_object_can_lie_anywhere(own, tmp_path):
    fitted = fmristream.fit(training(own), "cohort-zscore")
    name = save_fitted(fitted, str(tmp_path / "mine"))
    assert load_fitted(str(tmp_path / "mine"), "cohort-zscore").digest == fitted.digest
    assert (tmp_path / "mine" / name).exists()


def test_a_fit_has_the_same_bits_each_time(cohort_url):
    assert fmristream.fit(training(cohort_url), "pca:3").digest == fmristream.fit(training(cohort_url), "pca:3").digest


def test_statistics_of_another_dataset_or_split_are_refused_with_both_values(cohort_url, tmp_path):
    fitted = fmristream.fit(training(cohort_url), "cohort-zscore")
    other = str(tmp_path / "other")
    fmristream.convert(COHORT.replace("subjects=8", "subjects=9"), other, options=ConvertOptions(split="exact"))
    content = fmristream.open(other).content_digest[:12]
    with pytest.raises(
        ResumeError, match=f"fitted to content {fitted.content_digest[:12]}, this dataset has {content}"
    ):
        fmristream.StreamingDataset(other, window=20, normalize="cohort-zscore", fitted=[fitted])
    dataset = fmristream.open(cohort_url)
    moved = Fitted(
        **{name: getattr(fitted, name) for name in Fitted.__dataclass_fields__} | {"split_digest": "ab" * 32}
    )
    now = split_digest(dataset, "train")[:12]
    with pytest.raises(ResumeError, match=f"of digest abababababab, it is {now} now"):
        fmristream.StreamingDataset(dataset, window=20, normalize="cohort-zscore", fitted=[moved])


def test_statistics_of_a_trained_network_are_taken_to_other_data_where_that_is_asked_for(cohort_url, tmp_path):
    fitted = fmristream.fit(training(cohort_url), "cohort-zscore")
    url = str(tmp_path / "other")
    fmristream.convert(COHORT.replace("seed=5", "seed=6"), url, options=ConvertOptions(split="none"))
    with pytest.raises(ResumeError):
        fmristream.StreamingDataset(url, window=29, normalize="cohort-zscore", fitted=[fitted])
    plain = outputs(url, "none", split=None)
    mean, sd = fitted.values.arrays["mean"], fitted.values.arrays["sd"]
    expected = np.where(sd > 0, (plain - mean) / np.where(sd > 0, sd, 1), 0)
    found = outputs(url, "cohort-zscore", split=None, fitted=[fitted], fitted_elsewhere=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_only_training_runs_are_fitted_to(cohort_url):
    for split in (None, "test", "val"):
        clips = fmristream.StreamingDataset(cohort_url, window=20, split=split)
        with pytest.raises(UsageError, match="fitted to the split 'train', these clips are of"):
            fmristream.fit(clips, "cohort-zscore")


def test_a_dataset_without_a_split_is_fitted_to_whole(tmp_path):
    volumes = brain_like(frames=20, voxels=60).T.reshape(5, 4, 3, 20)
    url = converted(tmp_path, {"1": np.asfortranarray(volumes)})
    clips = fmristream.StreamingDataset(url, window=20)
    assert fmristream.fit(clips, "cohort-minmax").split == ""


@pytest.mark.parametrize("step", ["voxel-zscore", "brainlm-robust | cohort-zscore"])
def test_a_step_that_needs_no_statistics_or_two_is_refused(cohort_url, step):
    with pytest.raises(UsageError, match="expected one step"):
        fmristream.fit(training(cohort_url), step)


def test_a_damaged_or_renamed_object_is_told(cohort_url):
    fitted = fmristream.fit(training(cohort_url), "cohort-minmax")
    data, name = encode_fitted(fitted), fitted.key.removeprefix("fitted/")
    assert decode_fitted(data, name=name, where="here").digest == fitted.digest
    for place in (3, 40, len(data) - 1):
        broken = bytearray(data)
        broken[place] ^= 4
        with pytest.raises(CorruptDataError, match="here: sha256"):
            decode_fitted(bytes(broken), name=name, where="here")
    with pytest.raises(CorruptDataError, match="its name says 0000"):
        decode_fitted(data, name=f"x-{'0' * 16}.safetensors", where="here")


def test_a_name_that_is_not_there_is_refused_with_those_that_are(own):
    dataset = fmristream.open(own)
    with pytest.raises(UsageError, match="called 'x', expected one; there are: none"):
        load_fitted(dataset, "x")
    save_fitted(fmristream.fit(training(own), "cohort-minmax", name="a"), dataset)
    with pytest.raises(UsageError, match="there are: a-"):
        load_fitted(dataset, "x")
    with pytest.raises(UsageError, match="name="):
        fmristream.fit(training(own), "cohort-minmax", name="a/b")


def test_statistics_of_one_condition_are_refused_under_another(cohort_url):
    dataset = fmristream.open(cohort_url)
    subjects = sorted(set(dataset.runs.where("split", "train").column("subject")))
    fold = {"window": 7, "split": "train", "where": f"subject in {subjects[:3]}"}
    fitted = fmristream.fit(fmristream.StreamingDataset(cohort_url, normalize="none", **fold), "cohort-zscore")
    used = {"normalize": "cohort-zscore", "fitted": [fitted]}
    fmristream.StreamingDataset(cohort_url, **fold, **used)
    for where in (None, f"subject in {subjects[3:]}"):
        with pytest.raises(ResumeError, match="another `where`"):
            fmristream.StreamingDataset(cohort_url, **{**fold, "where": where}, **used)


def test_a_split_of_a_filtered_dataset_is_fitted_to(cohort_url):
    dataset = fmristream.open(cohort_url).where("age > 0")
    split = fmristream.split(dataset, by="subject", seed=1)
    fitted = fmristream.fit(fmristream.StreamingDataset(dataset, window=7, split=split.train), "cohort-zscore")
    chosen = {"window": 7, "normalize": "voxel-zscore | cohort-zscore", "fitted": [fitted]}
    assert len(fmristream.StreamingDataset(dataset, split=split.test, **chosen)) > 0
    other = fmristream.split(dataset, by="subject", seed=2)
    for part in (other.test, "test"):
        with pytest.raises(ResumeError, match="they may know test subjects"):
            fmristream.StreamingDataset(dataset, split=part, **chosen)


def test_clips_whose_statistics_see_no_future_are_not_fitted_to(cohort_url):
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", stats="context", context=4)
    with pytest.raises(UsageError, match="without stats"):
        fmristream.fit(clips, "cohort-zscore")


def atlas_on(clips: fmristream.StreamingDataset, *, cut: int) -> Atlas:
    """Two parcels that meet at a plane."""
    run = clips.runs[0]
    labels = np.ones(run.shape, dtype=np.int64)
    labels[cut:] = 2
    return atlas_of_labels(labels, Grid(shape=run.shape, affine=run.affine))


def test_statistics_of_another_atlas_of_the_same_name_are_refused(cohort_url):
    plain = training(cohort_url)
    one, other = ({"mine": atlas_on(plain, cut=cut)} for cut in (4, 5))
    fitted = fmristream.fit(training(cohort_url, "parcels:mine", atlases=one), "cohort-zscore")
    read = decode_fitted(encode_fitted(fitted), name=fitted.key.rpartition("/")[2], where="here")
    for statistics in (fitted, read):
        training(cohort_url, "parcels:mine | cohort-zscore", atlases=one, fitted=[statistics])
        with pytest.raises(ResumeError, match=r"with atlases or statistics [0-9a-f]{16}, here are [0-9a-f]{16}"):
            training(cohort_url, "parcels:mine | cohort-zscore", atlases=other, fitted=[statistics])


def test_components_behind_other_statistics_of_the_same_name_are_refused(cohort_url):
    one, other = (fmristream.fit(training(cohort_url), "cohort-zscore", first_frames=frames) for frames in (None, 9))
    components = fmristream.fit(training(cohort_url, "cohort-zscore", fitted=[one]), "pca:2")
    recipe = "cohort-zscore | pca:2"
    training(cohort_url, recipe, fitted=[one, components])
    with pytest.raises(ResumeError, match="pass the same ones"):
        training(cohort_url, recipe, fitted=[other, components])
