"""Recipes through the whole path: NIfTI and tables converted, streamed by windows, placed, batched."""

import pickle

import numpy as np
import pytest
import scipy.signal

import fmristream
from fmristream.errors import SpaceError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import atlas_of_labels
from tests.ingest.nifti_files import nifti_bytes
from tests.ingest.source_trees import DERIVATIVE, make
from tests.signal.array_runs import brain_like, table_of

SHAPE = (5, 4, 3)
FRAMES = 60
MOTION6 = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
LABELS = np.zeros(SHAPE, dtype="<i2")
LABELS[:2], LABELS[2:4, 1:] = 3, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict[str, np.ndarray]:
    """(x, y, z, t) by subject."""
    return {
        str(number): np.asfortranarray(
            brain_like("<i2", frames=FRAMES, voxels=60, seed=number).T.reshape(*SHAPE, FRAMES)
        )
        for number in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def url(tmp_path_factory, source) -> str:
    folder = tmp_path_factory.mktemp("recipes")
    tree: dict[str, str | bytes] = dict(DERIVATIVE)
    for subject, bold in source.items():
        stem = f"sub-{subject}/func/sub-{subject}_task-rest"
        table = table_of(FRAMES, bad=(20, 40), seed=int(subject))
        rows = ["\t".join(table)]
        rows += [
            "\t".join("n/a" if np.isnan(x) else repr(float(x)) for x in row)
            for row in np.stack(list(table.values()), 1)
        ]
        tree[f"{stem}_space-MNI152NLin6Asym_desc-preproc_bold.nii"] = nifti_bytes(bold, scl_slope=0.5, scl_inter=3.0)
        tree[f"{stem}_desc-confounds_timeseries.tsv"] = "\n".join(rows) + "\n"
    (folder / "atlas.nii").write_bytes(nifti_bytes(LABELS))
    options = ConvertOptions(mask="none", split="none", atlases=(str(folder / "atlas.nii"),))
    fmristream.convert(make(folder / "source", tree), str(folder / "dataset"), options=options)
    return str(folder / "dataset")


def courses(bold: np.ndarray) -> np.ndarray:
    """(t, v) scaled."""
    return bold.reshape(-1, FRAMES).T.astype(np.float64) * 0.5 + 3.0


def design(subject: int) -> np.ndarray:
    table = table_of(FRAMES, bad=(20, 40), seed=subject)
    return np.column_stack([np.ones(FRAMES), np.arange(FRAMES), *(table[name] for name in MOTION6)])


@pytest.mark.parametrize("layout", ["items", "batches"])
def test_a_regressed_run_comes_out_as_computed_at_once(url, source, layout):
    text = "detrend | confounds:motion6 | voxel-zscore | clip:2"
    clips = fmristream.StreamingDataset(url, window=12, normalize=text)
    if layout == "items":
        windows = [
            (item["run"], item["start"], item["bold"]) for item in (clips[number] for number in range(len(clips)))
        ]
    else:
        with fmristream.StreamingLoader(clips, batch_size=4, threads=2) as loader:
            windows = [
                (run, int(start), bold.numpy())
                for batch in loader
                for run, start, bold, valid in zip(batch.run, batch.start, batch.bold, batch.valid, strict=True)
                if valid
            ]
    assert len(windows) == 15
    for run, start, bold in windows:
        subject = run.split("_")[0].removeprefix("sub-")
        x, columns = courses(source[subject]), design(int(subject))
        rest = x - columns @ np.linalg.lstsq(columns, x, rcond=None)[0]
        sd = np.where(np.ptp(x, 0) > 0, rest.std(0), 1)
        expected = np.clip(np.where(np.ptp(x, 0) > 0, rest / sd, 0), -2, 2)[start : start + 12]
        np.testing.assert_allclose(bold[0].reshape(-1, 12).T, expected, atol=2e-5)


def test_two_channels_travel_and_are_placed_each_with_its_fill(url):
    clips = fmristream.StreamingDataset(url, window=12, normalize="tff", grid=(7, 6, 5))
    assert clips.channels == 2
    with fmristream.StreamingLoader(clips, batch_size=3) as loader:
        batch = next(iter(loader))
        assert batch.bold.shape == (3, 2, 7, 6, 5, 12)
        for row in range(3):
            fill = clips.fill(clips.dataset.run(batch.run[row]))
            np.testing.assert_array_equal(batch.fill[row], fill)
            assert batch.bold[row, 0, 0, 0, 0, 0] == fill[0] < 0
            assert batch.bold[row, 1, 0, 0, 0, 0] == 0


def test_pooled_windows_have_a_coarser_grid(url, source):
    clips = fmristream.StreamingDataset(url, window=12, normalize="pool:2 | voxel-center")
    assert clips.grid == (3, 2, 2)
    assert clips.voxels == 12
    scaled = source["1"].astype(np.float64) * 0.5 + 3.0
    corner = scaled[2:4, :2, 2:].mean((0, 1, 2))
    np.testing.assert_allclose(clips[0]["bold"][0, 1, 0, 1], (corner - corner.mean())[:12], atol=1e-3)
    np.testing.assert_allclose(clips.affine[:3, :3], clips.runs[0].affine_matrix[:3, :3] * 2)
    np.testing.assert_array_equal(clips.positions, np.arange(12))


def test_parcels_come_packed_from_stored_series_or_from_voxels(url, source, monkeypatch):
    clips = fmristream.StreamingDataset(url, window=12, normalize="parcels | detrend | voxel-zscore")
    assert not clips.has_grid
    with pytest.raises(SpaceError, match="gives 2 values a frame, which have no grid"):
        assert clips.grid
    x = courses(source["1"])
    series = np.stack([x[:, label == LABELS.reshape(-1)].mean(1) for label in (3, 8)], 1)
    expected = scipy.signal.detrend(series, axis=0)
    expected /= expected.std(0)
    with fmristream.StreamingLoader(clips, batch_size=3) as loader:
        batch = next(iter(loader))
        assert batch.packed.shape == (3, 1, 12, 2)
        np.testing.assert_allclose(batch.packed[1, 0], expected[12:24], atol=1e-4)
    atlas = atlas_of_labels(LABELS.astype(np.int64), Grid(shape=SHAPE, affine=clips.runs[0].affine))
    given = fmristream.StreamingDataset(
        url, window=12, normalize="parcels:mine | detrend | voxel-zscore", atlases={"mine": atlas}
    )
    np.testing.assert_allclose(given[0]["packed"], clips[0]["packed"], atol=1e-4)
    places = np.argwhere(LABELS == 8) @ clips.affine[:3, :3].T + clips.affine[:3, 3]
    np.testing.assert_allclose(clips.parcel_centres_mm[1], places.mean(0), atol=1e-6)
    np.testing.assert_allclose(given.parcel_centres_mm, clips.parcel_centres_mm, atol=1e-6)
    assert fmristream.StreamingDataset(url, window=12).parcel_centres_mm is None
    # Stored series are all that is read: voxels may be gone.
    monkeypatch.setattr("fmristream.shards.run_reader.RunReader.read_chunks", None)
    monkeypatch.setattr("fmristream.shards.run_reader.RunReader.read_stored", None)
    fresh = fmristream.StreamingDataset(url, window=12, normalize="parcels | voxel-zscore")
    assert np.isfinite(fresh[0]["packed"]).all()


def test_an_atlas_that_the_runs_lack_is_refused_with_those_they_have(url):
    with pytest.raises(UsageError, match=r"parcels:0123456789: it has parcels of: [0-9a-f]{12}"):
        fmristream.StreamingDataset(url, window=12, normalize="parcels:0123456789")


@pytest.mark.parametrize("stats", ["prefix", "context"])
def test_forecasting_windows_know_their_past_only(url, source, stats):
    clips = fmristream.StreamingDataset(url, window=12, stride=12, normalize="voxel-zscore", stats=stats, context=8)
    for number in (4, 0, 2):
        item = clips[number]
        x = courses(source["1"])
        past = x[item["start"] if stats == "context" else 0 : item["start"] + 8]
        sd = np.where(past.std(0) > 0, past.std(0), 1)
        expected = np.where(past.std(0) > 0, (x[item["start"] : item["start"] + 12] - past.mean(0)) / sd, 0)
        np.testing.assert_allclose(item["bold"][0].reshape(-1, 12).T, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("context", "said"), [(12, "fewer frames than the window"), (2.5, "whole number"), (None, "expected the number")]
)
def test_a_context_that_leaves_nothing_to_predict_is_refused(url, context, said):
    with pytest.raises(UsageError, match=said):
        fmristream.StreamingDataset(url, window=12, stats="context", context=context)


def test_a_recipe_of_a_run_is_made_ready_once_and_kept_under_a_bound(url, monkeypatch):
    reads = []
    from fmristream.shards.run_reader import RunReader

    real = RunReader.read_stored
    monkeypatch.setattr(RunReader, "read_stored", lambda *arguments: reads.append(arguments[1:]) or real(*arguments))
    clips = fmristream.StreamingDataset(url, window=12, normalize="detrend | voxel-zscore")
    for number in (0, 1, 2, 5, 0, 7):
        assert clips[number]["bold"].shape == (1, *SHAPE, 12)
    assert reads == [(0, FRAMES), (0, FRAMES)]


def test_a_dataset_with_a_recipe_travels_to_another_process(url):
    clips = fmristream.StreamingDataset(url, window=12, normalize="detrend | voxel-zscore | clip:3")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clips))[3]["bold"], clips[3]["bold"])


SCRUBBED = [0, 20, 40]
SCRUBS = "confounds:motion6+scrub+steady | voxel-zscore"


def kept_by_hand(batch, step: int = 1) -> np.ndarray:
    starts = batch.start.numpy()[:, None]
    return ~np.isin(starts + step * np.arange(batch.signal.shape[2]), SCRUBBED)


@pytest.mark.parametrize("options", [{}, {"output": "placed"}, {"dtype": "float16"}])
@pytest.mark.parametrize("cut", [{}, {"step": 3}, {"views": "same-run", "seed": 1}, {"window": None}])
def test_batches_say_which_frames_were_scrubbed(url, options, cut):
    clips = fmristream.StreamingDataset(url, normalize=SCRUBS, **{"window": 12, **cut})
    with fmristream.StreamingLoader(clips, batch_size=3, threads=2, **options) as loader:
        batches = list(loader)
    assert any(not batch.frames_kept.all() for batch in batches)
    for batch in batches:
        expected = kept_by_hand(batch, cut.get("step", 1))
        np.testing.assert_array_equal(batch.frames_kept.numpy(), expected)
        np.testing.assert_array_equal(batch.to("cpu").frames_kept.numpy(), expected)
        for view in range(batch.views):
            rows = slice(view * 3, view * 3 + 3)
            np.testing.assert_array_equal(batch.view(view).frames_kept.numpy(), expected[rows])


def test_where_nothing_is_scrubbed_all_frames_are_kept_and_nothing_travels(url):
    clips = fmristream.StreamingDataset(url, window=12, normalize="confounds:motion6 | voxel-zscore")
    with fmristream.StreamingLoader(clips, batch_size=3) as loader:
        batch = next(iter(loader))
    assert batch.kept is None
    assert batch.frames_kept.shape == (3, 12)
    assert batch.frames_kept.all()
    assert "frames_kept" not in clips[0]


def test_members_of_a_mixture_scrub_their_own_frames(url):
    texts = (SCRUBS, "voxel-zscore")
    members = [fmristream.StreamingDataset(url, window=12, normalize=text, seed=1) for text in texts]
    with fmristream.StreamingLoader(fmristream.Mixture([(one, 1) for one in members]), batch_size=6) as loader:
        for batch, _ in zip(loader, range(4), strict=False):
            expected = kept_by_hand(batch) | (batch.source.numpy() == 1)[:, None]
            np.testing.assert_array_equal(batch.frames_kept.numpy(), expected)


def test_a_plain_dataloader_collates_them(url):
    from torch.utils.data import DataLoader

    clips = fmristream.StreamingDataset(url, window=12, normalize=SCRUBS)
    for batch in DataLoader(clips, batch_size=5):
        frames = batch["start"].numpy()[:, None] + np.arange(12)
        np.testing.assert_array_equal(batch["frames_kept"].numpy(), ~np.isin(frames, SCRUBBED))
    views = fmristream.StreamingDataset(url, window=12, normalize=SCRUBS, views="same-run", seed=1)
    assert views.item(0, epoch=1)["frames_kept"].shape == (2, 12)
