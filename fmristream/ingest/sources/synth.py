"""Synthetic cohorts as a source: `synth://?subjects=8&shape=24x24x24`."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from fmristream.errors import UsageError
from fmristream.ingest.sources.listing import Listing, SourceRun

if TYPE_CHECKING:
    from fmristream.synth import Cohort

SPACE = "synthetic"
_SCHEME = "synth://"
_MASK_SCHEME = "synth-mask:"


class SynthIdentity(TypedDict):
    """What stands for size and checksum of a run that was never a file."""

    size: int
    crc: str


def is_synth(url: str) -> bool:
    """Whether the URL names a synthetic cohort or a run of one."""
    return url.startswith(_SCHEME)


def is_synth_mask(url: str) -> bool:
    """Whether the URL names the brain mask of a synthetic cohort."""
    return url.startswith(_MASK_SCHEME)


def find_synth_runs(source: str, *, space: str | None) -> Listing:
    """Every run of the cohort; a run's URL is the cohort's with `#subject,run` behind it, both counted from 0."""
    from fmristream.synth import parse_url

    cohort = parse_url(source)
    root = cohort.url()
    runs = [
        SourceRun(
            key=f"sub-{label}_run-{run + 1}",
            name=f"sub-{label}_run-{run + 1}",
            url=f"{root}#{subject},{run}",
            subject=label,
            run=str(run + 1),
            space=space or SPACE,
            tr_s=cohort.tr_s,
            mask_url=_MASK_SCHEME + root,
        )
        for subject, label in enumerate(cohort.subject_labels())
        for run in range(cohort.runs)
    ]
    participants: tuple[dict[str, str | float | None], ...] = tuple({**row} for row in cohort.participants())
    return Listing(
        kind="synth", root=root, runs=tuple(sorted(runs, key=lambda run: run.key)), participants=participants
    )


def locate_synth(url: str) -> "tuple[Cohort, int, int]":
    """The cohort, subject and run that a run's URL means.

    Raises:
        UsageError: it names no run.
    """
    from fmristream.synth import parse_url

    cohort_url, _, place = url.partition("#")
    subject, _, run = place.partition(",")
    if not (subject.isdecimal() and run.isdecimal()):
        raise UsageError(f"{url}: names a cohort and no run of it; a run is {cohort_url}#0,0")
    return parse_url(cohort_url), int(subject), int(run)


def synth_identity(url: str) -> SynthIdentity:
    """Bytes of its frames, and the sha256 of all that the run depends on: not of how many others there are."""
    cohort, subject, run = locate_synth(url)
    depends_on = {name: value for name, value in asdict(cohort).items() if name not in ("subjects", "runs")}
    text = json.dumps({**depends_on, "subject": subject, "run": run}, sort_keys=True)
    x, y, z = cohort.shape
    size = x * y * z * cohort.frames * np.dtype(cohort.dtype).itemsize
    return SynthIdentity(size=size, crc=f"synth:{hashlib.sha256(text.encode()).hexdigest()}")


def synth_mask(url: str) -> tuple[npt.NDArray[np.bool_], tuple[tuple[float, ...], ...]]:
    """The brain mask (x, y, z) that a mask URL means, and its affine."""
    from fmristream.synth import parse_url

    cohort = parse_url(url.removeprefix(_MASK_SCHEME))
    return np.ascontiguousarray(cohort.brain_mask()), affine_rows(cohort.affine())


def affine_rows(affine: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    """The affine as nested tuples."""
    return tuple(tuple(float(value) for value in row) for row in affine)
