"""Confounds, events and recordings: found by their names, parsed strictly, stored only where they fit their run."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.errors import SourceError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.side_tables import parse_confounds, parse_events, parse_recording
from fmristream.ingest.sources import find_runs
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
        f"{671.153618342538 + row}\t{'n/a' if not row else 0.1 * row}\t{int(row == 0)}\tJo" for row in range(rows)
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
    table, left_out = parse_recording("0.1\t0\n0.2\t1\n", sidecar)
    assert (table.facts, left_out) == ({"sampling_hz": 100.0, "start_s": -22.345}, [])
    assert table.columns["trigger"].tolist() == [0, 1]
    for lacking in sidecar:
        with pytest.raises(SourceError, match="sidecar"):
            parse_recording("0.1\t0\n", {name: value for name, value in sidecar.items() if name != lacking})


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
    assert b"Jo" not in everything
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
