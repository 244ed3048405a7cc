"""What is stored of BIDS sidecars: how a run was acquired, by a list of fields; nothing about who, where or when.

Converters of DICOM leave names of institutions and stations, serial numbers and dates in sidecars. So fields are allowed one
by one, and of these only values of their kind: numbers, and words as short as names of methods are. Where subjects have
pseudonyms, words are those of the vocabulary only: a field for a name of a method can hold anybody's.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fmristream.errors import SourceError
from fmristream.ingest.sources.texts import read_json_object
from fmristream.ingest.vocabulary import is_text

_NUMBERS = (
    "AcquisitionDuration", "DelayAfterTrigger", "DelayTime", "DwellTime", "EchoTime", "EchoTime1", "EchoTime2",
    "EchoTrainLength", "EffectiveEchoSpacing", "FlipAngle", "InversionTime", "MagneticFieldStrength",
    "MultibandAccelerationFactor", "NumberOfVolumesDiscardedByScanner", "NumberOfVolumesDiscardedByUser",
    "NumberShots", "ParallelReductionFactorInPlane", "ParallelReductionFactorOutOfPlane", "PartialFourier",
    "PixelBandwidth", "RepetitionTime", "RepetitionTimeExcitation", "RepetitionTimePreparation", "SliceThickness",
    "SpacingBetweenSlices", "StartTime", "TotalReadoutTime",
)  # fmt: skip
_LISTS = ("EchoTime", "FlipAngle", "SliceTiming", "VolumeTiming")
_FLAGS = ("MTState", "NonlinearGradientCorrection", "SkullStripped", "SliceTimingCorrected", "SpoilingState")
_WORDS = (
    "MRAcquisitionType", "Manufacturer", "ManufacturersModelName", "MatrixCoilMode", "PartialFourierDirection",
    "ParallelAcquisitionTechnique", "PhaseEncodingDirection", "PulseSequenceType", "ScanOptions", "ScanningSequence",
    "SequenceVariant", "SliceEncodingDirection", "SpoilingType", "TaskName",
)  # fmt: skip

ALLOWED = frozenset((*_NUMBERS, *_LISTS, *_FLAGS, *_WORDS))

# The longest names of scanners and sequences have some 30 letters; sentences have more.
_MAX_LETTERS = 64
# A slice timing has one number a slice, a volume timing one a frame.
_MAX_NUMBERS = 100_000


def read_sidecar(urls: Iterable[str], *, is_pseudonymous: bool = False) -> dict[str, Any]:
    """The allowed fields that apply to a run, by the inheritance principle: of two, the nearer sidecar's.

    A sidecar that cannot be read as JSON counts as none: the listing of the source has said so.

    Args:
        urls: the sidecars that apply, nearest first.
        is_pseudonymous: whether nobody's label or name is to stand in them.

    Raises:
        StorageError: a remote store failed.
    """
    merged: dict[str, Any] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        try:
            found = read_json_object(folder, name)
        except SourceError:
            continue
        for field, value in found.items():
            merged.setdefault(field, value)
    return allowed(merged, is_pseudonymous=is_pseudonymous)


def allowed(sidecar: Mapping[str, Any], *, is_pseudonymous: bool = False) -> dict[str, Any]:
    """The fields of a sidecar that may be stored, in order of name."""
    return {
        name: sidecar[name]
        for name in sorted(sidecar)
        if name in ALLOWED
        and _is_of_its_kind(name, sidecar[name])
        and not (is_pseudonymous and isinstance(sidecar[name], str) and not is_text(name, sidecar[name]))
    }


def _is_of_its_kind(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name in _FLAGS
    if isinstance(value, str):
        return name in _WORDS and len(value) <= _MAX_LETTERS and value.isprintable()
    if isinstance(value, list):
        return name in _LISTS and len(value) <= _MAX_NUMBERS and all(_is_number(item) for item in value)
    return name in _NUMBERS and _is_number(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) < 1e15  # longer ones are no measurements
