"""What a run tells people when it is done: one table, one JSON file and one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import metrics
from train.config import Recipe
from train.log import History, for_json, read_history

if TYPE_CHECKING:
    from train.evaluate import Subjects
    from train.loop import Outcome
    from train.objectives import Objective

_TITLES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "balanced_accuracy_at_0": "balanced accuracy, logit > 0",
    "accuracy_at_0": "accuracy, logit > 0",
    "mae": "MAE",
    "mse": "MSE",
    "r": "Pearson r",
    "f1": "F1, mean of classes",
    "loss": "loss, mean of windows",
}


def write_report(outcome: "Outcome", recipe: Recipe, *, out: Path) -> None:
    """Write report.json and curves.png into `out` and print the table."""
    report = summarise(outcome, recipe)
    (out / "report.json").write_text(json.dumps(for_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print_table(report)
    title = f"{recipe.model.name}: {recipe.data.target or recipe.objective.kind}"
    save_curves(read_history(out / "log.jsonl"), out / "curves.png", title=title)
    print(f"written: {out / 'report.json'}, {out / 'curves.png'}, {out / 'log.jsonl'}")


def summarise(outcome: "Outcome", recipe: Recipe) -> dict[str, Any]:
    """All numbers of a finished run; the threshold is chosen on validation subjects alone."""
    from train.evaluate import Windows
    from train.tasks import Supervised

    report: dict[str, Any] = {"step": outcome.step, "target": recipe.data.target, "objective": recipe.objective.kind}
    threshold = 0.0
    is_one = isinstance(outcome.task, Supervised) and len(outcome.task.objectives) == 1
    objective = outcome.task.objectives[0] if is_one else None
    if objective is not None and objective.classes:
        report["classes"] = list(objective.names)
    elif objective is not None and objective.kind == "classification":
        threshold, chosen_on = _threshold(outcome)
        report |= {"threshold": threshold, "threshold_chosen_on": chosen_on}
    for name, found in (("val", outcome.val), ("test", outcome.test)):
        if isinstance(found, Windows):
            report[name] = {"num_windows": found.num_windows, "metrics": dict(found.numbers), "intervals": {}}
        elif found is not None and found.label and objective is not None:
            draws = recipe.eval.bootstrap_draws
            report[name] = _subjects_report(found, objective=objective, threshold=threshold, draws=draws)
    return report


def _threshold(outcome: "Outcome") -> tuple[float, str]:
    """Above which score a subject is told positive, and by whom that was chosen."""
    from train.evaluate import Subjects

    val = outcome.val
    if isinstance(val, Subjects) and len(set(val.truth.tolist())) == 2:
        return metrics.youden_threshold(val.truth, val.score), f"{len(val.label)} validation subjects"
    return 0.0, "nothing: there are no validation subjects of both classes"


def _subjects_report(found: "Subjects", *, objective: "Objective", threshold: float, draws: int) -> dict[str, Any]:
    from train import evaluate

    bounds = evaluate.intervals(found, objective=objective, threshold=threshold, draws=draws)
    return {
        "num_subjects": len(found.label),
        "metrics": evaluate.measure(found, objective=objective, threshold=threshold),
        "intervals": {key: list(pair) for key, pair in bounds.items()},
        "subjects": [
            {"subject": label, "truth": truth, "score": score}
            for label, truth, score in zip(found.label, found.truth.tolist(), found.score.tolist(), strict=True)
        ],
    }


def print_table(report: Mapping[str, Any]) -> None:
    """The numbers of validation and test subjects side by side, with 95 % intervals over subjects."""
    from rich.console import Console
    from rich.table import Table

    parts = [name for name in ("val", "test") if name in report]
    if not parts:
        print("no validation or test split was scored")
        return
    if report["target"] is None:
        table = Table(title=f"{report['objective']} after {report['step']} steps, every window once")
    else:
        table = Table(title=f"{report['target']} after {report['step']} steps, by subject (95 % bootstrap interval)")
    table.add_column("")
    for name in parts:
        count = report[name].get("num_subjects", report[name].get("num_windows"))
        table.add_column(f"{name} (n = {count})")
    for key in report[parts[0]]["metrics"]:
        table.add_row(_TITLES[key], *(_with_interval(report[name], key) for name in parts))
    console = Console()
    console.print(table)
    if "threshold" in report:
        console.print(f"threshold {report['threshold']:.4g}, chosen on {report['threshold_chosen_on']}")


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
    if key not in part["intervals"]:
        return f"{value:.3f}"
    low, high = part["intervals"][key]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
