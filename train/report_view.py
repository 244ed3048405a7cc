"""report.json as values: the one place that knows how it is laid out, for those who compare with it or draw it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, UsageError
from train.evaluate import Subjects
from train.files import read_json

PARTS = ("val", "test")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartView:
    """One split as the report has it.

    Attributes:
        metrics: by name.
        intervals: 95 %, of those that have one.
        subjects: scored ones; None where there is no target.
        num_windows: where there is no target.
    """

    metrics: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float | None, float | None]]
    subjects: Subjects | None = None
    num_windows: int | None = None

    @property
    def count(self) -> int:
        """How many units the numbers are of."""
        return len(self.subjects.label) if self.subjects is not None else self.num_windows or 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetView:
    """What the report says of one target, or of an objective without any (`target` is None).

    Attributes:
        target: its column.
        kind: classification or regression; of an objective without a target, the recipe's.
        classes: their words in the order of their numbers, where they are known.
        threshold: of two classes, above which a unit is told positive.
        threshold_chosen_on: in words.
        parts: `val` and `test`, where they were scored.
        unit: `subject`, or `session` of one.
        average: what of classes is averaged over windows: `logit` or `sigmoid`.
    """

    target: str | None
    kind: str
    classes: tuple[str, ...]
    threshold: float
    threshold_chosen_on: str
    parts: Mapping[str, PartView]
    unit: str = "subject"
    average: str = "logit"

    @property
    def is_multiclass(self) -> bool:
        """Whether there are more than two classes."""
        return len(self.classes) > 2

    @property
    def baseline_kind(self) -> Literal["classification", "regression"]:
        """As those who fit have it."""
        return "regression" if self.kind == "regression" else "classification"


def read_report(out: Path) -> dict[str, Any]:
    """A run's report.json.

    Raises:
        UsageError: there is none.
        CorruptDataError: it is not what was written.
    """
    found = read_json(out / "report.json")
    if found is None:
        raise UsageError(f"{out / 'report.json'}: there is none; give the --out folder of a finished run")
    return found


def targets_of(report: Mapping[str, Any]) -> tuple[TargetView, ...]:
    """What it says, target by target.

    Raises:
        CorruptDataError: it is not laid out as reports are.
    """
    try:
        several = report.get("targets")
        if isinstance(several, Mapping):
            return tuple(_target({"target": name, **found}) for name, found in several.items())
        return (_target(report),)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(
            f"report.json is not laid out as reports are: {error!r}; finish the run again"
        ) from error


def _target(found: Mapping[str, Any]) -> TargetView:
    return TargetView(
        target=found["target"],
        kind=str(found.get("objective") or found.get("kind")),
        classes=tuple(map(str, found.get("classes", ()))),
        threshold=float(found.get("threshold") or 0.0),
        threshold_chosen_on=str(found.get("threshold_chosen_on", "")),
        unit=str(found.get("unit", "subject")),
        average=str(found.get("average", "logit")),
        parts={name: _part(found[name]) for name in PARTS if found.get(name)},
    )


def _part(found: Mapping[str, Any]) -> PartView:
    rows = found.get("subjects")
    return PartView(
        metrics=found["metrics"],
        intervals={name: (pair[0], pair[1]) for name, pair in found.get("intervals", {}).items()},
        subjects=None if rows is None else _subjects(rows),
        num_windows=found.get("num_windows"),
    )


def _subjects(rows: Sequence[Mapping[str, Any]]) -> Subjects:
    return Subjects(
        label=tuple(str(row["subject"]) for row in rows),
        truth=_numbers([row["truth"] for row in rows]),
        score=_numbers([row["score"] for row in rows]),
        session=tuple(str(row["session"]) for row in rows if "session" in row),
    )


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)
