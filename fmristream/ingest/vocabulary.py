"""Names that may be stored beside runs whose subjects have pseudonyms: those that programs and standards give, no others.

Whoever reads a table beside a run knows neither everybody's label nor everybody's name, so that nothing can be searched for
them. A name that stands here was not made up for a person.
"""

import re

# fMRIPrep's confounds, "Outputs of fMRIPrep" in its documentation; with units those of our descriptions of HCP.
_CONFOUND = re.compile(
    r"(?:trans_[xyz](?:_mm)?|rot_[xyz](?:_deg)?|csf|white_matter|csf_wm|global_signal)(?:_derivative1)?(?:_power2)?"
    r"|framewise_displacement|rmsd|dvars|std_dvars"
    # of its releases before 1.2
    r"|CSF|WhiteMatter|GlobalSignal|stdDVARS|non-stdDVARS|vx-wisestdDVARS|FramewiseDisplacement|X|Y|Z|Rot[XYZ]"
)
_NUMBERED_CONFOUND = re.compile(
    r"(?:[actw]_comp_cor_|edge_comp_|cosine_?|non_steady_state_outlier_?|motion_outlier_?|aroma_motion_"
    r"|[at]CompCor|Cosine|NonSteadyStateOutlier|AROMAAggrComp)(?P<number>[0-9]{1,4})"
)

# Columns that BIDS defines (physiological recordings, eye tracks), and what others call the same signals.
_SIGNALS = frozenset((
    "cardiac", "respiratory", "trigger", "timestamp", "x_coordinate", "y_coordinate", "pupil_size",
    "co2", "ecg", "eda", "emg", "eog", "gsr", "o2", "ppg", "pulse", "resp", "respiration", "scr", "time", "ventilation",
    "delta", "theta", "alpha", "sigma", "beta", "gamma",
))  # fmt: skip
# Labels of recordings: the signals, and what the examples of BIDS call files of them.
_RECORDINGS = _SIGNALS | {
    "breathing",
    "eye",
    "eyetracking",
    "gaze",
    "movie",
    "physio",
    "pupil",
    "scanner",
    "sound",
    "video",
}
_RATE = re.compile(r"[0-9]{2,4}hz")

_AXES = frozenset(axis + sign for axis in "ijk" for sign in ("", "-"))
_TEXTS = {
    "MRAcquisitionType": frozenset({"2d", "3d"}),
    "PhaseEncodingDirection": _AXES,
    "SliceEncodingDirection": _AXES,
    "Manufacturer": frozenset((
        "agilent", "bruker", "bruker biospin", "bruker biospin mri gmbh", "canon", "canon_mec", "canon medical systems", "ge",
        "ge healthcare", "ge medical systems", "ge_medical_systems", "hitachi", "hitachi medical corporation", "philips",
        "philips healthcare", "philips medical systems", "siemens", "siemens healthcare", "siemens healthineers",
        "toshiba", "toshiba_mec", "uih", "united imaging", "united imaging healthcare", "varian",
    )),
}  # fmt: skip


def is_confound(name: str, *, frames: int) -> bool:
    """Whether a column of confounds is called as fMRIPrep calls its own.

    Args:
        name: of the column.
        frames: of the run: components and outliers are never more, so that a larger number is something else.
    """
    numbered = _NUMBERED_CONFOUND.fullmatch(name)
    return int(numbered["number"]) < frames if numbered else _CONFOUND.fullmatch(name) is not None


def is_signal(name: str) -> bool:
    """Whether a column of a recording is called as such signals are."""
    return name.lower() in _SIGNALS


def is_recording(label: str) -> bool:
    """Whether a label of recordings says what was recorded, perhaps with one digit, or at what rate (`1000hz`)."""
    folded = label.lower()
    return folded in _RECORDINGS or re.sub("[0-9]$", "", folded) in _RECORDINGS or _RATE.fullmatch(folded) is not None


def is_text(field: str, value: str) -> bool:
    """Whether a text of a sidecar is one of the few that its field may have."""
    return value.lower() in _TEXTS.get(field, ())
