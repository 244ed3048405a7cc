"""What a run tells people when it is done: one table, one JSON file and one picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import Recipe
from train.files import json_text, write_whole
from train.log import History, read_history
from train.predictions import FILE, Target, read_predictions, write_predictions
from train.summary import report_of, target_report

if TYPE_CHECKING:
    from rich.console import Console

    from train.loop import Outcome

_TITLES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "f1": "F1",
    "balanced_accuracy_at_0": "balanced accuracy, logit > 0",
    "accuracy_at_0": "accuracy, logit > 0",
    "f1_at_0": "F1, logit > 0",
    "mae": "MAE",
    "mse": "MSE",
    "r": "Pearson r",
    "r_squared": "r squared",
    "r2": "R2 about the training mean",
    "loss": "loss, mean of windows",
}


def write_report(outcome: "Outcome", recipe: Recipe, *, out: Path) -> None:
    """Write predictions.parquet, report.json and curves.png into `out` and print the table.

    The report is computed from the file of predictions, as `tools/score.py` does it.
    """
    if outcome.table is None:
        report: Mapping[str, Any] = summarise(outcome, recipe)
    else:
        write_predictions(outcome.table, out / FILE)
        report = report_of(read_predictions(out / FILE))
    write_whole(out / "report.json", report_text(report))
    print_table(report)
    title = f"{recipe.model.name}: {recipe.data.target or recipe.objective.kind}"
    save_curves(read_history(out / "log.jsonl"), out / "curves.png", title=title)
    written = [FILE] if outcome.table is not None else []
    print(f"written: {', '.join(str(out / name) for name in (*written, 'report.json', 'curves.png', 'log.jsonl'))}")


def report_text(report: Mapping[str, Any]) -> str:
    """What report.json holds."""
    return json_text(report)


def summarise(outcome: "Outcome", recipe: Recipe) -> dict[str, Any]:
    """The numbers of subjects that were not scored from a table: baselines' subjects are, by what they are given."""
    from train.units import Subjects

    report: dict[str, Any] = {"step": outcome.step, "target": recipe.data.target, "objective": recipe.objective.kind}
    if not outcome.task.objectives:
        return report
    objective = outcome.task.objectives[0]
    target = Target(
        name=objective.target,
        kind=objective.kind,
        offset=objective.offset if objective.kind == "regression" else 0.0,
        classes=objective.names,
        truth="",
        scores=(),
    )
    parts = {"val": outcome.val, "test": outcome.test}
    scored = {name: found for name, found in parts.items() if isinstance(found, Subjects)}
    return report | target_report(target, scored, draws=recipe.eval.bootstrap_draws)


def print_table(report: Mapping[str, Any]) -> None:
    """The numbers of validation and test side by side, with 95 % intervals over units; one table for each target."""
    from rich.console import Console

    console = Console()
    targets = report.get("targets", {report.get("target"): report})
    for name, found in targets.items():
        if not _parts_of(found):
            console.print(f"{name or report['objective']}: no validation or test split was scored")
            continue
        _print_target(console, name, found, step=report["step"])
    if report.get("scorings", 1) > 1:
        console.print(f"validation and test were scored {report['scorings']} times in this folder")


def _print_target(console: "Console", target: str | None, found: Mapping[str, Any], *, step: int) -> None:
    from rich.table import Table

    parts = _parts_of(found)
    if target is None:
        table = Table(title=f"{found['objective']} after {step} steps, every window once")
    else:
        table = Table(title=f"{target} after {step} steps, by {found['unit']} (95 % bootstrap interval)")
    table.add_column("")
    for name in parts:
        count = found[name].get("num_units", found[name].get("num_windows"))
        table.add_column(f"{name} (n = {count})")
    for key in found[parts[0]]["metrics"]:
        table.add_row(_TITLES[key], *(_with_interval(found[name], key) for name in parts))
    console.print(table)
    if "threshold" in found:
        console.print(f"threshold {found['threshold']:.4g}, chosen on {found['threshold_chosen_on']}")
    for name in parts:
        if "bootstrap" in found[name]:
            console.print(f"{name}: {found[name]['bootstrap']['says']}")


def _parts_of(found: Mapping[str, Any]) -> list[str]:
    """The splits that were scored."""
    return [name for name, part in found.items() if isinstance(part, Mapping) and "metrics" in part]


def save_curves(history: History, path: Path, *, title: str) -> None:
    """Loss and learning rate by step, and the validation subjects' main number where it was looked at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    steps = [entry["step"] for entry in history.steps]
    losses = [entry["loss"] for entry in history.steps]
    top = figure.add_subplot(2, 1, 1)
    top.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    top.plot(steps, _smooth(losses), color="C0", label="running mean")
    top.set(ylabel="training loss", title=title)
    bottom = figure.add_subplot(2, 1, 2, sharex=top)
    bottom.plot(steps, [entry["lr"] for entry in history.steps], color="C1")
    bottom.set(ylabel="learning rate", xlabel="step")
    if history.evals and "loss" in history.evals[0]:
        seen = [(entry["step"], entry["loss"]) for entry in history.evals if entry["loss"] is not None]
        top.plot(
            [step for step, _ in seen], [loss for _, loss in seen], "o-", color="C2", markersize=3, label="validation"
        )
    top.legend(frameon=False)
    known = ("auroc", "r", "balanced_accuracy")
    key = next((name for name in known if history.evals and name in history.evals[0]), None)
    if key:
        right = bottom.twinx()
        seen = [(entry["step"], entry[key]) for entry in history.evals if entry[key] is not None]
        right.plot([step for step, _ in seen], [value for _, value in seen], "o-", color="C2", markersize=3)
        right.set(ylabel=f"validation {_TITLES[key]}", ylim=(-1, 1) if key == "r" else (0, 1))
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float], *, weight: float = 0.95) -> list[float]:
    """Exponential running mean, corrected for its start."""
    total, norm, means = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        means.append(total / norm)
    return means


def _with_interval(part: Mapping[str, Any], key: str) -> str:
    value = part["metrics"][key]
    if not math.isfinite(value):
        return "not defined"
    if key not in part["intervals"] or not all(map(math.isfinite, part["intervals"][key])):
        return f"{value:.3f}"
    low, high = part["intervals"][key]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
