"""The part of a report's page that holds numbers: the verdict on top, each target's tables and pictures, the baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train import html_figures
from train.evaluate import Subjects
from train.html_facts import RunFacts
from train.html_tags import NOTHING, Html, joined, number, picture, table, tag, text, with_interval
from train.report_view import PartView, TargetView

TITLES: Mapping[str, str] = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "balanced_accuracy_at_0": "balanced accuracy, logit > 0",
    "accuracy_at_0": "accuracy, logit > 0",
    "mae": "mean absolute error",
    "mse": "mean squared error",
    "r": "Pearson r",
    "r_squared": "r²",
    "r2": "R² about the training subjects' mean",
    "f1": "F1",
    "f1_at_0": "F1, logit > 0",
    "loss": "loss, mean of windows",
}
_PARTS = {"val": "validation", "test": "test"}
# Fewer subjects make five bins of a handful.
_LEAST_CALIBRATED = 50
# What the numbers of a net that knows nothing lie around.
_CHANCE = {"auroc": 0.5, "r": 0.0}


def headline(run: RunFacts) -> Html:
    """What was found, in sentences, before everything else."""
    told = [sentence for view in run.views for sentence in _verdict(run, view)]
    is_bad = _certain_leaks(run.audit) > 0
    if start := _certain_leaks((run.audit or {}).get("start")):
        told.insert(
            0, f"The weights that it began with were trained on people of validation or test ({start} in common)."
        )
    if is_bad:
        told.insert(0, "The splits of this run leak (see the audit below): no number of it is evidence.")
    return tag("section", *(tag("p", text(one)) for one in told), class_="verdict bad" if is_bad else "verdict")


def target_section(run: RunFacts, view: TargetView) -> Html:
    """One target: its numbers on validation and test, and pictures of the test subjects."""
    if not view.parts:
        return tag("section", tag("h2", text(view.target or "Numbers")), tag("p", text("No split was scored.")))
    return tag(
        "section",
        tag("h2", text(view.target or "Numbers")),
        _numbers(view),
        _threshold(view),
        _pictures(run, view),
        _sites(run, view),
    )


def beside_section(run: RunFacts) -> Html:
    """The baselines: numbers, paired differences and their forest."""
    beside = run.beside
    if not run.target_names:
        return NOTHING
    heading = tag("h2", text("Beside the net"))
    if not beside:
        return tag(
            "section",
            heading,
            tag("p", text("No baseline was fitted yet.")),
        )
    if beside["status"] != "done":
        return tag("section", heading, tag("p", text(f"Baselines: {beside['status']}. {beside['why']}.")))
    intro = (
        "The same training, validation and test subjects, scored by linear readers of functional connectivity (correlations of "
        "the frames that the net sees) and of the scan alone (motion, length, TR, tSNR, site and the like). A verdict is the "
        f"paired difference on the same test subjects, with the middle 95 % of {beside['draws']:,} draws of {beside['drawn']}."
    )
    several = len(beside["targets"]) > 1
    return tag(
        "section",
        heading,
        tag("p", text(intro)),
        *(_beside_target(target, found, several=several) for target, found in beside["targets"].items()),
    )


def _verdict(run: RunFacts, view: TargetView) -> list[str]:
    part = view.parts.get("test") or view.parts.get("val")
    if part is None:
        return [f"{view.target or run.objective_kind}: no split was scored."]
    where = "test" if "test" in view.parts else "validation"
    if view.target is None:
        loss = part.metrics.get("loss")
        return [
            f"Without a target: loss {loss:.4g} on {part.count:,} {where} windows." if loss is not None else "No loss."
        ]
    first = next(iter(part.metrics))
    key = "mae" if view.kind == "regression" and "mae" in part.metrics else first
    told = [f"{view.target}: {_told(part, key)} on {part.count} {where} {view.unit}s.{_chance(part, key)}"]
    return told + list(run.beside.get("targets", {}).get(view.target, {}).get("verdict", ()))


def _told(part: PartView, key: str) -> str:
    value, interval = part.metrics[key], part.intervals.get(key)
    if value is None:
        return f"{TITLES.get(key, key)} unknown"
    bounds = ""
    if interval is not None and interval[0] is not None and interval[1] is not None:
        bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{TITLES.get(key, key)} {value:.3f}{bounds}"


def _chance(part: PartView, key: str) -> str:
    interval = part.intervals.get(key)
    if key not in _CHANCE or interval is None or interval[0] is None or interval[1] is None:
        return ""
    holds = interval[0] <= _CHANCE[key] <= interval[1]
    return f" The interval {'includes' if holds else 'does not include'} chance ({_CHANCE[key]:g})."


def _numbers(view: TargetView) -> Html:
    unit = "windows" if view.target is None else f"{view.unit}s"
    header = [text(""), *(text(f"{_PARTS[name]} ({part.count:,} {unit})") for name, part in view.parts.items())]
    keys = dict.fromkeys(key for part in view.parts.values() for key in part.metrics)
    rows = [
        [
            text(TITLES.get(key, key)),
            *(with_interval(part.metrics.get(key), part.intervals.get(key)) for part in view.parts.values()),
        ]
        for key in keys
    ]
    caption = (
        NOTHING
        if view.target is None
        else text("In brackets: 95 % bootstrap interval over subjects, for this one net.")
    )
    return table(header, rows, caption=caption)


def _threshold(view: TargetView) -> Html:
    if view.kind != "classification" or view.is_multiclass or not view.threshold_chosen_on:
        return NOTHING
    return tag(
        "p",
        text("A subject is told positive above "),
        number(view.threshold),
        text(f", chosen on {view.threshold_chosen_on}."),
    )


def _pictures(run: RunFacts, view: TargetView) -> Html:
    part = view.parts.get("test") or view.parts.get("val")
    if part is None or part.subjects is None or not len(part.subjects.label):
        return NOTHING
    subjects, where = part.subjects, "test" if "test" in view.parts else "validation"
    if view.kind == "regression":
        says = f"Predicted by true {view.target} of {part.count} {where} subjects"
        caption = (
            text(f"Each dot is one {where} {view.unit}; {_told(part, 'mae')}.") if "mae" in part.metrics else NOTHING
        )
        drawn = html_figures.scatter(subjects, unit=str(view.target))
        return tag("div", picture(drawn, says=says, caption=caption), class_="pair")
    counts, names = confusion_counts(subjects, threshold=view.threshold, names=view.classes)
    told = "; ".join(f"true {names[row]}: {counts[row].tolist()}" for row in range(len(names)))
    shown = [
        picture(
            html_figures.confusion(counts, names),
            says=f"Confusion matrix of {part.count} {where} subjects. {told}",
            caption=text(f"Counts of {where} subjects{'' if view.is_multiclass else ' at the chosen threshold'}."),
        )
    ]
    if not view.is_multiclass and len(set(subjects.truth.tolist())) == 2:
        shown.insert(
            0,
            picture(
                html_figures.roc(subjects),
                says=f"ROC curve of {part.count} {where} subjects: {_told(part, 'auroc')}",
                caption=text(f"{where.capitalize()} subjects; pointwise 95 % band over resampled subjects."),
            ),
        )
        if part.count >= _LEAST_CALIBRATED and view.average == "logit":
            shown.append(
                picture(
                    html_figures.calibration(subjects),
                    says="Calibration: share of the upper class by the chance that the net tells, in five bins",
                    caption=text("Five bins of equal numbers of subjects; 95 % Wilson intervals."),
                )
            )
    return tag("div", *shown, class_="pair")


def confusion_counts(
    subjects: Subjects, *, threshold: float, names: Sequence[str]
) -> tuple[NDArray[np.int64], Sequence[str]]:
    """((classes, classes) true by told, names): of two classes without words, lower and upper."""
    told = (subjects.score > threshold) if subjects.score.ndim == 1 else subjects.score.argmax(axis=1)
    names = list(names) or ["lower", "upper"]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (subjects.truth.astype(np.int64), told.astype(np.int64)), 1)
    return counts, names


def _sites(run: RunFacts, view: TargetView) -> Html:
    rows = run.beside.get("targets", {}).get(view.target, {}).get("sites", ())
    named = [row for row in rows if row["site"] is not None]
    if not rows:
        return NOTHING
    columns = [(model, key) for row in named[:1] for model, numbers in row["numbers"].items() for key in numbers]
    header = [
        text("site"),
        text("test subjects"),
        *(text(f"{model}: {TITLES.get(key, key)}") for model, key in columns),
    ]
    cells = [
        [text(row["site"]), text(row["subjects"]), *(number(row["numbers"][model][key]) for model, key in columns)]
        for row in named
    ]
    told = [
        tag(
            "p",
            text(f"{row['sites']} sites of fewer test subjects, {row['subjects']} together, have no row of their own."),
        )
        for row in rows
        if row["site"] is None
    ]
    return joined([tag("h3", text("By site")), table(header, cells) if named else NOTHING, *told])


def _beside_target(target: str, found: Mapping[str, Any], *, several: bool) -> Html:
    rows: list[list[Html]] = []
    drawn: dict[str, list[tuple[str, float, tuple[float, float]]]] = {}
    for baseline in found["baselines"]:
        for row in baseline["differences"]:
            rows.append(
                [
                    text(baseline["name"]),
                    text(TITLES.get(row["metric"], row["metric"])),
                    number(row["network"]),
                    number(row["baseline"]),
                    with_interval(row["difference"], row["interval"], signed=True),
                    text(row["says"]),
                ]
            )
            if row["difference"] is not None and None not in row["interval"]:
                drawn.setdefault(row["metric"], []).append(
                    (baseline["name"], row["difference"], tuple(row["interval"]))
                )
    header = [text(name) for name in ("baseline", "number", "net", "baseline", "net - baseline", "the net is")]
    pictures = [
        picture(
            html_figures.forest(lines, unit=TITLES.get(metric, metric)),
            says=f"Net minus baseline, {TITLES.get(metric, metric)}: "
            + "; ".join(f"{name} {value:+.3f} from {low:+.3f} to {high:+.3f}" for name, value, (low, high) in lines),
            caption=text(_reads(metric)),
        )
        for metric, lines in drawn.items()
    ]
    return joined(
        [
            tag("h3", text(target)) if several else NOTHING,
            tag("ul", *(tag("li", text(said)) for said in found["verdict"])),
            table(header, rows) if rows else NOTHING,
            *pictures,
        ]
    )


def _reads(metric: str) -> str:
    side = "left" if metric in ("mae", "mse") else "right"
    return f"{side.capitalize()} of the line the net is ahead; an interval across it tells them not apart."


def _certain_leaks(audit: Mapping[str, Any] | None) -> int:
    pairs = (audit or {}).get("pairs", ())
    return sum(pair["same_run"] + pair["same_subject"] + pair["same_family"] for pair in pairs)
