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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmristream.errors import FmriStreamError, UsageError
from train.baselines_connectivity import block_for, connectivity_features
from train.baselines_fit import Features, Kind, Reader, fit_reader, require_scikit_learn
from train.baselines_nuisance import nuisance_of, run_facts
from train.baselines_paired import Difference, clusters, paired_differences
from train.config import Recipe, load_recipe
from train.data import Part, fitted_of, open_part
from train.evaluate import Subjects, words_of_runs
from train.launch import World
from train.participants import FAMILY_COLUMNS, SITE_COLUMNS, words_of

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset
    from train.objectives import Objective

CONNECTIVITY, NUISANCE = "functional connectivity", "nuisance"
# Of a batch that connectivity is computed from.
_BATCH_BYTES = 128 * 1024**2
PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baseline:
    """A fitted baseline and what it says of the subjects of each part, as a network's subjects are scored.

    Attributes:
        name: of the baseline.
        reader: fitted on the training subjects.
        parts: the scored subjects of each.
        objective: that of the recipe's network, where there is a recipe.
        family: of each subject that has one.
        site: of each subject where the participants table tells.
    """

    name: str
    reader: Reader
    parts: Mapping[str, Subjects]
    objective: "Objective | None" = None
    family: Mapping[str, str] = field(default_factory=dict)
    site: Mapping[str, str] = field(default_factory=dict)


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
    family = {
        label: group
        for rows in features.values()
        for label, group in zip(rows.subject, rows.group, strict=True)
        if group != label
    }
    return Baseline(name=name, reader=reader, parts=scored, family=family)


def coded_truth(clips: "StreamingDataset", objective: "Objective") -> dict[str, float]:
    """The target of every selected subject as metrics want it, from the float32 numbers that batches carry."""
    values = np.array(clips.target_values[objective.target], dtype=np.float32).astype(np.float64)
    return dict(zip(sorted(set(clips.subjects)), objective.truth(values).tolist(), strict=True))


def recipe_baselines(
    recipe: Recipe,
    *,
    atlas: str | None = None,
    block: int = 0,
    columns: Sequence[str] | None = None,
    content_digest: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Baseline]:
    """Both baselines of a recipe's data, for each of its targets in turn.

    Args:
        recipe: of a network.
        atlas: first digits of an atlas whose parcels are stored with the runs, "" where they have one; None for cubes
            of the network's own input.
        block: voxels along a cube; where it is 0 a sixth of the grid, or more where there are very many subjects.
        columns: of the participants table that the nuisance baseline may use; see `nuisance_features`.
        content_digest: what the dataset must say, where a network was trained on it before.
        say: told what is read before it is read.

    Raises:
        UsageError: the recipe has no target, the dataset says something else by now, or nothing can be fitted.
        MissingExtraError: scikit-learn is not installed.
    """
    from train.targets import objectives_of

    require_scikit_learn()
    with ExitStack() as stack:
        parts = _open_parts(recipe, stack)
        found_digest = parts["train"].clips.content_digest
        if content_digest is not None and content_digest != found_digest:
            raise UsageError(
                f"the dataset says {found_digest[:12]}, and said {content_digest[:12]} when the network was trained; "
                "train again, or give the version of then"
            )
        objectives = objectives_of(recipe, parts)
        if not objectives:
            raise UsageError(
                f"objective.kind {recipe.objective.kind!r} has no target to read; give a recipe of classification or regression"
            )
        seen = parts if atlas is None else _open_parts(_of_parcels(recipe, atlas), stack)
        subjects = sum(len(set(part.clips.runs.column("subject"))) for part in seen.values())
        block = block or block_for(seen["train"].clips, subjects=subjects)
        say(_cost(seen))
        dataset = parts["train"].clips.dataset
        sites, families = words_of(dataset, SITE_COLUMNS), words_of(dataset, FAMILY_COLUMNS)
        drawn_whole = {label: name for part in parts.values() for label, name in _families(part).items()}
        scans = {run.name: (run, run_facts(dataset, run)) for part in parts.values() for run in part.clips.runs}
        connectivity = {
            name: _kept_together(connectivity_features(part, block=block), families) for name, part in seen.items()
        }
        found = []
        for objective in objectives:
            truth = {
                label: value for part in parts.values() for label, value in coded_truth(part.clips, objective).items()
            }
            scan = _kept_together(
                nuisance_of(dataset, scans.values(), target=objective.target, columns=columns), families
            )
            beside = {name: scan.of(part.subject) for name, part in connectivity.items()}
            for name, features in ((CONNECTIVITY, connectivity), (NUISANCE, beside)):
                fitted = fit_baseline(name, features, truth, kind=objective.kind, seed=recipe.train.seed)
                known = dataclasses.replace(fitted, objective=objective, site=sites, family=drawn_whole)
                found.append(_drawn_whole(known))
    return found


def _kept_together(features: Features, families: Mapping[str, str]) -> Features:
    """With the families of the participants table where the conversion kept nobody together: no fold may part them."""
    group = tuple(
        families.get(subject, group) if group == subject else group
        for subject, group in zip(features.subject, features.group, strict=True)
    )
    return dataclasses.replace(features, group=group)


def _families(part: Part) -> dict[str, str]:
    """The family of each subject that has one, as a network's own intervals draw them."""
    words = words_of_runs(part.clips)
    pairs = zip(words["subject"].tolist(), words["family"].tolist(), strict=True)
    return {subject: family for subject, family in pairs if family is not None}


def _drawn_whole(baseline: Baseline) -> Baseline:
    """With its scored subjects drawn by family."""
    parts = {
        name: dataclasses.replace(part, cluster=clusters(part.label, baseline.family))
        for name, part in baseline.parts.items()
    }
    return dataclasses.replace(baseline, parts=parts)


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
    own = {"target": baseline.objective.target, "objective": baseline.objective.kind}
    return facts | {key: value for key, value in report.items() if key != "step"} | own


def _cost(parts: Mapping[str, Part]) -> str:
    """What will be read, in words."""
    runs = sum(len(part.clips.runs) for part in parts.values())
    windows = sum(part.clips.num_windows for part in parts.values())
    values = sum(part.clips.num_windows * part.clips.window * part.clips.voxels for part in parts.values())
    return f"every window of every part is read once: {runs} runs, {windows} windows, up to {values * 4 / 1e9:.2f} GB of values"


def beside_network(
    report: Mapping[str, Any],
    network: Mapping[str, Any],
    *,
    kind: Kind,
    draws: int,
    family: Mapping[str, str] | None = None,
) -> list[Difference]:
    """The paired differences of test subjects between two reports, a network's and a baseline's `summary`; families whole."""
    for one in (report, network):
        if "test" not in one:
            raise UsageError("a report has no test subjects to compare on; give data.test_split")
    subjects = [_subjects_of(one["test"]["subjects"]) for one in (network, report)]
    thresholds = (float(network.get("threshold", 0.0)), float(report.get("threshold", 0.0)))
    return paired_differences(*subjects, kind=kind, thresholds=thresholds, draws=draws, family=family)


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
    from train.files import write_json

    draws = recipe.eval.bootstrap_draws
    reports = []
    for baseline in found:
        report = summary(baseline, recipe)
        print(f"{baseline.name}: {report['features']} features, penalty {report['penalty']:.2g}")
        for part in ("val", "test"):
            _print_numbers(part, report)
        if network is not None:
            rows = beside_network(report, network, kind=baseline.reader.kind, draws=draws, family=baseline.family)
            report["network_minus_baseline"] = [dataclasses.asdict(row) for row in rows]
            for row in rows:
                low, high = row.interval
                print(f"  network minus baseline, {row.metric}: {row.difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        reports.append(report)
    write_json(out / "baselines.json", reports)
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
    parts = {}
    for part, split in names.items():
        if split:
            one = as_trained if part == "train" else recipe
            with ExitStack() as sizing:
                opened = open_part(one, split=split, seed=None, world=world, stack=sizing, fitted=fitted)
                bounded = _with_small_batches(one, opened)
            parts[part] = open_part(bounded, split=split, seed=None, world=world, stack=stack, fitted=fitted)
    return parts


def _with_small_batches(recipe: Recipe, part: Part) -> Recipe:
    """Batches of a few windows where windows are large: connectivity takes them one by one."""
    clips = part.clips
    window_bytes = 4 * clips.window * clips.voxels * clips.channels
    wanted = recipe.eval.batch_size or recipe.train.batch_size
    fitting = min(wanted, max(1, _BATCH_BYTES // max(1, window_bytes)))
    return dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, batch_size=fitting))


def _of_parcels(recipe: Recipe, atlas: str) -> Recipe:
    parcels: Any = f"parcels:{atlas}" if atlas else "parcels"
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, normalize=parcels, grid=None))


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
