"""Names that programs and standards give are known, and names that people give are not."""

import pytest

from fmristream.ingest.sources.collection import known_collections
from fmristream.ingest.vocabulary import is_confound, is_recording, is_signal, is_text

FRAMES = 200


@pytest.mark.parametrize(
    "name",
    [
        "csf", "csf_wm", "white_matter_derivative1", "global_signal_power2", "rot_z_derivative1_power2", "trans_x",
        "framewise_displacement", "rmsd", "dvars", "std_dvars", "a_comp_cor_00", "c_comp_cor_01", "t_comp_cor_02",
        "w_comp_cor_199", "edge_comp_03", "cosine00", "non_steady_state_outlier00", "motion_outlier12", "aroma_motion_1",
        "FramewiseDisplacement", "aCompCor01", "stdDVARS",
    ],
)  # fmt: skip
def test_confounds_of_fmriprep_are_known(name):
    assert is_confound(name, frames=FRAMES)


def test_confounds_of_collections_are_known():
    names = {name for one in known_collections().values() for pattern in one.runs for name in pattern.confounds_columns}
    assert len(names) == 12
    assert all(is_confound(name, frames=FRAMES) for name in names)


@pytest.mark.parametrize(
    "name",
    [
        "csf_S77",
        "S77",
        "ann",
        "CSF ",
        "csf\n",
        "a_comp_cor_0132x",
        "motion_outlier4711",
        "a_comp_cor_٣",
        "rot_x_ann",
        "",
    ],
)
def test_other_columns_of_confounds_are_not(name):
    assert not is_confound(name, frames=FRAMES)


@pytest.mark.parametrize("label", ["eyetracking", "breathing", "ECG", "eye1", "co2", "100hz"])
def test_recordings_are_known_by_what_they_record(label):
    assert is_recording(label)


@pytest.mark.parametrize("label", ["Anna7", "seen0132", "ecg77", "ecgAnn", "0132", "1", "9041000hz", "eye+1", ""])
def test_other_recordings_are_not(label):
    assert not is_recording(label)


def test_signals_are_known_by_name():
    assert all(
        map(is_signal, ("cardiac", "respiratory", "trigger", "x_coordinate", "y_coordinate", "pupil_size", "timestamp"))
    )
    assert not any(map(is_signal, ("cardiac_S77", "ann", "S77", "", "cardiac\n")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("PhaseEncodingDirection", "j-"),
        ("SliceEncodingDirection", "k"),
        ("MRAcquisitionType", "2D"),
        ("Manufacturer", "SIEMENS"),
    ],
)
def test_texts_of_closed_vocabularies_are_known(field, value):
    assert is_text(field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("PhaseEncodingDirection", "Kowalski"), ("PhaseEncodingDirection", "j--"), ("Manufacturer", "Siemens of Jan Nowak"),
        ("Manufacturer", "j-"), ("TaskName", "rest"), ("ScanningSequence", "Kowalski"), ("MRAcquisitionType", "2D Jo"),
    ],
)  # fmt: skip
def test_other_texts_are_not(field, value):
    assert not is_text(field, value)
