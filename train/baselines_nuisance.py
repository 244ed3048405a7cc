"""What is known of a scan without looking at the brain: motion, signal quality, timing, length, site.

A network that does no better than these may read nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.report.look import signal_moments
from train.baselines_fit import Features
from train.participants import SITE_COLUMNS, words_of

if TYPE_CHECKING:
    from fmristream.catalog.run import Run
    from fmristream.shards.dataset import Dataset

Floats = NDArray[np.float64]

# Columns of participants tables that are taken where nobody says which, whatever their case.
USUAL_COLUMNS = (*SITE_COLUMNS, "age", "sex")

# Power et al. 2012: rotations as millimetres on a sphere of this radius.
HEAD_RADIUS_MM = 50.0
# Frames that move more are usually scrubbed (ibid.).
LARGE_FD_MM = 0.5
_MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_FD = "framewise_displacement"


def nuisance_features(
    dataset: "Dataset", runs: Iterable["Run"], *, target: str, columns: Sequence[str] | None = None
) -> Features:
    """Per subject the means over its runs of what each run tells, and columns of the participants table.

    Words become one feature for each of them; beside a feature that some subjects lack stands one that says who. Give the
    runs of all parts at once, so that all have the same features; scaling and fitting see the training part alone.

    Args:
        dataset: where the runs are from.
        runs: of all parts.
        target: what is to be predicted; never taken as a feature.
        columns: of the participants table; those of `USUAL_COLUMNS` that it has where not given.

    Raises:
        UsageError: there is no such column, or it is the target.
    """
    return nuisance_of(dataset, [(run, run_facts(dataset, run)) for run in runs], target=target, columns=columns)


def nuisance_of(
    dataset: "Dataset",
    scans: Iterable[tuple["Run", Mapping[str, float]]],
    *,
    target: str,
    columns: Sequence[str] | None = None,
) -> Features:
    """The same of runs whose `run_facts` are known: for one target after the other."""
    facts: dict[str, list[Mapping[str, float]]] = {}
    groups: dict[str, str] = {}
    for run, known in scans:
        facts.setdefault(run.subject, []).append(known)
        groups[run.subject] = run.group
    labels = sorted(facts)
    numbers = {
        name: np.array([_mean_of([one[name] for one in facts[label]]) for label in labels])
        for name in sorted({name for rows in facts.values() for row in rows for name in row})
    }
    for name in _chosen(dataset, target, columns):
        numbers |= _column(dataset, name, labels)
    numbers = _with_gaps(numbers)
    values = np.stack(list(numbers.values()), axis=1) if labels else np.zeros((0, 0))
    return Features(
        subject=tuple(labels), group=tuple(groups[label] for label in labels), values=values, names=tuple(numbers)
    )


def run_facts(dataset: "Dataset", run: "Run") -> dict[str, float]:
    """Numbers about a run: frames, TR, tSNR and motion; no frame is read. NaN where nothing is known."""
    mean, sd = signal_moments(dataset.reader(run))
    changes = np.isfinite(mean) & (sd > 0)
    fd = framewise_displacement_mm(dataset, run)
    return {
        "frames": float(run.frames),
        "tr_s": np.nan if run.tr_s is None else run.tr_s,
        "tsnr": float(np.median(np.abs(mean[changes]) / sd[changes])) if changes.any() else np.nan,
        "mean_fd_mm": np.nan if fd is None else _mean_of(fd),
        "share_of_large_fd": np.nan if fd is None else _mean_of(np.where(np.isfinite(fd), fd > LARGE_FD_MM, np.nan)),
    }


def framewise_displacement_mm(dataset: "Dataset", run: "Run") -> Floats | None:
    """(t,) as the confounds have it, or as Power et al. compute it of six motion parameters in mm and radians.

    None where the run has neither.
    """
    found = dataset.confounds(run) or {}
    if _FD in found:
        return np.asarray(found[_FD], dtype=np.float64)
    if not set(_MOTION) <= set(found):
        return None
    steps = np.abs(np.diff(np.stack([np.asarray(found[name], dtype=np.float64) for name in _MOTION]), axis=1))
    return np.concatenate([[np.nan], steps[:3].sum(axis=0) + HEAD_RADIUS_MM * steps[3:].sum(axis=0)])


def _chosen(dataset: "Dataset", target: str, columns: Sequence[str] | None) -> list[str]:
    known = [name for name in dataset.participant_columns if name != "subject"]
    if columns is None:
        return [name for name in known if name.lower() in USUAL_COLUMNS and name.lower() != target.lower()]
    for name in columns:
        if name == target:
            raise UsageError(f"nuisance column {name!r} is the target itself; leave it out")
        if name not in known:
            raise UsageError(f"there is no column {name!r}; the participants table has {', '.join(known) or 'none'}")
    return list(columns)


def _column(dataset: "Dataset", name: str, labels: Sequence[str]) -> dict[str, Floats]:
    """One column as features: numbers as they are, words as 0 and 1; the number of a site is its name."""
    table = dataset.participant_columns
    cells: Mapping[str, Any] = dict(zip(map(str, table["subject"]), table[name], strict=True))
    if name.lower() in SITE_COLUMNS:
        cells = words_of(dataset, (name.lower(),))
    found = [cells.get(label) for label in labels]
    if not any(isinstance(cell, str) for cell in cells.values()):
        return {name: np.array([np.nan if cell is None else float(cell) for cell in found])}
    words = sorted({str(cell) for cell in found if cell is not None})
    return {
        f"{name}={word}": np.array([np.nan if cell is None else float(str(cell) == word) for cell in found])
        for word in words
    }


def _with_gaps(numbers: dict[str, Floats]) -> dict[str, Floats]:
    """Features, and for those that some subjects lack, which ones."""
    gaps = {f"{name} is missing": np.isnan(values).astype(np.float64) for name, values in numbers.items()}
    kept = {name: values for name, values in numbers.items() if not np.isnan(values).all()}
    return kept | {name: values for name, values in gaps.items() if values.any() and not values.all()}


def _mean_of(values: Sequence[float] | Floats) -> float:
    """Mean of what is known; NaN where nothing is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")
