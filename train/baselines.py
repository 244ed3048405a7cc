"""What stands beside every network: functional connectivity of the same frames, and what the scan alone tells.

    python -m train.baselines RECIPE --set data.url=URL --out DIR            both, scored like a network
    python -m train.baselines runs/age/recipe.toml --beside runs/age ...     and the paired difference to that network

The same split, windows, subjects, coding and metrics as the recipe's network has; fitted on the training subjects alone.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmristream.errors import FmriStreamError, UsageError
from train import metrics
from train.baselines_connectivity import connectivity_features
from train.baselines_fit import Features, Floats, Kind, Reader, fit_reader, require_scikit_learn
from train.baselines_nuisance import nuisance_features
from train.config import Recipe, load_recipe
from train.data import Part, fitted_of, open_part
from train.evaluate import Subjects
from train.launch import World

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset
    from train.objectives import Objective

CONNECTIVITY, NUISANCE = "functional connectivity", "nuisance"
PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baseline:
    """A fitted baseline and what it says of the subjects of each part, as a network's subjects are scored.

    `objective` is that of the recipe's network, where there is a recipe.
    """

    name: str
    reader: Reader
    parts: Mapping[str, Subjects]
    objective: "Objective | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A number of a network, of a baseline on the same subjects, and the network's minus the baseline's."""

    metric: str
    network: float
    baseline: float
    difference: float
    interval: tuple[float, float]  # of the difference: 95 %, the same subjects drawn for both


def fit_baseline(
    name: str, features: Mapping[str, Features], truth: Mapping[str, float], *, kind: Kind, seed: int = 0
) -> Baseline:
    """Fit on the part called `train` and score every part.

    Args:
        name: of the baseline.
        features: of each part's subjects.
        truth: the coded target of every subject (`coded_truth`); subjects without one are left out.
        kind: classification or regression.
        seed: of the division into folds.

    Raises:
        UsageError: a subject is in two parts, or the training subjects do not allow a fit.
    """
    labels = [label for part in features.values() for label in part.subject]
    if len(labels) != len(set(labels)):
        raise UsageError(
            f"{name}: {len(labels) - len(set(labels))} subjects are in two parts; give parts that share none"
        )
    known = {
        part: rows.of([label for label in rows.subject if np.isfinite(truth.get(label, np.nan))])
        for part, rows in features.items()
    }
    wanted = {part: np.array([truth[label] for label in rows.subject]) for part, rows in known.items()}
    reader = fit_reader(known["train"], wanted["train"], kind=kind, seed=seed)
    scored = {
        part: Subjects(label=rows.subject, truth=wanted[part], score=reader.scores(rows.values))
        for part, rows in known.items()
        if len(rows.subject)
    }
    return Baseline(name=name, reader=reader, parts=scored)


def coded_truth(clips: "StreamingDataset", objective: "Objective") -> dict[str, float]:
    """The target of every selected subject as metrics want it, from the float32 numbers that batches carry."""
    values = np.array(clips.target_values[objective.target], dtype=np.float32).astype(np.float64)
    return dict(zip(sorted(set(clips.subjects)), objective.truth(values).tolist(), strict=True))


def paired_differences(
    network: Subjects,
    baseline: Subjects,
    *,
    kind: Kind,
    thresholds: tuple[float, float] = (0.0, 0.0),
    draws: int = 2000,
) -> list[Difference]:
    """The network against a baseline, subject by subject: what a verdict rests on.

    Args:
        network: its scored subjects.
        baseline: the same subjects, in any order.
        kind: of the target.
        thresholds: of the network and the baseline, above which a subject of two classes is told positive.
        draws: of the bootstrap.

    Raises:
        UsageError: the subjects or their truths are not the same.
    """
    place = {label: row for row, label in enumerate(baseline.label)}
    if set(place) != set(network.label):
        raise UsageError(
            f"{len(set(network.label) ^ set(place))} subjects were scored by one of the two only (network {len(network.label)}, "
            f"baseline {len(place)}); give the same part of the same dataset"
        )
    rows = [place[label] for label in network.label]
    truth = network.truth
    if not np.allclose(truth, baseline.truth[rows], rtol=1e-6):
        raise UsageError("network and baseline were scored against different truths; give the same target and coding")
    pairs = (network.score, baseline.score[rows])
    told = (_told(pairs[0], thresholds[0]), _told(pairs[1], thresholds[1]))
    measured: dict[str, tuple[metrics.Metric, tuple[Floats, Floats]]]
    if kind == "regression":
        measured = {"mae": (metrics.mean_absolute_error, pairs), "r": (metrics.pearson_r, pairs)}
    elif pairs[0].ndim == 1:
        measured = {"auroc": (metrics.auroc, pairs), "balanced_accuracy": (metrics.balanced_accuracy, told)}
    else:
        measured = {"accuracy": (metrics.accuracy, told), "balanced_accuracy": (_mean_recall, told)}
    return [
        _difference(name, metric, truth, *both, draws=draws, stratify=kind == "classification")
        for name, (metric, both) in measured.items()
    ]


def recipe_baselines(
    recipe: Recipe, *, atlas: str | None = None, block: int = 0, columns: Sequence[str] | None = None
) -> list[Baseline]:
    """Both baselines of a recipe's data and target.

    Args:
        recipe: of a network.
        atlas: first digits of an atlas whose parcels are stored with the runs, "" where they have one; None for cubes
            of the network's own input.
        block: voxels along a cube; a sixth of the grid where it is 0.
        columns: of the participants table that the nuisance baseline may use; see `nuisance_features`.
    """
    from train.targets import objective_of

    require_scikit_learn()
    with ExitStack() as stack:
        parts = _open_parts(recipe, stack)
        objective = objective_of(recipe, parts)
        if objective is None:
            raise UsageError(
                f"objective.kind {recipe.objective.kind!r} has no target to read; give a recipe of classification or regression"
            )
        truth = {label: value for part in parts.values() for label, value in coded_truth(part.clips, objective).items()}
        dataset = parts["train"].clips.dataset
        runs = [run for part in parts.values() for run in part.clips.runs]
        scan = nuisance_features(dataset, runs, target=objective.target, columns=columns)
        seen = parts if atlas is None else _open_parts(_of_parcels(recipe, atlas), stack)
        connectivity = {name: connectivity_features(part, block=block) for name, part in seen.items()}
    beside = {name: scan.of(part.subject) for name, part in connectivity.items()}
    found = [
        fit_baseline(name, features, truth, kind=objective.kind, seed=recipe.train.seed)
        for name, features in ((CONNECTIVITY, connectivity), (NUISANCE, beside))
    ]
    return [dataclasses.replace(baseline, objective=objective) for baseline in found]


def summary(baseline: Baseline, recipe: Recipe) -> dict[str, Any]:
    """The numbers of a baseline in the form of a network's report.json."""
    from train.loop import Outcome
    from train.report import summarise
    from train.tasks import Inputs, Supervised

    parts = baseline.parts
    assert baseline.objective is not None, "baselines of a recipe have its objective"
    # A report asks for the objective alone: no batch comes.
    task = Supervised(objectives=(baseline.objective,), inputs=Inputs(takes="volume", names=frozenset()))
    report = summarise(Outcome(step=0, task=task, val=parts.get("val"), test=parts.get("test")), recipe)
    facts = {"baseline": baseline.name, "penalty": baseline.reader.penalty, "features": len(baseline.reader.centre)}
    return facts | {key: value for key, value in report.items() if key != "step"}


def beside_network(
    report: Mapping[str, Any], network: Mapping[str, Any], *, kind: Kind, draws: int
) -> list[Difference]:
    """The paired differences of test subjects between two reports: a network's and a baseline's `summary`."""
    for one in (report, network):
        if "test" not in one:
            raise UsageError("a report has no test subjects to compare on; give data.test_split")
    subjects = [_subjects_of(one["test"]["subjects"]) for one in (network, report)]
    thresholds = (float(network.get("threshold", 0.0)), float(report.get("threshold", 0.0)))
    return paired_differences(*subjects, kind=kind, thresholds=thresholds, draws=draws)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit both baselines of a recipe, write baselines.json and print the tables; the exit status is 0, 1 or 2."""
    options = _parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        if not recipe.data.url:
            raise UsageError(f"{options.recipe}: data.url is not set; pass --set data.url=URL of a converted dataset")
        network = None if options.beside is None else _read_report(options.beside / "report.json")
        found = recipe_baselines(recipe, atlas=options.atlas, block=options.block, columns=options.columns)
        _write(found, recipe, network=network, out=options.out)
    except FmriStreamError as error:
        print(f"baselines: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _write(found: Sequence[Baseline], recipe: Recipe, *, network: Mapping[str, Any] | None, out: Path) -> None:
    from train.log import for_json

    draws = recipe.eval.bootstrap_draws
    reports = []
    for baseline in found:
        report = summary(baseline, recipe)
        print(f"{baseline.name}: {report['features']} features, penalty {report['penalty']:.2g}")
        for part in ("val", "test"):
            _print_numbers(part, report)
        if network is not None:
            rows = beside_network(report, network, kind=baseline.reader.kind, draws=draws)
            report["network_minus_baseline"] = [dataclasses.asdict(row) for row in rows]
            for row in rows:
                low, high = row.interval
                print(f"  network minus baseline, {row.metric}: {row.difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        reports.append(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "baselines.json").write_text(
        json.dumps(for_json(reports), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    print(f"written: {out / 'baselines.json'}")


def _print_numbers(part: str, report: Mapping[str, Any]) -> None:
    if part not in report:
        return
    found = report[part]
    told = (
        f"{key} {found['metrics'][key]:.3f} [{low:.3f}, {high:.3f}]" for key, (low, high) in found["intervals"].items()
    )
    print(f"  {part}, {found['num_subjects']} subjects: {', '.join(told)}")


def _open_parts(recipe: Recipe, stack: ExitStack) -> dict[str, Part]:
    """Every part in stored order, cut as the network sees it: training windows by the training's stride."""
    names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    as_trained = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, stride=None))
    world, folder = World(), Path(stack.enter_context(tempfile.TemporaryDirectory()))
    fitted = fitted_of(recipe, out=folder, world=world)
    return {
        part: open_part(
            as_trained if part == "train" else recipe, split=split, seed=None, world=world, stack=stack, fitted=fitted
        )
        for part, split in names.items()
        if split
    }


def _of_parcels(recipe: Recipe, atlas: str) -> Recipe:
    parcels: Any = f"parcels:{atlas}" if atlas else "parcels"
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, normalize=parcels, grid=None))


def _difference(
    name: str, metric: metrics.Metric, truth: Floats, one: Floats, other: Floats, *, draws: int, stratify: bool
) -> Difference:
    def minus(truth: Floats, both: Floats) -> float:
        return metric(truth, both[:, 0]) - metric(truth, both[:, 1])

    low, high = metrics.bootstrap_interval(minus, truth, np.stack([one, other], axis=1), draws=draws, stratify=stratify)
    measured = metric(truth, one), metric(truth, other)
    return Difference(
        metric=name,
        network=measured[0],
        baseline=measured[1],
        difference=measured[0] - measured[1],
        interval=(low, high),
    )


def _told(score: Floats, threshold: float) -> Floats:
    """The class that a subject is told to have."""
    told = score > threshold if score.ndim == 1 else score.argmax(axis=1)
    return np.asarray(told, dtype=np.float64)


def _mean_recall(truth: Floats, told: Floats) -> float:
    """Mean over classes of the share that is told right."""
    return float(np.mean([np.mean(told[truth == value] == value) for value in np.unique(truth)]))


def _subjects_of(rows: Sequence[Mapping[str, Any]]) -> Subjects:
    return Subjects(
        label=tuple(str(row["subject"]) for row in rows),
        truth=np.array([row["truth"] for row in rows], dtype=np.float64),
        score=np.array([row["score"] for row in rows], dtype=np.float64),
    )


def _read_report(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror}; give the --out folder of a finished run"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: is not the report of a run: {error}; finish the run again") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.baselines",
        description="Score functional connectivity and a nuisance-only reader as the recipe's network is scored.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file, or a name in train/recipes")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where baselines.json is written")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="a finished run to compare with")
    parser.add_argument(
        "--atlas", metavar="DIGITS", help='parcels stored with the runs; "" where they have one (default: cubes)'
    )
    parser.add_argument("--block", type=int, default=0, metavar="VOXELS", help="edge of a cube (default: a sixth)")
    parser.add_argument(
        "--columns", nargs="*", metavar="NAME", help="participants columns of the nuisance reader (default: the usual)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
