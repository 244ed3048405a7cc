"""What a run tells people: its log as it goes, then one table, one JSON file and one picture."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fmristream.errors import CorruptDataError
from train.config import Recipe
from train.predictions import FILE, Target, read_predictions, write_predictions
from train.summary import PARTS, report_of, target_report

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


class Log:
    """One JSON object per line, each flushed as it is written, and some of them on the screen; without a file, nothing."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file
        self._shown: tuple[float, int] | None = None

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Something that happens now and then."""
        self._write({"event": kind, **facts})
        if self._file is not None:
            known = (f"{key} {_short(value)}" for key, value in facts.items() if value is not None)
            print(f"{kind}: {', '.join(known)}", flush=True)

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        """One optimiser step of `total`; every `show_every`-th is shown."""
        self._write({"event": "step", **facts})
        now, step = time.perf_counter(), facts["step"]
        since, from_step = self._shown or (now, step)
        self._shown = (since, from_step)
        if self._file is None or (step % show_every and step != total):
            return
        pace = ""
        if step > from_step and now > since:
            per_s = (step - from_step) / (now - since)
            pace = f", {per_s:.2f} steps/s, {(total - step) / per_s:.0f} s left"
        print(f"step {step}/{total}: loss {facts['loss']:.4f}, lr {facts['lr']:.2e}{pace}", flush=True)
        self._shown = (now, step)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_for_json(line), allow_nan=False) + "\n")
            self._file.flush()


@contextmanager
def open_log(path: Path, *, enabled: bool) -> Iterator[Log]:
    """Append to a run's log; a line that a kill cut short is closed first."""
    if not enabled:
        yield Log(None)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        if cut_short:
            file.write("\n")
        yield Log(file)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The steps and looks at validation that led to where a run stands; those that a resume undid are left out."""

    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]


def read_history(path: Path) -> History:
    """Read a run's log; a start at step k undoes what was logged after k.

    Raises:
        CorruptDataError: a line is damaged in another way than by a kill, after which a new attempt begins.
    """
    steps: list[Mapping[str, Any]] = []
    evals: list[Mapping[str, Any]] = []
    cut = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            cut = number
            continue
        event = entry["event"]
        if cut and event in ("step", "eval"):
            raise CorruptDataError(f"{path}: line {cut} is not the JSON that was written, and the run went on after it")
        cut = 0
        if event == "start":
            steps = [done for done in steps if done["step"] <= entry["step"]]
            evals = [done for done in evals if done["step"] <= entry["step"]]
        elif event == "step":
            steps.append(entry)
        elif event == "eval":
            evals.append(entry)
    return History(steps=steps, evals=evals)


def write_report(outcome: "Outcome", recipe: Recipe, *, out: Path) -> None:
    """Write predictions.parquet, report.json and curves.png into `out` and print the table.

    The report is computed from the file of predictions, as `tools/score.py` does it.
    """
    if outcome.table is None:
        report: Mapping[str, Any] = summarise(outcome, recipe)
    else:
        write_predictions(outcome.table, out / FILE)
        report = report_of(read_predictions(out / FILE))
    (out / "report.json").write_text(report_text(report), encoding="utf-8")
    print_table(report)
    title = f"{recipe.model.name}: {recipe.data.target or recipe.objective.kind}"
    save_curves(read_history(out / "log.jsonl"), out / "curves.png", title=title)
    written = [FILE] if outcome.table is not None else []
    print(f"written: {', '.join(str(out / name) for name in (*written, 'report.json', 'curves.png', 'log.jsonl'))}")


def report_text(report: Mapping[str, Any]) -> str:
    """What report.json holds."""
    return json.dumps(_for_json(report), indent=1, allow_nan=False) + "\n"


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
        if not any(part in found for part in PARTS):
            console.print(f"{name or report['objective']}: no validation or test split was scored")
            continue
        _print_target(console, name, found, step=report["step"])
    if report.get("scorings", 1) > 1:
        console.print(f"validation and test were scored {report['scorings']} times in this folder")


def _print_target(console: "Console", target: str | None, found: Mapping[str, Any], *, step: int) -> None:
    from rich.table import Table

    parts = [name for name in PARTS if name in found]
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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _for_json(value: Any) -> Any:
    """The same with null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
