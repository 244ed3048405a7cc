"""How a recipe's network gets better with more training subjects, beside functional connectivity of the same subjects.

    python tools/learning_curve.py RECIPE OUT --set data.url=URL --sizes 32 64 128 256 --seeds 0 1 2

A cell is one size and one seed: `data.train_groups` groups of the training split (subjects, or families), drawn so that
more of them hold fewer; validation and test subjects are the same in all cells. The baseline learns from the same groups.

Goes on where it was stopped: OUT/results.jsonl has a line for each finished cell, and a network that SIGTERM stops keeps
a checkpoint. Written: OUT/results.jsonl, OUT/curve.png, OUT/curve.md, OUT/fit.json.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `tools` is not installed

from fmristream import open as open_dataset  # noqa: E402
from fmristream.errors import FmriStreamError, UsageError  # noqa: E402
from tools.learning_curve_fit import Fit, fit_with_interval  # noqa: E402
from tools.proof_results import append, read_lines  # noqa: E402
from train.config import Recipe, as_tables, load_recipe  # noqa: E402
from train.summary import report_of  # noqa: E402

if TYPE_CHECKING:
    from train.state import Outcome

NETWORK, CONNECTIVITY = "network", "functional connectivity"
# Metric -> its error, which a power law lets fall.
ERRORS = {"auroc": "1 - AUROC", "balanced_accuracy": "1 - balanced accuracy", "mae": "MAE", "mse": "MSE"}
DONE, FAILED, WRONG_USAGE, STOPPED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute the cells that are not there yet and draw the curve; 0, 1 if a cell failed, 2, or 130 if stopped."""
    options = _parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        _require_curve(recipe, options)
        status = _compute(recipe, options)
        if status != STOPPED:
            _draw(recipe, options)
    except FmriStreamError as error:
        print(f"learning_curve: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    return status


def cell_recipe(recipe: Recipe, *, size: int, seed: int) -> Recipe:
    """The recipe of a cell: so many training groups, drawn by the seed that also begins the network."""
    data = dataclasses.replace(recipe.data, train_groups=size, train_groups_seed=seed)
    return dataclasses.replace(recipe, data=data, train=dataclasses.replace(recipe.train, seed=seed))


def digest_of(recipe: Recipe, *, version: str) -> str:
    """What a cell is computed with: its recipe, and the version of the dataset."""
    return hashlib.sha256(json.dumps([as_tables(recipe), version], sort_keys=True).encode()).hexdigest()[:16]


def network_numbers(outcome: "Outcome") -> dict[str, float | None]:
    """Test numbers of the first target, as the run's own report has them."""
    assert outcome.table is not None, "a curve has test subjects"
    report, first = report_of(outcome.table), outcome.table.about.targets[0].name
    return _test_numbers(report.get("targets", {first: report})[first])


def compute_cell(recipe: Recipe, *, folder: Path, with_baseline: bool) -> dict[str, Any] | None:
    """Test numbers of the network and of the baseline by name; None where a signal stopped the network.

    Checkpoints go when the cell is done; recipe, log and report stay.
    """
    from train.baselines import CONNECTIVITY as NAME
    from train.baselines import recipe_baselines, summary
    from train.config import as_toml
    from train.launch import World
    from train.loop import train

    folder.mkdir(parents=True, exist_ok=True)
    outcome = train(recipe, out=folder, world=World())
    if outcome is None:
        return None
    (folder / "recipe.toml").write_text(as_toml(recipe), encoding="utf-8")
    found = {NETWORK: network_numbers(outcome)}
    if with_baseline:
        baseline = next(one for one in recipe_baselines(recipe) if one.name == NAME)
        found[CONNECTIVITY] = _test_numbers(summary(baseline, recipe))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def table(lines: Sequence[Mapping[str, Any]], metric: str, fits: Mapping[str, Fit]) -> str:
    """Markdown: mean and range over seeds by size, and the laws."""
    rows = [
        f"| training groups | seeds | {NETWORK}: {metric} | {CONNECTIVITY}: {metric} |",
        "| --- | --- | --- | --- |",
    ]
    for size in sorted({line["size"] for line in lines}):
        here = [line for line in lines if line["size"] == size]
        cells = [_range([line["numbers"][who][metric] for line in here if who in line["numbers"]]) for who in _WHO]
        rows.append(f"| {size} | {len(here)} | {' | '.join(cells)} |")
    rows += ["", f"Laws of {ERRORS[metric]} = scale x n^-exponent + floor, 95 % intervals over seeds:", ""]
    for who, fit in fits.items():
        law, (low, high) = fit.law, fit.exponent
        rows.append(
            f"- {who}: scale {law.scale:.3g}, exponent {law.exponent:.3f} [{low:.3f}, {high:.3f}], floor {law.floor:.3g}"
        )
    return "\n".join(rows) + "\n"


def errors_of(lines: Sequence[Mapping[str, Any]], who: str, metric: str) -> dict[int, dict[int, float]]:
    """Errors by size, by seed; cells whose number is not known are left out."""
    found: dict[int, dict[int, float]] = {}
    for line in lines:
        value = line["numbers"].get(who, {}).get(metric)
        if value is not None:
            error = 1 - value if ERRORS[metric].startswith("1 -") else value
            found.setdefault(line["size"], {})[line["seed"]] = error
    return found


_WHO = (NETWORK, CONNECTIVITY)


def _compute(recipe: Recipe, options: argparse.Namespace) -> int:
    """Smaller cells of all seeds first: a curve is there early."""
    options.out.mkdir(parents=True, exist_ok=True)
    results, status, version = options.out / "results.jsonl", DONE, open_dataset(recipe.data.url).generation_digest
    for size in sorted(set(options.sizes)):
        for seed in dict.fromkeys(options.seeds):
            own = cell_recipe(recipe, size=size, seed=seed)
            digest = digest_of(own, version=version)
            if any(line["digest"] == digest for line in read_lines(results)):
                continue
            begun = time.perf_counter()
            try:
                # Of its own name: a cell that another recipe was stopped in must not be gone on with.
                folder = options.out / "cells" / f"{size}-{seed}-{digest}"
                found = compute_cell(own, folder=folder, with_baseline=not options.no_baseline)
            except UsageError as error:  # so few subjects may lack a class: the others are computed all the same
                print(f"learning_curve: {size} groups, seed {seed}: failed: {error}", file=sys.stderr, flush=True)
                status = FAILED
                continue
            if found is None:
                print("learning_curve: stopped after a checkpoint; the same command goes on", file=sys.stderr)
                return STOPPED
            seconds = round(time.perf_counter() - begun, 1)
            line = {"size": size, "seed": seed, "digest": digest, "numbers": found, "seconds": seconds}
            append(results, line)
            print(f"{size} groups, seed {seed}: {_told(found)} in {seconds} s", flush=True)
    return status


def _draw(recipe: Recipe, options: argparse.Namespace) -> None:
    """The picture, the table and the fits of the cells that are there."""
    version = open_dataset(recipe.data.url).generation_digest
    cells = [cell_recipe(recipe, size=size, seed=seed) for size in options.sizes for seed in options.seeds]
    wanted = {digest_of(one, version=version) for one in cells}
    lines = [line for line in read_lines(options.out / "results.jsonl") if line["digest"] in wanted]
    metric = options.metric or ("mae" if recipe.objective.kind == "regression" else "auroc")
    if metric == "auroc" and not any("auroc" in numbers for line in lines for numbers in line["numbers"].values()):
        metric = "balanced_accuracy"  # of several classes
    errors = {who: errors_of(lines, who, metric) for who in _WHO}
    fits = {who: fit_with_interval(points) for who, points in errors.items() if len(points) >= 2}
    if not any(errors.values()):
        print("learning_curve: no cell is finished, nothing to draw", file=sys.stderr)
        return
    (options.out / "curve.md").write_text(table(lines, metric, fits), encoding="utf-8")
    laws = {
        who: {**dataclasses.asdict(fit.law), "exponent_interval": [None if math.isnan(x) else x for x in fit.exponent]}
        for who, fit in fits.items()
    }
    (options.out / "fit.json").write_text(json.dumps({"metric": metric, "laws": laws}, indent=1) + "\n")
    _picture(errors, fits, metric, options.out / "curve.png")
    print(table(lines, metric, fits), end="")


def _picture(
    errors: Mapping[str, Mapping[int, Mapping[int, float]]], fits: Mapping[str, Fit], metric: str, path: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (who, points) in enumerate(errors.items()):
        colour = f"C{number}"
        flat = [(size, error) for size, row in points.items() for error in row.values()]
        if not flat:
            continue
        axes.plot(*zip(*flat, strict=True), "o", color=colour, markersize=3, alpha=0.5)
        label = who
        if who in fits:
            fit = fits[who]
            low, high = fit.exponent
            label = f"{who}: n^-{fit.law.exponent:.2f} [{low:.2f}, {high:.2f}]"
            axes.plot(fit.grid, fit.curve, color=colour)
            axes.fill_between(fit.grid, fit.low, fit.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot([], [], "o-", color=colour, label=label)
    axes.set(xscale="log", xlabel="training groups", ylabel=f"{ERRORS[metric]}, test subjects")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _require_curve(recipe: Recipe, options: argparse.Namespace) -> None:
    if not recipe.objective.is_supervised:
        raise UsageError(f"objective.kind {recipe.objective.kind!r} has no target; a curve is of test numbers")
    if not recipe.data.url:
        raise UsageError(f"{options.recipe}: data.url is not set; pass --set data.url=URL of a converted dataset")
    if recipe.data.train_groups is not None:
        raise UsageError("data.train_groups is what the curve varies; leave it out of the recipe")
    if not recipe.data.test_split:
        raise UsageError("data.test_split is empty; a curve is of test numbers")


def _test_numbers(report: Mapping[str, Any]) -> dict[str, float | None]:
    numbers = report.get("test", {}).get("metrics", {})
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _told(found: Mapping[str, Mapping[str, float | None]]) -> str:
    parts = []
    for who, numbers in found.items():
        name = next((one for one in ERRORS if numbers.get(one) is not None), None)
        parts.append(f"{who} {name} {numbers[name]:.3f}" if name else f"{who} has no number")
    return ", ".join(parts)


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{sum(known) / len(known):.3f} ({min(known):.3f} to {max(known):.3f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learning_curve", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file, or a name in train/recipes")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the cells, the picture and the table")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe")
    parser.add_argument("--sizes", type=int, nargs="+", required=True, metavar="N", help="training groups")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument(
        "--metric", choices=sorted(ERRORS), help="default: auroc, balanced_accuracy or mae by the target"
    )
    parser.add_argument("--no-baseline", action="store_true", help="leave functional connectivity out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
