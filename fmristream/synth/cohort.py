"""A synthetic cohort as a value: a few numbers say everything, and any frame of any run can be made from them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fmristream.errors import UsageError
from fmristream.synth.anatomy import brain_mask
from fmristream.synth.bold import RunKey, Scan, bold_frames, motion_mm
from fmristream.synth.courses import MAX_STRENGTH, Effect, Timing
from fmristream.synth.dummy import dummy_frames
from fmristream.synth.subject import age_of, sex_of, standard_age
from fmristream.synth.url import read_url, write_url

KINDS = ("bold", "dummy")
DTYPES = ("int16", "uint16", "int32", "float32", "float64")
# The centre of the MNI152NLin2009cAsym grid in its own coordinates.
TEMPLATE_CENTRE_MM = (0.0, -18.0, 18.0)
# The span of the 24 voxels of 8 mm that are the default; in a URL other grids cover the same head.
FIELD_OF_VIEW_MM = 192.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Subjects, how they were scanned, and what sex and age do to their brains (see courses.py).

    A run depends on the seed, its subject and its number, not on how many others there are. Runs are counted from 0
    here, and from 1 in names. The kind "dummy" is plain noise of any shape with labels that mean nothing.
    """

    subjects: int = 8
    runs: int = 1
    shape: tuple[int, int, int] = (24, 24, 24)
    frames: int = 60
    tr_s: float = 2.0
    voxel_size_mm: float = 8.0
    seed: int = 0
    effect: str = "none"
    strength: float = 1.6
    dtype: str = "int16"
    masked: bool = True
    kind: str = "bold"

    def __post_init__(self) -> None:
        _check(self)

    def subject_labels(self) -> list[str]:
        """0001, 0002, …"""
        return [f"{number:04d}" for number in range(1, self.subjects + 1)]

    def participants(self) -> list[dict[str, str | float]]:
        """One row per subject: subject, sex (F or M) and age in years."""
        return [
            {"subject": label, "sex": sex_of(self.seed, subject), "age": age_of(self.seed, subject)}
            for subject, label in enumerate(self.subject_labels())
        ]

    def affine(self) -> npt.NDArray[np.float64]:
        """4 × 4, voxel to template mm; the grid is centred where the template's is."""
        affine = np.diag([self.voxel_size_mm] * 3 + [1.0])
        affine[:3, 3] = np.array(TEMPLATE_CENTRE_MM) - self.voxel_size_mm * (np.array(self.shape) - 1) / 2
        return affine

    def brain_mask(self) -> npt.NDArray[np.bool_]:
        """(x, y, z), the same for all subjects; a dummy is brain throughout."""
        if self.kind == "dummy":
            return np.ones(self.shape, dtype=np.bool_, order="F")
        return brain_mask(self.shape).T

    def run_frames(self, subject: int, run: int) -> Iterator[npt.NDArray[Any]]:
        """The frames of one run, (x, y, z) in Fortran order, each its own array."""
        key = self._key(subject, run)
        if self.kind == "dummy":
            return dummy_frames(key, shape=self.shape, frames=self.frames, dtype=np.dtype(self.dtype))
        return bold_frames(self._scan(), self._effect(subject), key)

    def motion_mm(self, subject: int, run: int) -> npt.NDArray[np.float32]:
        """(3, frame): displacement of the head in one run; a dummy has no head."""
        key = self._key(subject, run)
        if self.kind == "dummy":
            return np.zeros((3, self.frames), dtype=np.float32)
        return motion_mm(self._scan(), self._effect(subject), key)

    def url(self) -> str:
        """The synth:// URL of this cohort, the same for equal cohorts."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        fitting = {"voxel_size_mm": _fitting_voxel_size_mm(self.shape)}
        return write_url(values, _DEFAULTS | fitting)

    def _scan(self) -> Scan:
        return Scan(
            shape=self.shape,
            timing=Timing(frames=self.frames, tr_s=self.tr_s),
            voxel_size_mm=self.voxel_size_mm,
            dtype=np.dtype(self.dtype),
            brain_only=self.masked,
        )

    def _effect(self, subject: int) -> Effect:
        return Effect(
            kind=self.effect,
            strength=self.strength,
            sex=1.0 if sex_of(self.seed, subject) == "M" else -1.0,
            age=standard_age(age_of(self.seed, subject)),
        )

    def _key(self, subject: int, run: int) -> RunKey:
        if not (0 <= subject < self.subjects and 0 <= run < self.runs):
            raise UsageError(
                f"run {run} of subject {subject} is not in a cohort of {self.subjects} subjects with {self.runs} "
                "runs each; both are counted from 0"
            )
        return RunKey(seed=self.seed, subject=subject, run=run)


def parse_url(url: str) -> Cohort:
    """The cohort of a synth:// URL; what it does not say has its default.

    The voxel size defaults to whatever lets the longest side of the grid span 192 mm.
    """
    values = read_url(url, _DEFAULTS)
    values.setdefault("voxel_size_mm", _fitting_voxel_size_mm(values.get("shape", _DEFAULTS["shape"])))
    return Cohort(**values)


def _fitting_voxel_size_mm(shape: tuple[int, ...]) -> float:
    return FIELD_OF_VIEW_MM / max(1, *shape)


def _check(cohort: Cohort) -> None:
    positive = {"subjects": cohort.subjects, "runs": cohort.runs, "frames": cohort.frames}
    positive |= {f"shape[{axis}]": size for axis, size in enumerate(cohort.shape)}
    for name, count in positive.items():
        if count < 1:
            raise UsageError(f"a synthetic cohort has {name} = {count}, expected 1 or more")
    if len(cohort.shape) != 3:
        raise UsageError(f"a synthetic cohort has shape {cohort.shape}, expected three sizes, as in 24x24x24")
    for name, length in {"tr_s": cohort.tr_s, "voxel_size_mm": cohort.voxel_size_mm}.items():
        if not (np.isfinite(length) and length > 0):
            raise UsageError(f"a synthetic cohort has {name} = {length}, expected a positive number")
    if cohort.seed < 0:
        raise UsageError(f"a synthetic cohort has seed = {cohort.seed}, expected 0 or more")
    choices = {
        "effect": (cohort.effect, tuple(MAX_STRENGTH)),
        "dtype": (cohort.dtype, DTYPES),
        "kind": (cohort.kind, KINDS),
    }
    for name, (chosen, known) in choices.items():
        if chosen not in known:
            raise UsageError(f"a synthetic cohort has {name} = {chosen!r}, expected one of {', '.join(known)}")
    if cohort.kind == "dummy" and cohort.effect != "none":
        raise UsageError(f"a dummy cohort is noise and has no effect {cohort.effect}; leave it out or take kind = bold")
    limit = MAX_STRENGTH[cohort.effect]
    if not 0 <= cohort.strength <= limit:
        raise UsageError(
            f"a synthetic cohort has strength = {cohort.strength}, expected 0 to {limit} for the effect {cohort.effect}"
        )


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Cohort)}
