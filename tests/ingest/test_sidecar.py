"""Of sidecars only what says how a run was acquired is stored, and with the run that it applies to."""

import json
import math

import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sidecar import ALLOWED, allowed, read_sidecar
from fmristream.report.verify import verify
from tests.ingest.nifti_files import nifti_bytes
from tests.ingest.test_convert_resume import Interrupted
from tests.report.datasets import brain_like

# What dcm2niix and HeuDiConv write beside it: names, places, numbers of devices, dates, free text.
IDENTIFYING = {
    "InstitutionName": "St. Elsewhere", "InstitutionAddress": "1 Secret Street", "InstitutionalDepartmentName": "MR",
    "StationName": "SECRET1", "DeviceSerialNumber": "12345", "AcquisitionTime": "12:34:56.789", "AcquisitionDateTime": "1970",
    "PatientName": "Jo Doe", "PatientID": "1", "PatientBirthDate": "19700101", "PatientSex": "F", "PatientWeight": 70,
    "SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.3", "StudyID": "7", "SeriesNumber": 3, "AcquisitionNumber": 1,
    "ProcedureStepDescription": "SECRET", "ProtocolName": "SECRET", "SeriesDescription": "SECRET", "ImageComments": "SECRET",
    "Sources": ["bids:raw:sub-secret"], "RawSources": ["sub-secret"], "ReferencesAndLinks": [], "PulseSequenceDetails": "x",
    "SoftwareVersions": "syngo", "ConversionSoftware": "dcm2niix", "BodyPartExamined": "BRAIN", "TaskDescription": "SECRET",
    "global": {"const": {"PatientName": "Jo"}}, "time": {"samples": {"AcquisitionTime": ["1"]}}, "ReceiveCoilName": "SECRET",
}  # fmt: skip
HOW = {
    "RepetitionTime": 2.0, "EchoTime": [0.01, 0.02], "FlipAngle": 77, "SliceTiming": [0.0, 0.5, 1, 1.5], "TaskName": "rest",
    "PhaseEncodingDirection": "j-", "MagneticFieldStrength": 3, "Manufacturer": "Siemens", "SkullStripped": False,
}  # fmt: skip


def test_what_tells_who_where_or_when_is_not_stored():
    assert not ALLOWED & set(IDENTIFYING)
    assert allowed({**IDENTIFYING, **HOW}) == HOW
    assert allowed(IDENTIFYING) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("TaskName", "rest\nJo Doe"),
        ("TaskName", "a sentence about the day on which Jo Doe was scanned, and by whom"),
        ("TaskName", {"name": "Jo"}),
        ("TaskName", ["rest"]),
        ("TaskName", "\ud800"),
        ("RepetitionTime", "2.0, Jo Doe"),
        ("RepetitionTime", math.nan),
        ("RepetitionTime", math.inf),
        ("RepetitionTime", 19700101123456789),
        ("RepetitionTime", True),
        ("RepetitionTime", None),
        ("RepetitionTime", [2.0]),
        ("SliceTiming", [0.0, "Jo"]),
        ("SliceTiming", [[0.0]]),
        ("SliceTiming", "Jo"),
        ("SkullStripped", "Jo"),
        ("Manufacturer", 3),
    ],
)
def test_a_value_of_another_kind_than_the_field_has_is_not_stored(field, value):
    assert allowed({field: value}) == {}


def test_the_nearer_of_two_sidecars_counts_and_broken_ones_do_not(tmp_path):
    (tmp_path / "near.json").write_text(json.dumps({"EchoTime": 0.03, "PatientName": "Jo"}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "far.json").write_text(json.dumps({"EchoTime": 0.05, "FlipAngle": 90, "RepetitionTime": 2.0}))
    names = ("near.json", "gone.json", "broken.json", "far.json")
    found = read_sidecar([str(tmp_path / name) for name in names])
    assert found == {"EchoTime": 0.03, "FlipAngle": 90, "RepetitionTime": 2.0}


def bids(tmp_path, **near) -> str:
    """Two runs, of which the first has a sidecar of its own beside the one for both."""
    root = tmp_path / "bids"
    for subject in "12":
        (root / f"sub-{subject}" / "func").mkdir(parents=True, exist_ok=True)
        path = root / f"sub-{subject}" / "func" / f"sub-{subject}_task-rest_bold.nii"
        path.write_bytes(nifti_bytes(brain_like(seed=int(subject))))
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    (root / "task-rest_bold.json").write_text(json.dumps({**IDENTIFYING, "FlipAngle": 90, "RepetitionTime": 2.0}))
    (root / "sub-1" / "func" / "sub-1_task-rest_bold.json").write_text(json.dumps({**IDENTIFYING, **HOW, **near}))
    return str(root)


@pytest.mark.parametrize("layout", ["voxels", "volume"])
def test_each_run_has_the_fields_that_apply_to_it(tmp_path, layout):
    url = str(tmp_path / "out")
    options = ConvertOptions(mask="none", split="none", layout=layout)
    source = bids(tmp_path)
    fmristream.convert(source, url, options=options)
    dataset = fmristream.open(url)
    assert dataset.reader("sub-1_task-rest_bold").sidecar == HOW
    assert dataset.reader("sub-2_task-rest_bold").sidecar == {"FlipAngle": 90, "RepetitionTime": 2.0}
    assert verify(url, deep=True, against=source).faults == ()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"PhaseEncodingDirection" in stored
    assert not [word for word in (b"SECRET", b"Jo Doe", b"Elsewhere", b"Institution", b"StationName") if word in stored]


def test_runs_without_a_sidecar_have_none(tmp_path):
    fmristream.convert(
        "synth://?subjects=1&shape=4x4x4&frames=3", str(tmp_path / "out"), options=ConvertOptions(split="none")
    )
    assert fmristream.open(str(tmp_path / "out")).reader(0).sidecar == {}


@pytest.mark.parametrize(("then", "resumed"), [({}, 1), ({"FlipAngle": 12}, 0), ({"PatientName": "Jane"}, 1)])
def test_a_finished_run_is_taken_over_unless_what_is_stored_of_its_sidecar_changed(tmp_path, memory_url, then, resumed):
    options = ConvertOptions(mask="none", split="none")

    def stop(now):
        if now.stage == "converting" and now.runs_done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        fmristream.convert(bids(tmp_path), memory_url, options=options, progress=stop)
    report = fmristream.convert(bids(tmp_path, **then), memory_url, options=options)
    assert (report.resumed, report.runs) == (resumed, 2)
    stored = fmristream.open(memory_url).reader("sub-1_task-rest_bold").sidecar
    assert stored["FlipAngle"] == then.get("FlipAngle", 77)
