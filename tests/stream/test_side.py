"""Side series of windows: aligned to their frames, NaN where nothing is known, held against nilearn and by hand."""

import gzip
import json
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm.first_level import compute_regressor
from torch.utils.data import DataLoader

import fmristream
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.sampling.clip import Clip
from fmristream.stream.side import (
    Confounds,
    Events,
    ParcelSeries,
    Recording,
    average_in_frames,
    boxcar_regressor,
    canonical_hrf,
    hrf_regressor,
    nearest_to_frames,
    parse_side,
)
from tests.ingest.nifti_files import nifti_bytes
from tests.ingest.source_trees import DERIVATIVE, make
from tests.report.datasets import brain_like

SHAPE = (6, 7, 5, 24)
ATLAS = (np.arange(6 * 7 * 5).reshape(6, 7, 5) // 50).astype("i2")  # parcels 1 to 4, and 0 outside
EVENTS = "onset\tduration\ttrial_type\n1\t4\tface\n9.5\t3\thouse\n20\t0\tface\n"


def confounds(seed: int) -> str:
    values = np.random.default_rng(seed).standard_normal((SHAPE[3], 2))
    lines = [
        "trans_x\trot_x\tlate",
        *(f"{a!r}\t{b!r}\t{'n/a' if row < 3 else row}" for row, (a, b) in enumerate(values.tolist())),
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """Three subjects; the first has everything beside its run, the second confounds alone, the third nothing."""
    folder = tmp_path_factory.mktemp("side")
    stem = "sub-{0}/func/sub-{0}_task-rest"
    pulse = "\n".join(str(float(n)) for n in range(200)) + "\n"
    tree = {
        f"{stem.format(s)}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii": nifti_bytes(
            brain_like(seed=n, shape=SHAPE)
        )
        for n, s in enumerate(("01", "02", "03"))
    }
    tree |= {f"{stem.format(s)}_desc-confounds_timeseries.tsv": confounds(n) for n, s in enumerate(("01", "02"))}
    tree |= {
        f"{stem.format('01')}_events.tsv": EVENTS,
        f"{stem.format('01')}_recording-cardiac_physio.tsv.gz": gzip.compress(pulse.encode()),
        f"{stem.format('01')}_recording-cardiac_physio.json": json.dumps(
            {"SamplingFrequency": 5, "StartTime": -1.0, "Columns": ["pulse"]}
        ),
        "atlas.nii": nifti_bytes(ATLAS[..., None]),
    }
    root = make(folder / "in", DERIVATIVE | tree)
    atlas = folder / "atlas.nii"
    (folder / "in" / "atlas.nii").rename(atlas)
    options = ConvertOptions(mask="none", split="none", atlases=(str(atlas),))
    fmristream.convert(root, str(folder / "out"), options=options)
    return str(folder / "out")


SIDE = [
    "confounds:trans_x,rot_x",
    Confounds(columns=("late",), name="late"),
    "parcels",
    "physio-cardiac:pulse",
    "events:face,house",
    "hrf:face",
]


def test_every_window_carries_its_frames_of_every_series(url):
    clips = fmristream.StreamingDataset(url, window=5, stride=4, side=SIDE, seed=1)
    dataset = clips.dataset
    with fmristream.StreamingLoader(clips, batch_size=4, threads=2) as loader:
        batches = [batch for _ in range(2) for batch in loader]
    shapes = {name: tuple(values.shape[1:]) for name, values in batches[0].side.items()}
    parcels = dataset.parcels(0).values.shape[1]
    assert shapes == {
        "confounds": (5, 2),
        "late": (5,),
        "parcels": (5, parcels),
        "physio-cardiac": (5,),
        "events": (5, 2),
        "hrf": (5,),
    }
    seen = set()
    for batch in batches:
        for row, (name, start) in enumerate(zip(batch.run, batch.start.tolist(), strict=True)):
            seen.add(name)
            frames = slice(start, start + 5)
            here = {key: values[row].numpy() for key, values in batch.side.items()}
            columns = dataset.confounds(name)
            if columns is None:
                assert np.isnan(here["confounds"]).all()
                assert np.isnan(here["late"]).all()
            else:
                expected = np.stack([columns["trans_x"][frames], columns["rot_x"][frames]], 1).astype("f4")
                np.testing.assert_array_equal(here["confounds"], expected)
                np.testing.assert_array_equal(here["late"], columns["late"][frames].astype("f4"))
            np.testing.assert_array_equal(here["parcels"], dataset.parcels(name).values[frames])
            if dataset.events(name) is None:
                assert all(np.isnan(here[key]).all() for key in ("events", "hrf", "physio-cardiac"))
                assert not batch.side_valid["events"][row].any()
            else:
                assert batch.side_valid["events"][row].all()
    assert len(seen) == 3


def test_recordings_and_events_are_aligned_by_time(url):
    clips = fmristream.StreamingDataset(url, window=24, side=SIDE)
    with fmristream.StreamingLoader(clips, batch_size=1) as loader:
        side = {name: values[0].numpy() for name, values in next(iter(loader)).side.items()}
    # Sample n was taken at n / 5 - 1 s: frame 0 holds 5 to 14, frame 1 holds 15 to 24, ... and 200 samples end at 39 s.
    expected = np.array([9.5 + 10 * frame for frame in range(24)])
    expected[19], expected[20:] = 197.0, np.nan
    np.testing.assert_allclose(side["physio-cardiac"], expected)
    face, house = np.zeros(24), np.zeros(24)
    face[:3], face[10] = [0.5, 1, 0.5], 1  # 1 to 5 s, and a moment at 20 s
    house[4:7] = [0.25, 1, 0.25]  # 9.5 to 12.5 s
    np.testing.assert_allclose(side["events"], np.stack([face, house], 1), atol=1e-6)
    assert clips.side.columns["events"] == ("face", "house")


@given(
    tr_s=st.floats(0.5, 3),
    events=st.lists(st.tuples(st.floats(-10, 60), st.floats(0.5, 20)), min_size=0, max_size=5),
)
def test_responses_are_those_of_nilearn(tr_s, events):
    onset, duration = (np.array([event[which] for event in events], dtype=float) for which in (0, 1))
    ours = hrf_regressor(onset, duration, frames=30, tr_s=tr_s)
    if not len(events):
        assert not ours.any()
        return
    times = (np.arange(30) + 0.5) * tr_s
    theirs, _ = compute_regressor(
        np.stack([onset, duration, np.ones(len(onset))]), "spm", times, oversampling=100, min_onset=-30
    )
    # Its grid has steps of tr / 100, at whose ends events begin; its ratio is .167 where SPM has 1 / 6.
    np.testing.assert_allclose(ours, theirs[:, 0], atol=0.012 * max(1, len(events)) * tr_s)


def test_the_response_is_spms():
    times = np.arange(0, 32, 0.001)
    response = canonical_hrf(times)
    assert abs(response.sum() * 0.001 - 1) < 1e-3
    assert abs(times[response.argmax()] - 5) < 0.05
    assert 14 < times[response.argmin()] < 17
    impulse = hrf_regressor(np.array([3.0]), np.array([0.0]), frames=20, tr_s=1.5)
    np.testing.assert_allclose(impulse, canonical_hrf((np.arange(20) + 0.5) * 1.5 - 3), atol=1e-6)
    endless = hrf_regressor(np.array([-50.0]), np.array([500.0]), frames=20, tr_s=1.5)
    np.testing.assert_allclose(endless, 1, atol=1e-3)


@given(
    tr_s=st.sampled_from([0.72, 0.8, 1.5, 2.0]),
    rate=st.sampled_from([0.3, 10.0, 50.0, 400.0]),
    start=st.floats(-5, 5),
    rows=st.integers(0, 400),
    seed=st.integers(0, 99),
)
def test_samples_are_averaged_in_their_frames_and_found_near_the_middle(tr_s, rate, start, rows, seed):
    values = np.random.default_rng(seed).standard_normal(rows)
    values[values > 2] = np.nan
    times = {"sampling_hz": rate, "start_s": start, "frames": 9, "tr_s": tr_s}
    averaged, near = average_in_frames(values, **times), nearest_to_frames(values, **times)
    at = start + np.arange(rows) / rate
    for frame in range(9):
        inside = values[(at >= frame * tr_s - 1e-9) & (at < (frame + 1) * tr_s - 1e-9)]
        inside = inside[np.isfinite(inside)]
        np.testing.assert_allclose(averaged[frame], inside.mean() if len(inside) else np.nan, rtol=1e-5, atol=1e-6)
        distance = np.abs(at - (frame + 0.5) * tr_s)
        if rows and distance.min() < 0.499 / rate:
            np.testing.assert_equal(near[frame], np.float32(values[distance.argmin()]))
        elif not rows or distance.min() > 0.501 / rate:
            assert np.isnan(near[frame])


def test_a_border_between_frames_belongs_to_the_later_one():
    values = np.arange(30, dtype=float)
    np.testing.assert_allclose(average_in_frames(values, sampling_hz=10, start_s=0, frames=3, tr_s=0.3)[:3], [1, 4, 7])


def test_nobody_knows_where_an_event_without_onset_is():
    onset, duration = np.array([1.0, np.nan]), np.array([1.0, 1.0])
    for regressor in (boxcar_regressor, hrf_regressor):
        assert np.isnan(regressor(onset, duration, frames=3, tr_s=1.0)).all()
        assert np.isnan(regressor(duration, onset, frames=3, tr_s=1.0)).all()
        assert not regressor(onset[:0], duration[:0], frames=3, tr_s=1.0).any()


def test_frames_after_the_end_of_a_run_stay_unknown_and_steps_are_followed(url):
    clips = fmristream.StreamingDataset(url, window=5, side=["confounds:trans_x"])
    columns = clips.dataset.confounds(0)["trans_x"].astype("f4")
    rows = clips.side.empty(1, 6)
    clips.side.read(Clip(run=0, start=14, length=6, step=3), {"confounds": rows["confounds"][0]})
    np.testing.assert_array_equal(rows["confounds"][0], [*columns[[14, 17, 20, 23]], np.nan, np.nan])


def test_text_stands_for_values():
    assert parse_side("confounds:a, b") == Confounds(columns=("a", "b"))
    assert parse_side("parcels:ab12cd34") == ParcelSeries(atlas="ab12cd34")
    assert parse_side("physio-x:p") == Recording(recording="physio-x", columns=("p",))
    assert parse_side("events") == Events()
    assert parse_side("hrf:a") == Events(trial_types=("a",), hrf=True, name="hrf")


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (["confounds"], "expected NAME:COLUMN"),
        (["confounds:trans_q"], "no run has 'trans_q'; there are trans_x"),
        (["events:dog"], "no run has 'dog'"),
        (["physio-respiratory:a"], "no selected run has it"),
        (["confounds:trans_x", "confounds:rot_x"], "one name"),
        ("parcels", "expected a list"),
        (["parcels:00000000"], "no selected run has it"),
    ],
)
def test_series_that_are_not_there_are_refused(url, side, reason):
    with pytest.raises(UsageError, match=reason):
        fmristream.StreamingDataset(url, window=5, side=side)
    with pytest.raises(UsageError, match="'mean' or 'nearest'"):
        Recording(recording="physio", columns=("a",), how="median")


def test_a_run_without_a_repetition_time_has_no_times(url):
    clips = fmristream.StreamingDataset(url, window=5)
    run = replace(clips.runs[0], tr_s=None)
    assert np.isnan(Events().of(clips.dataset, run, ("",))).all()
    assert np.isnan(Recording(recording="physio-cardiac", columns=("pulse",)).of(clips.dataset, run, ("pulse",))).all()


def test_items_carry_side_series_into_other_processes(url):
    clips = fmristream.StreamingDataset(url, window=5, side=SIDE)
    again = pickle.loads(pickle.dumps(clips))
    for name, values in again[0]["side"].items():
        np.testing.assert_array_equal(values, clips[0]["side"][name])


@pytest.mark.full
def test_workers_collate_side_series(url):
    clips = fmristream.StreamingDataset(url, window=5, side=SIDE)
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(clips, batch_size=2, num_workers=1, multiprocessing_context=context)
    batch = next(iter(loader))
    assert torch.equal(batch["side"]["parcels"][1], torch.from_numpy(clips[1]["side"]["parcels"]))
