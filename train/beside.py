"""Functional connectivity and the nuisance-only reader beside a finished network, and the verdict: paired differences.

    python -m train.beside OUT        the same for a run that lacks them: killed before, or without scikit-learn

The trainer calls it at the end, when the network's own report.json is in place; what ends it in the middle leaves that.
Fitted baselines stay in OUT/baselines.json, and the next start takes them if recipe and data are those.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fmristream
from fmristream.errors import CorruptDataError, FmriStreamError, MissingExtraError, UsageError
from fmristream.storage.urls import redacted
from train.baselines import CONNECTIVITY, NUISANCE, Baseline, recipe_baselines, summary
from train.baselines_paired import as_row, numbers_of, paired_differences, sentence, verdict_metric
from train.config import Recipe, as_tables, load_recipe
from train.evaluate import Subjects
from train.files import read_json, write_json
from train.provenance import read_provenance
from train.report_view import PartView, TargetView, read_report, targets_of

BASELINES_FILE = "baselines.json"

# What baselines are called in sentences.
_CALLED = {
    CONNECTIVITY: "functional connectivity",
    NUISANCE: "a reader of the scan alone (motion, site, timing, length, tSNR)",
}
# A site of fewer test subjects has no row of its own: its numbers would say nothing, and tell single people.
LEAST_OF_SITE = 10
# What of the data's section leaves every sample as it is.
_HOW = ("threads", "prefetch_batches", "audit")
_FORMAT = 3  # 1: intervals over subjects, not families; 2: numbers of sites as quantities


def stand_beside(recipe: Recipe, *, out: Path) -> None:
    """Fit the baselines of a finished run, or take those in `out`, and write the differences into its report.

    Where they cannot be fitted (scikit-learn is missing, too few subjects) the report says so.

    Raises:
        FmriStreamError: the data cannot be read; the report says so too, and the network's numbers stand.
    """
    report = read_report(out)
    views = [view for view in targets_of(report) if view.target is not None]
    if not views:
        return
    if not recipe.eval.baselines:
        _write(out, report, {"status": "left out", "why": "the recipe says eval.baselines = false"})
        return
    try:
        found = _beside(recipe, views, out=out)
    except (MissingExtraError, UsageError) as error:
        found = {"status": "not done", "why": redacted(str(error))}
    except FmriStreamError as error:
        _write(out, report, {"status": "not done", "why": redacted(str(error))})
        raise
    _write(out, report, found)
    print_beside(found)


def print_beside(found: Mapping[str, Any]) -> None:
    """The differences as a table, and what they say."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if found["status"] != "done":
        console.print(f"beside the net: {found['status']}: {found['why']}", markup=False)
        return
    for target, one in found["targets"].items():
        table = Table(title=f"{target}: the net beside baselines, test subjects (95 % paired bootstrap)")
        for column in ("", "net", "baseline", "net - baseline"):
            table.add_column(column)
        for baseline in one["baselines"]:
            for row in baseline["differences"]:
                table.add_row(f"{baseline['name']}: {row['metric']}", *(_cell(row, key) for key in _CELLS))
        console.print(table)
        for said in one["verdict"]:
            console.print(said, markup=False, highlight=False)


_CELLS = ("network", "baseline", "difference")


def _cell(row: Mapping[str, Any], key: str) -> str:
    if not _is_known(row[key]):
        return "not defined"
    if key != "difference":
        return f"{row[key]:.3f}"
    told = " [{:+.3f}, {:+.3f}]".format(*row["interval"]) if all(map(_is_known, row["interval"])) else ""
    return f"{row[key]:+.3f}{told}"


def _is_known(value: float | None) -> bool:
    """Whether it is a number: what is not defined is NaN where it was computed, and null in a file."""
    return value is not None and math.isfinite(value)


def _write(out: Path, report: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    write_json(out / "report.json", {**report, "beside": found})


def _beside(recipe: Recipe, views: Sequence[TargetView], *, out: Path) -> dict[str, Any]:
    digests = read_provenance(out).get("data", {})
    key = _key(recipe, digests)
    kept = _kept(out / BASELINES_FILE, key)
    document = (
        kept if kept is not None else _fit(recipe, key=key, content_digest=digests.get("content_digest"), out=out)
    )
    return {
        "status": "done",
        "reused": kept is not None,
        "seconds": document["seconds"],
        **compared(views, document, draws=recipe.eval.bootstrap_draws),
    }


def compared(views: Sequence[TargetView], document: Mapping[str, Any], *, draws: int) -> dict[str, Any]:
    """Each target of a network beside fitted baselines.

    Args:
        views: what the network's report says of its targets.
        document: baselines.json.
        draws: of the paired bootstrap; families are drawn whole where any are known, else subjects of each class.

    Raises:
        UsageError: network and baselines were not scored on the same subjects and truths.
    """
    family = {str(row["subject"]): str(row["family"]) for row in document["people"] if row["family"] is not None}
    site = {str(row["subject"]): str(row["site"]) for row in document["people"] if row["site"] is not None}
    return {
        "draws": draws,
        "drawn": "families" if family else "subjects",
        "targets": {
            str(view.target): _target(view, document["baselines"], family=family, site=site, draws=draws)
            for view in views
        },
    }


def _fit(recipe: Recipe, *, key: str | None, content_digest: str | None, out: Path) -> dict[str, Any]:
    """Read every window of every part once, fit, and keep what was found."""
    print(
        "beside the net: functional connectivity and nuisance baselines (eval.baselines = false leaves them out)",
        flush=True,
    )
    began = time.perf_counter()
    found = recipe_baselines(recipe, content_digest=content_digest, say=lambda text: print(f"  {text}", flush=True))
    document = {
        "format": _FORMAT,
        "key": key,
        "seconds": round(time.perf_counter() - began, 3),
        "people": _people(found),
        "baselines": [summary(one, recipe) for one in found],
    }
    write_json(out / BASELINES_FILE, document)
    print(f"  done in {document['seconds']:.1f} s; kept in {out / BASELINES_FILE}", flush=True)
    return document


def _people(found: Sequence[Baseline]) -> list[dict[str, Any]]:
    """Everybody who was scored, with family and site where they are known."""
    labels = sorted({label for one in found for part in one.parts.values() for label in part.label})
    family, site = found[0].family, found[0].site
    return [{"subject": label, "family": family.get(label), "site": site.get(label)} for label in labels]


def _target(
    view: TargetView,
    baselines: Sequence[Mapping[str, Any]],
    *,
    family: Mapping[str, str],
    site: Mapping[str, str],
    draws: int,
) -> dict[str, Any]:
    """One target: each baseline's numbers, the differences, and sentences."""
    own = [one for one in baselines if one["target"] == view.target]
    network = view.parts.get("test")
    told, rows = [], []
    for one in own:
        (other,) = targets_of({**one, "targets": None})
        row = {key: one[key] for key in ("features", "penalty", "threshold") if key in one}
        row |= {"name": one["baseline"], "differences": []}
        row |= {part: _numbers(one[part]) for part in ("val", "test") if part in one}
        rows.append(row)
        if network is None or network.subjects is None or "test" not in other.parts:
            told.append(f"{view.target}: there are no test subjects to compare the net and {one['baseline']} on.")
            continue
        test = other.parts["test"].subjects
        assert test is not None, "baselines have a target"
        found = paired_differences(
            network.subjects,
            test,
            kind=view.baseline_kind,
            thresholds=(view.threshold, other.threshold),
            draws=draws,
            family=family,
        )
        row["differences"] = [as_row(difference) for difference in found]
        first = verdict_metric(view.baseline_kind, classes=len(view.classes))
        (chosen,) = [difference for difference in found if difference.metric == first]
        told.append(
            sentence(chosen, target=str(view.target), baseline=_CALLED[one["baseline"]], subjects=len(test.label))
        )
    return {"verdict": told, "baselines": rows, "sites": _sites(view, network, own, site=site)}


def _numbers(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without its subjects, who stand in baselines.json."""
    return {key: value for key, value in part.items() if key != "subjects"}


def _sites(
    view: TargetView, network: PartView | None, baselines: Sequence[Mapping[str, Any]], *, site: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Test subjects by where they were scanned, for sites with enough of them; the last row holds the others together."""
    if network is None or network.subjects is None or not site:
        return []
    models = {"net": (network.subjects, view.threshold)}
    for one in baselines:
        (other,) = targets_of({**one, "targets": None})
        if "test" in other.parts and (subjects := other.parts["test"].subjects) is not None:
            models[str(one["baseline"])] = (subjects, other.threshold)
    members: dict[str, set[str]] = {}
    for label in network.subjects.label:
        members.setdefault(site.get(label, "not known"), set()).add(label)
    small = [name for name, labels in members.items() if len(labels) < LEAST_OF_SITE]
    rows = [
        {
            "site": name,
            "subjects": len(labels),
            "numbers": {
                model: numbers_of(_only(subjects, labels), kind=view.baseline_kind, threshold=threshold)
                for model, (subjects, threshold) in models.items()
            },
        }
        for name, labels in sorted(members.items())
        if name not in small
    ]
    if small:
        rows.append(
            {"site": None, "sites": len(small), "subjects": sum(len(members[name]) for name in small), "numbers": {}}
        )
    return rows


def _only(subjects: Subjects, labels: set[str]) -> Subjects:
    rows = [row for row, label in enumerate(subjects.label) if label in labels]
    return Subjects(
        label=tuple(subjects.label[row] for row in rows), truth=subjects.truth[rows], score=subjects.score[rows]
    )


def _key(recipe: Recipe, data: Mapping[str, Any]) -> str | None:
    """What fitted baselines depend on; None where the folder does not tell what data the network saw."""
    if not data:
        return None
    tables = as_tables(recipe)
    asked = {name: value for name, value in tables["data"].items() if name not in _HOW}
    parts = {name: part["selection_digest"] for name, part in data["parts"].items()}
    known = [
        _FORMAT,
        fmristream.__version__,
        data["content_digest"],
        data["generation_digest"],
        parts,
        asked,
        tables["objective"],
        tables["eval"].get("stride"),
        recipe.eval.bootstrap_draws,
        recipe.train.seed,
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, key: str | None) -> dict[str, Any] | None:
    """Baselines that were fitted before for the same recipe and data."""
    try:
        document = read_json(path)
    except CorruptDataError:  # fitted again
        return None
    if document is None or key is None or document.get("key") != key or document.get("format") != _FORMAT:
        return None
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Put the baselines beside a finished run; the exit status is 0, 1 or 2."""
    parser = argparse.ArgumentParser(prog="python -m train.beside", description="Put baselines beside a finished run.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the run's folder, with report.json and recipe.toml")
    options = parser.parse_args(arguments)
    try:
        from train.html_report import write_html

        stand_beside(load_recipe(str(options.out / "recipe.toml")), out=options.out)
        write_html(options.out)
    except FmriStreamError as error:
        print(f"beside: {redacted(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
