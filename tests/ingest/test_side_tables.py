"""Confounds, events and recordings: found by their names, parsed strictly, stored only where they fit their run."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import SourceError
from fmristream.ingest.gc import gc
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.resampling import Resample
from fmristream.ingest.side_tables import parse_confounds, parse_events, parse_recording
from fmristream.ingest.sources import find_runs
from fmristream.ingest.sources.collection import read_collection
from fmristream.ingest.withdraw import withdraw
from fmristream.report.verify import verify
from fmristream.signal.resample import frames_after
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


def withheld(root: str, run: str) -> dict[str, str]:
    return {file.name: file.reason for file in by_key(find_runs(root))[run].side if not file.url}


@pytest.mark.parametrize("other", ["rec-moco", "run-2", "run-10", "dir-AP", "acq-b", "echo-1"])
def test_a_table_with_exactly_the_labels_of_a_run_is_not_inherited_by_another(tmp_path, other):
    func = "sub-a1/func/sub-a1_task-r"
    tree = {f"{func}_bold.nii": "", f"{func}_{other}_bold.nii": ""}
    tree |= {f"{func}_desc-confounds_timeseries.tsv": "x", f"{func}_physio.tsv.gz": b"x", f"{func}_events.tsv": "x"}
    plain = {key.rpartition("/")[2]: content for key, content in tree.items()}
    for root, folder in ((make(tmp_path / "bids", RAW | tree), "sub-a1/func/"), (make(tmp_path / "plain", plain), "")):
        own = files_of(root, f"{folder}sub-a1_task-r_bold.nii")
        assert sorted(own) == ["confounds", "events", "physio"]
        assert all(own.values())
        reasons = withheld(root, f"{folder}sub-a1_task-r_{other}_bold.nii")
        assert set(reasons) == set(own)
        assert {"the table that would apply is called after another run"} == set(reasons.values())


def test_a_run_that_is_left_without_a_table_is_told_and_stores_nothing(tmp_path):
    func = "sub-a1/func/sub-a1_task-r"
    tree = {f"{func}_bold.nii": RUN, f"{func}_run-2_bold.nii": nifti_bytes(brain_like(seed=3))}
    source = make(tmp_path / "in", RAW | tree | {f"{func}_desc-confounds_timeseries.tsv": confounds()})
    report = fmristream.convert(source, str(tmp_path / "out"), options=WHOLE)
    dataset = fmristream.open(str(tmp_path / "out"))
    assert dataset.confounds("sub-a1_task-r_bold") is not None
    assert dataset.confounds("sub-a1_task-r_run-2_bold") is None
    assert any("_run-2_bold: confounds are not stored: the table that would apply" in text for text in report.warnings)


def test_forms_of_one_scan_share_what_was_measured_and_higher_folders_are_inherited(tmp_path):
    func = "sub-01/ses-1/func/sub-01_ses-1_task-r"
    forms = [f"{func}{form}_desc-preproc_bold.nii" for form in ("_space-T1w", "_space-MNI", "_space-MNI_res-2")]
    tree = dict.fromkeys([*forms, f"{func}_run-2_space-MNI_desc-preproc_bold.nii"], "")
    tree |= {f"{func}_desc-confounds_timeseries.tsv": "x", "sub-01/sub-01_task-r_physio.tsv.gz": b"x"}
    tree |= {"task-r_events.tsv": "x"}
    root = make(tmp_path, DERIVATIVE | tree)
    shared = {"events": "task-r_events.tsv", "physio": "sub-01/sub-01_task-r_physio.tsv.gz"}
    for form in forms:
        assert files_of(root, form) == shared | {"confounds": f"{func}_desc-confounds_timeseries.tsv"}
    assert files_of(root, f"{func}_run-2_space-MNI_desc-preproc_bold.nii") == shared | {"confounds": ""}


def test_echoes_without_a_run_of_their_own_labels_share_a_table(tmp_path):
    func = "sub-01/func/sub-01_task-r"
    root = make(tmp_path, RAW | {f"{func}_echo-{echo}_bold.nii": "" for echo in "12"} | {f"{func}_events.tsv": "x"})
    for echo in "12":
        assert files_of(root, f"{func}_echo-{echo}_bold.nii") == {"events": f"{func}_events.tsv"}


def test_labels_of_run_compare_as_numbers_unless_spelling_tells_two_apart(tmp_path):
    func = "sub-01/func/sub-01_task-r"
    tree = {f"{func}_run-{run}_bold.nii": "" for run in ("01", "2", "002", "10")}
    tree |= {f"{func}_run-{run}_events.tsv": "x" for run in ("1", "002", "010")}
    root = make(tmp_path, RAW | tree)
    found = {run: files_of(root, f"{func}_run-{run}_bold.nii") for run in ("01", "2", "002", "10")}
    assert found["01"] == {"events": f"{func}_run-1_events.tsv"}
    assert found["002"] == {"events": f"{func}_run-002_events.tsv"}
    assert found["2"] == {"events": ""}
    assert found["10"] == {"events": f"{func}_run-010_events.tsv"}


def test_in_a_plain_folder_the_run_whose_whole_name_stands_in_a_tables_takes_it(tmp_path):
    tree = {f"{name}": RUN for name in ("scan.nii", "scan_bold.nii", "two.nii", "two.hdr", "sub-a1.nii")}
    tree |= {"sub-a1_run-2.nii": RUN, "sub-b_rest1.nii": RUN, "sub-b_rest2.nii": RUN}
    tree |= {f"{stem}_confounds.tsv": "x" for stem in ("scan", "two")}
    tree |= {"sub-a1_events.tsv": "x", "sub-b_events.tsv": "x", "scan_bold_events.tsv": "x"}
    root = make(tmp_path, tree)
    assert files_of(root, "scan.nii") == {"confounds": "scan_confounds.tsv"}
    assert files_of(root, "scan_bold.nii") == {"confounds": "", "events": "scan_bold_events.tsv"}
    assert files_of(root, "sub-a1.nii") == {"events": "sub-a1_events.tsv"}
    assert files_of(root, "sub-a1_run-2.nii") == {"events": ""}
    for run, table in (("two.nii", "confounds"), ("two.hdr", "confounds"), ("sub-b_rest1.nii", "events")):
        assert withheld(root, run) == {table: "the table may be called after any of several runs"}


def test_tables_of_grayordinates_in_a_plain_folder_are_found(tmp_path):
    tree = {"P1/scan.dtseries.nii": "", "P1/scan_confounds.tsv": "x", "P2/a.dtseries.nii": "", "P2/a.nii": ""}
    root = make(tmp_path, tree | {"P2/a_events.tsv": "x", "P2/b.dtseries.nii": "", "P2/b.dtseries_events.tsv": "x"})
    found = by_key(find_runs(root, cifti=True))
    told = {key: {file.name: file.url.removeprefix(f"{root}/") for file in run.side} for key, run in found.items()}
    assert told == {
        "P1/scan.dtseries.nii": {"confounds": "P1/scan_confounds.tsv"},
        "P2/a.dtseries.nii": {"events": "P2/a_events.tsv"},
        "P2/b.dtseries.nii": {"events": "P2/b.dtseries_events.tsv"},
    }


@pytest.mark.parametrize(
    ("folder", "stem"),
    [
        ("100307/MNINonLinear/Results/rfMRI_REST1_LR", "rfMRI_REST1_LR_Atlas_MSMAll_hp2000_clean"),
        ("100307/MNINonLinear/Results/tfMRI_WM_RL", "tfMRI_WM_RL_Atlas_MSMAll"),
        ("HCA6000000_V1_MR/MNINonLinear/Results/rfMRI_REST1_AP", "rfMRI_REST1_AP_Atlas_MSMAll_hp0_clean"),
        ("HCD0000000_V1_MR/MNINonLinear/Results/tfMRI_GUESSING_PA", "tfMRI_GUESSING_PA_Atlas_MSMAll"),
    ],
)
def test_motion_of_hcp_runs_is_the_confounds_of_their_grayordinates_too(tmp_path, folder, stem):
    volume = folder.rpartition("/")[2]
    tree = {f"{folder}/{stem}.dtseries.nii": "", f"{folder}/{volume}.nii.gz": ""}
    root = make(tmp_path, tree | {f"{folder}/Movement_Regressors.txt": "x"})
    for cifti in (False, True):
        (run,) = find_runs(root, cifti=cifti).runs
        assert run.url.endswith(".dtseries.nii") is cifti
        assert [(file.name, len(file.columns)) for file in run.side] == [("confounds", 12)]


def test_every_pattern_of_hcp_names_the_table_of_motion():
    for kind in ("hcp-ya", "hcp-lifespan"):
        assert {pattern.confounds for pattern in read_collection(kind).runs} == {("{folder}/Movement_Regressors.txt",)}
        assert {len(pattern.confounds_columns) for pattern in read_collection(kind).runs} == {12}


@pytest.mark.parametrize(
    ("wanted", "stays"),
    [
        (Resample(tr_s=1.99), False),
        (Resample(tr_s=1.7), False),
        (Resample(tr_s=2.0, voxel_mm=5.0), True),
        (Resample(voxel_mm=5.0), True),
    ],
)
def test_tables_of_a_resampled_run_are_compared_with_its_source(tmp_path, wanted, stays):
    func = "sub-01/func/sub-01_task-rest"
    by_frame = "alpha\n" + "".join(f"{row}\n" for row in range(FRAMES))
    tree = {
        f"{func}_bold.nii": RUN,
        f"{func}_desc-confounds_timeseries.tsv": confounds(),
        f"{func}_events.tsv": EVENTS,
        f"{func}_eeg.tsv": by_frame,
        f"{func}_physio.tsv": "\n".join(map(str, range(FRAMES))),
        f"{func}_physio.json": json.dumps({"SamplingFrequency": 4, "StartTime": 0, "Columns": ["pulse"]}),
    }
    source, url = make(tmp_path / "in", RAW | tree), str(tmp_path / "out")
    report = fmristream.convert(source, url, options=replace(WHOLE, tr_s=2.0, resample=wanted))
    dataset = fmristream.open(url)
    assert (dataset.runs[0].tr_s, "resampling" in dataset.parameters) == (wanted.tr_s or 2.0, True)
    assert (dataset.confounds(0) is not None) is stays
    assert sorted(dataset.recordings(0)) == (["eeg", "physio"] if stays else ["physio"])
    assert dataset.events(0)["onset"].tolist() == [1.5, 3]
    why = "not stored: they have one row for each of the source's frames, and the run was resampled in time"
    assert sum(why in text for text in report.warnings) == (0 if stays else 2)
    assert verify(url, deep=True, against=source).faults == ()


def test_a_table_that_fits_the_resampled_run_and_not_its_source_is_refused(tmp_path):
    stored_frames = frames_after(FRAMES, 2.0, 1.7)
    assert stored_frames != FRAMES
    tree = {"scan.nii": RUN, "scan_confounds.tsv": confounds(stored_frames)}
    source = make(tmp_path / "in", tree)
    options = replace(WHOLE, tr_s=2.0, resample=Resample(tr_s=1.7))
    report = fmristream.convert(source, str(tmp_path / "out"), options=options)
    assert any(f"they have {stored_frames} rows, the run {FRAMES} frames" in text for text in report.warnings)


def test_a_corrected_table_is_not_said_to_be_what_is_stored(tmp_path, capsys):
    source, url = a_dataset(tmp_path), str(tmp_path / "out")
    words = ["convert", source, url, "--mask", "none", "--split", "none"]
    assert main([*words, "--quiet"]) == 0
    table = tmp_path / "in/sub-01/func/sub-01_task-rest_desc-confounds_timeseries.tsv"
    table.write_text(confounds().replace("671.", "672."))
    capsys.readouterr()
    for more in ([], ["--update", "all"]):
        assert main([*words, *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "already (tables beside the runs were not compared); nothing was written" in said
    (tmp_path / "in/sub-02/func/sub-02_task-rest_desc-preproc_bold.nii").write_bytes(nifti_bytes(brain_like(seed=5)))
    assert main([*words, "--update", "all"]) == 0
    assert "whose image did not change were not compared" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("more", [[], ["--no-side"]])
def test_where_no_table_could_differ_nothing_is_said_of_them(tmp_path, capsys, more):
    tree = {"a.nii": RUN} | ({"a_confounds.tsv": confounds()} if more else {})
    words = ["convert", make(tmp_path / "in", tree), str(tmp_path / "out"), "--mask", "none", "--split", "none", *more]
    assert main(words) == main(words) == 0
    said = capsys.readouterr().out
    assert "holds exactly this already; nothing was written" in " ".join(said.split())
    assert "compared" not in said
