"""Confounds, events and recordings: found by their names, parsed strictly, stored only where they fit their run."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.errors import SourceError
from fmristream.ingest.gc import gc
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.side_tables import parse_confounds, parse_events, parse_recording
from fmristream.ingest.sources import find_runs
from fmristream.ingest.withdraw import withdraw
from fmristream.report.verify import verify
from tests.ingest.cohorts import stored
from tests.ingest.nifti_files import nifti_bytes
from tests.ingest.source_trees import DERIVATIVE, RAW, by_key, make
from tests.ingest.test_convert_resume import Interrupted
from tests.report.datasets import SHAPE, brain_like

FRAMES = SHAPE[3]
RUN = nifti_bytes(brain_like())
EVENTS = "onset\tduration\ttrial_type\tresponse\tnotes\n1.5\t2\tword\tJo Doe\tasleep?\n3\tn/a\tn/a\tn/a\tn/a\n"
WHOLE = ConvertOptions(mask="none", split="none")


def confounds(rows: int = FRAMES) -> str:
    lines = ["csf\tcsf_derivative1\tnon_steady_state\tcomment"]
    lines += [
        f"{671.153618342538 + row}\t{'n/a' if not row else 0.1 * row}\t{int(row == 0)}\tJosephine"
        for row in range(rows)
    ]
    return "\n".join(lines) + "\n"


def files_of(root: str, run: str) -> dict[str, str]:
    return {file.name: file.url.removeprefix(f"{root}/") for file in by_key(find_runs(root))[run].side}


def test_confounds_of_a_derivative_are_those_of_its_run_whatever_its_space(tmp_path):
    func = "sub-01/func/sub-01_task-rest"
    tree = {f"{func}_run-{run}_space-MNI_desc-preproc_bold.nii.gz": "" for run in "12"}
    tree |= {f"{func}_run-1_desc-confounds_timeseries.tsv": "x", f"{func}_run-2_desc-confounds_regressors.tsv": "x"}
    tree |= {f"{func}_run-1_desc-motion_timeseries.tsv": "x", f"{func}_run-1_desc-confounds_timeseries.json": "{}"}
    root = make(tmp_path, DERIVATIVE | tree)
    for run, suffix in (("1", "timeseries"), ("2", "regressors")):
        found = files_of(root, f"{func}_run-{run}_space-MNI_desc-preproc_bold.nii.gz")
        assert found == {"confounds": f"{func}_run-{run}_desc-confounds_{suffix}.tsv"}


def test_events_are_inherited_and_the_nearest_counts(tmp_path):
    tree = {
        f"sub-{who}/func/sub-{who}_task-{task}_bold.nii.gz": "" for who in ("01", "02") for task in ("rest", "nback")
    }
    tree |= {
        "task-nback_events.tsv": "x",
        "sub-02/func/sub-02_task-nback_events.tsv": "x",
        "sub-01/sub-01_events.tsv": "x",
    }
    root = make(tmp_path, RAW | tree)
    assert files_of(root, "sub-01/func/sub-01_task-nback_bold.nii.gz") == {"events": "sub-01/sub-01_events.tsv"}
    assert files_of(root, "sub-02/func/sub-02_task-nback_bold.nii.gz") == {
        "events": "sub-02/func/sub-02_task-nback_events.tsv"
    }
    assert files_of(root, "sub-02/func/sub-02_task-rest_bold.nii.gz") == {}


def test_of_two_tables_that_apply_equally_none_is_taken(tmp_path):
    tree = {"sub-01/func/sub-01_task-rest_acq-a_run-1_bold.nii": RUN}
    tree |= {f"sub-01/func/sub-01_task-rest_{which}_events.tsv": EVENTS for which in ("acq-a", "run-1")}
    root = make(tmp_path / "in", RAW | tree)
    report = fmristream.convert(root, str(tmp_path / "out"), options=WHOLE)
    assert any("events are not stored: several files apply equally" in text for text in report.warnings)
    assert fmristream.open(str(tmp_path / "out")).events(0) is None


def test_numbers_keep_every_bit_and_what_is_not_known_is_nan():
    table, left_out = parse_confounds(confounds(), frames=FRAMES)
    assert list(table.columns) == ["csf", "csf_derivative1", "non_steady_state"]
    assert left_out == ["comment"]
    assert table.columns["csf"].tolist() == [671.153618342538 + row for row in range(FRAMES)]
    assert np.isnan(table.columns["csf_derivative1"]).tolist() == [True] + [False] * (FRAMES - 1)


@pytest.mark.parametrize("cell", ["1_000", "٣", "0x1", "inf", "1e999", "1,5", "--1", "true", "1 2"])
def test_a_column_with_anything_but_numbers_is_left_out(cell):
    _, left_out = parse_confounds(f"a\tb\n1\t{cell}\n2\t3\n", frames=2)
    assert left_out == ["b"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no rows"),
        ("a\tb\n", "no rows"),
        ("a\tb\n1\t2\n", "1 rows, the run 2 frames"),
        ("a\tb\n1\t2\n3\n", "different numbers of fields"),
        ("a\ta\n1\t2\n3\t4\n", "column names"),
        ("a\n\x00\nJo\n", "no column of numbers"),
    ],
)
def test_confounds_that_do_not_fit_are_refused(text, reason):
    with pytest.raises(SourceError, match=reason):
        parse_confounds(text, frames=2)


def test_of_events_only_what_bids_defines_and_cannot_name_anybody_is_kept():
    table, left_out = parse_events(EVENTS)
    assert left_out == ["response", "notes"]
    assert table.columns["onset"].tolist() == [1.5, 3]
    assert table.columns["trial_type"] == ["word", None]
    assert np.isnan(table.columns["duration"]).tolist() == [False, True]
    long = "Jo Doe said that the scanner was loud and that the left ear hurt a lot"
    assert parse_events(f"onset\tduration\ttrial_type\n1\t2\t{long}\n")[1] == ["trial_type"]
    with pytest.raises(SourceError, match="lack onset or duration"):
        parse_events("onset\ttrial_type\n1\tword\n")


def test_recordings_say_when_they_were_taken():
    sidecar = {"SamplingFrequency": 100, "StartTime": -22.345, "Columns": ["cardiac", "trigger"]}
    table, left_out = parse_recording("0.1\t0\n0.2\t1\n", sidecar, frames=9)
    assert (table.facts, left_out) == ({"sampling_hz": 100.0, "start_s": -22.345}, [])
    assert table.columns["trigger"].tolist() == [0, 1]
    for lacking in sidecar:
        with pytest.raises(SourceError, match="sidecar"):
            parse_recording("0.1\t0\n", {name: value for name, value in sidecar.items() if name != lacking}, frames=9)


def test_recordings_may_have_a_header_line_and_a_row_a_frame():
    table, _ = parse_recording("alpha\tgaze\n1\t2\n3\t4\n", {}, frames=2)
    assert table.facts == {}
    assert table.columns["alpha"].tolist() == [1, 3]
    named = {"Columns": ["alpha", "gaze"]}
    for text in ("1\t2\n3\t4\n", "alpha\tgaze\n1\t2\n3\t4\n"):
        assert parse_recording(text, named, frames=2)[0].columns["gaze"][0] == 2
    with pytest.raises(SourceError, match="2 rows where the run has 3 frames"):
        parse_recording("alpha\n1\n3\n", {}, frames=3)
    with pytest.raises(SourceError, match="no header line"):
        parse_recording("1\t2\n3\t4\n", {}, frames=1)


@pytest.mark.parametrize(
    "name", ["participant_id", "SubjectID", "birth_date", "Sub", "patientname", "DOB", "e-mail", "Age", "scan date"]
)
def test_columns_that_tell_who_or_when_are_left_out_by_name(name):
    assert parse_confounds(f"csf\t{name}\n1\t7\n2\t8\n", frames=2)[1] == [name]
    sidecar = {"SamplingFrequency": 1, "StartTime": 0, "Columns": ["pulse", name]}
    assert parse_recording("1\t7\n2\t8\n", sidecar, frames=9)[1] == [name]


def test_columns_of_fmriprep_tell_nobody():
    names = [
        *(
            "global_signal",
            "csf_power2",
            "std_dvars",
            "framewise_displacement",
            "a_comp_cor_00",
            "rot_z_derivative1_power2",
        ),
        *(
            "cosine00",
            "motion_outlier12",
            "aroma_motion_1",
            "FramewiseDisplacement",
            "stdDVARS",
            "aCompCor01",
            "edge_comp_03",
        ),
    ]
    text = "\n".join("\t".join(row) for row in (names, ["1"] * len(names), ["2"] * len(names)))
    assert parse_confounds(text, frames=2)[1] == []


def test_a_number_that_stands_in_every_row_is_left_out():
    text = "a\tb\tzero\tone\tgap\n1\t19800101\t0\t1\t4711\n2\t19800101\t0\t1\tn/a\n"
    table, left_out = parse_confounds(text, frames=2)
    assert left_out == ["b", "gap"]
    assert list(table.columns) == ["a", "zero", "one"]


def test_words_of_events_sort_trials():
    rows = "".join(f"{row}\t1\tanswer {row}\n" for row in range(300))
    assert parse_events("onset\tduration\ttrial_type\n" + rows)[1] == ["trial_type"]


@pytest.mark.parametrize(
    ("subject", "kept"), [("S4711", ["onset", "duration"]), ("01", ["onset", "duration", "trial_type"])]
)
def test_the_subjects_label_stands_in_no_column(tmp_path, memory_url, subject, kept):
    events = "onset\tduration\ttrial_type\n1\t2\tface of s4711\n3\t1\tface of x01y\n"
    func = f"sub-{subject}/func/sub-{subject}_task-rest"
    source = make(tmp_path, RAW | {f"{func}_bold.nii": RUN, f"{func}_events.tsv": events})
    fmristream.convert(source, memory_url, options=WHOLE)
    assert list(fmristream.open(memory_url).events(0)) == kept


def test_eye_tracks_features_of_eeg_and_other_recordings_are_found(tmp_path):
    func = "sub-01/func/sub-01_task-rest"
    sampled = json.dumps({"SamplingFrequency": 4, "StartTime": 0, "Columns": ["x", "pupil"]})
    features = "alpha\tbeta\n" + "".join(f"{row}\t{row * 2}\n" for row in range(FRAMES))
    tree = {
        f"{func}_bold.nii": RUN,
        f"{func}_recording-eye1_physio.tsv.gz": gzip.compress(b"1\t2\n3\t4\n"),
        f"{func}_recording-eye1_physio.json": sampled,
        f"{func}_eyetrack.tsv": "1\t2\n3\t4\n",
        f"{func}_eyetrack.json": sampled,
        f"{func}_eeg.tsv": features,
        f"{func}_recording-sweat_features.tsv": features,
    }
    source = make(tmp_path / "in", RAW | tree)
    fmristream.convert(source, str(tmp_path / "out"), options=WHOLE)
    found = fmristream.open(str(tmp_path / "out")).recordings(0)
    assert sorted(found) == ["eeg", "eyetrack", "physio-eye1", "recording-sweat"]
    assert found["eeg"].columns["beta"].tolist() == [row * 2 for row in range(FRAMES)]
    assert found["eyetrack"].facts == {"sampling_hz": 4, "start_s": 0}
    assert verify(str(tmp_path / "out"), deep=True).faults == ()


def test_in_a_plain_folder_tables_are_named_after_their_run(tmp_path):
    tree = {f"scans/{name}.nii": RUN for name in ("a", "b_bold", "c", "d")}
    tree |= {
        "scans/a_confounds.tsv": "x",
        "scans/a_physio.tsv.gz": b"x",
        "scans/a_physio.json": "{}",
        "c_events.tsv": "x",
    }
    tree |= {"scans/b_events.tsv": "x", "scans/d_events.tsv": "x", "scans/d_events.tsv.gz": b"x", "events.tsv": "x"}
    tree |= {"scans/sub-01_task-x_bold.nii": RUN, "scans/sub-01_task-x_desc-confounds_timeseries.tsv": "x"}
    root = make(tmp_path, tree)
    assert files_of(root, "scans/a.nii") == {"confounds": "scans/a_confounds.tsv", "physio": "scans/a_physio.tsv.gz"}
    assert files_of(root, "scans/b_bold.nii") == {"events": "scans/b_events.tsv"}
    assert files_of(root, "scans/c.nii") == {}
    assert files_of(root, "scans/d.nii") == {"events": ""}
    named = "scans/sub-01_task-x_desc-confounds_timeseries.tsv"
    assert files_of(root, "scans/sub-01_task-x_bold.nii") == {"confounds": named}


def test_tables_of_runs_name_tables_beside_them(tmp_path):
    make(tmp_path, {"x/1.nii": RUN, "x/2.nii": RUN, "y/c.tsv": confounds(), "y/p.tsv": "pulse\n1\n2\n"})
    (tmp_path / "y/p.json").write_text(json.dumps({"SamplingFrequency": 2, "StartTime": 1}))
    (tmp_path / "runs.tsv").write_text(
        "path\tsubject\tconfounds\tphysio\nx/1.nii\t1\ty/c.tsv\ty/p.tsv\nx/2.nii\t2\t\tn/a\n"
    )
    report = fmristream.convert(str(tmp_path / "runs.tsv"), str(tmp_path / "out"), options=WHOLE)
    dataset = fmristream.open(str(tmp_path / "out"))
    assert list(dataset.confounds("sub-1")) == ["csf", "csf_derivative1", "non_steady_state"]
    assert dataset.recordings("sub-1")["physio"].facts == {"sampling_hz": 2, "start_s": 1}
    assert dataset.confounds("sub-2") is None
    assert dataset.participants == ()
    assert any("columns left out: comment" in text for text in report.warnings)


def test_motion_of_hcp_runs_is_their_confounds(tmp_path):
    folder = "100307/MNINonLinear/Results/rfMRI_REST1_LR"
    lines = ["".join(f"  {row + column / 8:9.6f}" for column in range(12)) for row in range(FRAMES)]
    tree = {f"{folder}/rfMRI_REST1_LR.nii": RUN, f"{folder}/Movement_Regressors.txt": "\n".join(lines) + "\n"}
    source = make(tmp_path / "in", {name.replace(".nii", ".nii.gz"): data for name, data in tree.items()})
    path = Path(source) / folder / "rfMRI_REST1_LR.nii.gz"
    path.write_bytes(gzip.compress(RUN))
    fmristream.convert(source, str(tmp_path / "out"), options=WHOLE)
    found = fmristream.open(str(tmp_path / "out")).confounds(0)
    assert len(found) == 12
    assert found["rot_x_deg"].tolist() == [row + 3 / 8 for row in range(FRAMES)]


def test_a_withdrawn_subjects_tables_and_sketches_go(tmp_path):
    source, url = a_dataset(tmp_path), tmp_path / "out"
    fmristream.convert(source, str(url), options=ConvertOptions(mask="none", split="none"))
    folders = ("confounds", "events", "recordings", "sketches")
    before = {folder: len(list((url / folder).iterdir())) for folder in folders}
    assert before == {"confounds": 1, "events": 1, "recordings": 1, "sketches": 2}
    assert not [path for path in url.rglob("*") if "01" in path.name and "sub" in path.name]
    withdraw(str(url), ["01"])
    gc(str(url), purge=True)
    after = {folder: len(list((url / folder).iterdir())) if (url / folder).exists() else 0 for folder in folders}
    assert after == {"confounds": 0, "events": 0, "recordings": 0, "sketches": 1}
    assert verify(str(url), deep=True).faults == ()


def a_dataset(tmp_path: Path, **others: str | bytes) -> str:
    func = "sub-01/func/sub-01_task-rest"
    physio = gzip.compress(b"0.25\t0\n0.5\t1\n") + gzip.compress(b"0.75\tn/a\n")
    tree: dict[str, str | bytes] = {
        f"{func}_desc-preproc_bold.nii": RUN,
        "sub-02/func/sub-02_task-rest_desc-preproc_bold.nii": nifti_bytes(brain_like(seed=2)),
        f"{func}_desc-confounds_timeseries.tsv": confounds(),
        f"{func}_events.tsv": EVENTS,
        f"{func}_recording-cardiac_physio.tsv.gz": physio,
        f"{func}_physio.json": json.dumps({"SamplingFrequency": 50, "Columns": ["pulse", "trigger"]}),
        f"{func}_recording-cardiac_physio.json": json.dumps({"StartTime": -1.5}),
    }
    return make(tmp_path / "in", DERIVATIVE | tree | {f"{func}_{name}": text for name, text in others.items()})


@pytest.mark.parametrize("layout", ["voxels", "volume"])
def test_tables_are_stored_with_their_run(tmp_path, layout):
    source, url = a_dataset(tmp_path), str(tmp_path / "out")
    options = ConvertOptions(mask="none", split="none", layout=layout)
    report = fmristream.convert(source, url, options=options)
    dataset = fmristream.open(url)
    assert (
        dataset.confounds(0)["csf"].tolist() == parse_confounds(confounds(), frames=FRAMES)[0].columns["csf"].tolist()
    )
    assert dataset.events(0)["trial_type"] == ["word", None]
    [(name, recording)] = dataset.recordings(0).items()
    assert (name, recording.rows) == ("physio-cardiac", 3)
    assert recording.facts == {"sampling_hz": 50.0, "start_s": -1.5}
    assert recording.columns["pulse"].tolist() == [0.25, 0.5, 0.75]
    assert dataset.confounds(1) is dataset.events(1) is None
    assert dataset.recordings(1) == {}
    assert any("events: columns left out: response, notes" in text for text in report.warnings)
    assert verify(url, deep=True, against=source).faults == ()
    everything = b"".join(stored(url).values())
    assert b"Jo Doe" not in everything
    assert b"Josephine" not in everything
    assert b"asleep" not in everything


def test_without_side_nothing_of_it_is_read_or_stored(tmp_path, memory_url):
    source = a_dataset(tmp_path)
    report = fmristream.convert(
        source, memory_url, options=ConvertOptions(mask="none", split="none", side=False, sketch=False)
    )
    dataset = fmristream.open(memory_url)
    assert dataset.confounds(0) is dataset.events(0) is dataset.sketch(0) is None
    assert not [key for key in stored(memory_url) if key.startswith(("confounds", "events", "recordings", "sketches"))]
    assert not [text for text in report.warnings if "events" in text]


def test_confounds_of_another_length_are_not_stored_and_the_run_is_named(tmp_path, memory_url):
    source = a_dataset(tmp_path, **{"desc-confounds_timeseries.tsv": confounds(FRAMES + 1)})
    report = fmristream.convert(source, memory_url, options=WHOLE)
    assert fmristream.open(memory_url).confounds(0) is None
    [warning] = [text for text in report.warnings if "confounds" in text]
    assert warning == (
        f"sub-01_task-rest_desc-preproc_bold: confounds are not stored: they have {FRAMES + 1} rows, the run {FRAMES} frames"
    )
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("recording-cardiac_physio.tsv.gz", gzip.compress(b"1\t2\n")[:-5]),
        ("recording-cardiac_physio.tsv.gz", b"\x1f\x8bno"),
        ("recording-cardiac_physio.json", "{"),
        ("events.tsv", b"\xff\xfe\x00"),
    ],
    ids=("cut short", "no gzip", "no JSON", "no text"),
)
def test_a_damaged_table_costs_itself_only(tmp_path, memory_url, name, data):
    report = fmristream.convert(a_dataset(tmp_path, **{name: data}), memory_url, options=WHOLE)
    assert any("are not stored" in text for text in report.warnings)
    assert fmristream.open(memory_url).confounds(0) is not None
    assert report.exit_code == 0


@pytest.mark.parametrize(("then", "resumed"), [(confounds(), 1), (confounds().replace("\t0.1", "\t0.2"), 0)])
def test_a_finished_run_is_taken_over_unless_its_tables_changed(tmp_path, memory_url, then, resumed):
    def stop(now):
        if now.stage == "converting" and now.runs_done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        fmristream.convert(a_dataset(tmp_path), memory_url, options=WHOLE, progress=stop)
    source = a_dataset(tmp_path, **{"desc-confounds_timeseries.tsv": then})
    assert fmristream.convert(source, memory_url, options=WHOLE).resumed == resumed
    expected = parse_confounds(then, frames=FRAMES)[0].columns["csf_derivative1"]
    assert np.array_equal(fmristream.open(memory_url).confounds(0)["csf_derivative1"], expected, equal_nan=True)
