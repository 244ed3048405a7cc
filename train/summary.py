"""What a table of predictions says: every number of report.json, computed from the table and nothing else.

Neither torch nor the data are needed: `tools/score.py` does the same wherever the table is.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from train import metrics
from train.predictions import LOSS, Floats, PredictionTable, Target
from train.resampling import Draws, Statistic, bootstrap
from train.units import Subjects, unit_of, units_of

PARTS = ("val", "test")
Average = Literal["logit", "sigmoid"]
# Below so many validation units no line is fitted through them.
_FEWEST_FOR_A_LINE = 3


class Measured(Protocol):
    """What of a target decides about its numbers."""

    @property
    def kind(self) -> Literal["classification", "regression"]: ...

    @property
    def offset(self) -> float: ...


def report_of(table: PredictionTable) -> dict[str, Any]:
    """All numbers of a finished run; what is chosen (threshold, line of bias) is chosen on validation alone."""
    about = table.about
    facts: dict[str, Any] = {"step": about.step}
    scorings = {"scorings": about.scorings}
    if not about.targets:
        parts = {name: _windows_report(table.of_split(name)) for name in table.splits}
        return facts | {"target": None, "objective": about.objective} | scorings | parts
    found = {target.name: _report_of_target(table, target) for target in about.targets}
    if len(found) > 1:
        return facts | {"objective": about.objective} | scorings | {"targets": found}
    (target,) = about.targets
    return facts | {"target": target.name, **found[target.name]} | scorings


def numbers_of(table: PredictionTable) -> dict[str, float]:
    """The numbers of a table of one split on the way: nothing is chosen; of several targets `TARGET.NUMBER`."""
    if not table.about.targets:
        return {LOSS: _mean_loss(table)}
    found: dict[str, float] = {}
    centre = centre_of(table.about.average)
    for target in table.about.targets:
        units = units_of(table, target, unit=unit_of(table, target))
        prefix = f"{target.name}." if len(table.about.targets) > 1 else ""
        if units.label:
            numbers = measure(units, objective=target, threshold=centre, average=table.about.average)
            found |= {f"{prefix}{name}": value for name, value in numbers.items()}
    return found


def _mean_loss(table: PredictionTable) -> float:
    """Of the windows that have a loss: one whose hidden frames are all scrubbed has none."""
    losses = table.values[LOSS]
    known = np.isfinite(losses)
    return float(losses[known].mean()) if known.any() else math.nan


def target_report(
    target: Target,
    parts: Mapping[str, Subjects | None],
    *,
    draws: int,
    average: Average = "logit",
    unit: str = "subject",
    frozen_threshold: float | None = None,
) -> dict[str, Any]:
    """The numbers of one target.

    Args:
        target: what it is.
        parts: scored units by split; None, or nobody: there is no such part.
        draws: of the bootstrap.
        average: what of classes was averaged.
        unit: what was scored.
        frozen_threshold: chosen before, when nothing may be chosen on these parts.
    """
    is_frozen = frozen_threshold is not None
    val = None if is_frozen else parts.get("val")
    report: dict[str, Any] = {"objective": target.kind, "unit": unit}
    threshold, corrected = centre_of(average), None
    if target.classes:
        report["classes"] = list(target.classes)
    if target.kind == "regression":
        report["train_mean"] = target.offset
        if (corrected := _bias_line(val)) is not None:
            report["bias_correction"] = corrected
    else:
        report["average"] = average
        if not _is_multiclass(*parts.values()):
            threshold, chosen_on = _threshold(val, unit, average)
            if frozen_threshold is not None:
                threshold, chosen_on = frozen_threshold, "validation by the run that trained the network"
            report |= {"threshold": threshold, "threshold_chosen_on": chosen_on}
    for name, found in parts.items():
        if found is not None and found.label:
            report[name] = _part_report(found, target, threshold=threshold, draws=draws, average=average, unit=unit)
            if corrected is not None and name == "test":
                report[name]["bias_corrected"] = _without_bias(found, corrected, target.offset)
    return report


def measure(units: Subjects, *, objective: Measured, threshold: float, average: Average = "logit") -> dict[str, float]:
    """The numbers of the objective's kind."""
    if objective.kind == "regression":
        return metrics.regression_metrics(units.truth, units.score, train_mean=objective.offset)
    if units.score.ndim == 2:
        return metrics.multiclass_metrics(units.truth, units.score, odds=_odds(units.score, average))
    return metrics.classification_metrics(units.truth, units.score, threshold=threshold, centre=centre_of(average))


def resampled(
    units: Subjects, *, objective: Measured, threshold: float, draws: int, average: Average = "logit"
) -> Draws:
    """The numbers that a verdict rests on over draws of the units, the model held fixed."""
    statistics: dict[str, Statistic]
    if objective.kind == "regression":
        statistics = metrics.regression_statistics(units.truth, units.score, train_mean=objective.offset)
    elif units.score.ndim == 2:
        odds = _odds(units.score, average)
        statistics = metrics.multiclass_statistics(units.truth, units.score, odds=odds)
    else:
        statistics = metrics.classification_statistics(units.truth, units.score, threshold=threshold)
    stratify = objective.kind == "classification"
    return bootstrap(statistics, truth=units.truth, draws=draws, stratify=stratify, clusters=units.clusters)


def centre_of(average: Average) -> float:
    """The score at which two classes are as likely to the network."""
    return 0.5 if average == "sigmoid" else 0.0


def _report_of_target(table: PredictionTable, target: Target) -> dict[str, Any]:
    unit = unit_of(table, target)
    parts = {name: units_of(table.of_split(name), target, unit=unit) for name in table.splits}
    about = table.about
    return target_report(
        target,
        parts,
        draws=about.draws,
        average=about.average,
        unit=unit,
        frozen_threshold=about.thresholds.get(target.name),
    )


def _part_report(
    found: Subjects, target: Target, *, threshold: float, draws: int, average: Average, unit: str
) -> dict[str, Any]:
    drawn = resampled(found, objective=target, threshold=threshold, draws=draws, average=average)
    intervals = {name: list(pair) for name, pair in metrics.intervals_of(drawn).items()}
    report: dict[str, Any] = {
        "num_subjects": found.num_subjects,
        "num_units": len(found.label),
        "metrics": measure(found, objective=target, threshold=threshold, average=average),
        "intervals": intervals,
        "bootstrap": _about_draws(found, drawn, draws=draws, unit=unit),
    }
    if target.kind == "classification":
        told = found.score.argmax(axis=1) if found.score.ndim == 2 else found.score > threshold
        classes = found.score.shape[1] if found.score.ndim == 2 else 2
        report["confusion"] = metrics.confusion(found.truth, told.astype(np.float64), classes=classes)
    return report | {"subjects": _rows(found)}


def _about_draws(found: Subjects, drawn: Draws, *, draws: int, unit: str) -> dict[str, Any]:
    who = f"{len(found.label)} {unit}s"
    if found.cluster:
        families = any(one.startswith("family ") for one in found.cluster)
        who = f"{drawn.clusters} {'families and single subjects' if families else 'subjects'} with {who}"
    undefined = {name: int((~np.isfinite(values)).sum()) for name, values in drawn.values.items()}
    return {
        "draws": draws,
        "says": f"the middle 95 % over draws of {who} of this part alone; the model is fixed, another seed is not in it",
        "clusters": drawn.clusters,
        "stratified": drawn.stratified,
        "redrawn": drawn.redrawn,
        "undefined": {name: count for name, count in undefined.items() if count},
    }


def _rows(found: Subjects) -> list[dict[str, Any]]:
    columns: dict[str, Any] = {"subject": found.label}
    if found.session:
        columns["session"] = found.session
    columns |= {"truth": found.truth.tolist(), "score": found.score.tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _windows_report(part: PredictionTable) -> dict[str, Any]:
    return {"num_windows": len(part), "metrics": {LOSS: _mean_loss(part)}, "intervals": {}}


def _threshold(val: Subjects | None, unit: str, average: Average) -> tuple[float, str]:
    """Above which score a unit is told positive, and by whom that was chosen."""
    centre = centre_of(average)
    if val is not None and len(set(val.truth.tolist())) == 2:
        chosen = metrics.youden_threshold(val.truth, val.score, centre=centre)
        return chosen, f"{len(val.label)} validation {unit}s"
    return centre, f"nothing: there are no validation {unit}s of both classes"


def _is_multiclass(*parts: Subjects | None) -> bool:
    return any(part is not None and part.score.ndim == 2 for part in parts)


def _odds(score: Floats, average: Average) -> Floats:
    return score if average == "sigmoid" else metrics.against_others(score)


def _bias_line(val: Subjects | None) -> dict[str, Any] | None:
    """How predictions depend on truths in validation: networks pull everybody to the mean (brain age)."""
    if val is None or len(val.label) < _FEWEST_FOR_A_LINE or np.ptp(val.truth) == 0:
        return None
    centred = val.truth - val.truth.mean()
    slope = float(centred @ (val.score - val.score.mean()) / (centred @ centred))
    if not slope > 0:
        return None
    intercept = float(val.score.mean() - slope * val.truth.mean())
    return {"slope": slope, "intercept": intercept, "fitted_on": f"{len(val.label)} validation units"}


def _without_bias(found: Subjects, line: Mapping[str, Any], train_mean: float) -> dict[str, float]:
    """The numbers of (prediction - intercept) / slope; the truths of those it is applied to are not used."""
    predicted = (found.score - line["intercept"]) / line["slope"]
    return metrics.regression_metrics(found.truth, predicted, train_mean=train_mean)
