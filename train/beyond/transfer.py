"""How a network does elsewhere, right after it was trained: data of `eval.urls`, every one scored once, nothing fitted anew.

    OUT/report.json              gets `transfer`: numbers and intervals of each URL, or why there are none
        transfer/0/...           what `--task predict` writes of the first URL, and so on

Statistics, grids, codings and thresholds are those of the run. What goes wrong with a URL is said there and costs neither
the run's own report nor the other URLs.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fmristream.errors import FmriStreamError, SplitError, UsageError
from fmristream.storage.urls import display_url
from train.beyond.opened import ALL, Opened, open_for
from train.beyond.places import new_folder, together
from train.beyond.predict import WindowScores, about, score_windows, table_of, write_tables
from train.beyond.trained import Trained, load_trained
from train.config import Recipe
from train.data import open_clips, training_part
from train.files import read_json, write_json
from train.launch import World, main_first
from train.leaks import PairAudit, audit_pair
from train.predictions import PredictionTable
from train.summary import report_of

# How long the other ranks wait for rank 0's bootstrap and files: an hour.
_WRITING_S = 3600.0


def score_elsewhere(recipe: Recipe, *, out: Path, world: World) -> None:
    """Score the finished run in `out` on every URL of its recipe and put that into its report; prints a table.

    Raises:
        FmriStreamError: the run has no whole checkpoint.
    """
    trained = together(world, lambda: load_trained(str(out)))
    found = [
        _entry(trained, url, out=out / "transfer" / str(place), world=world)
        for place, url in enumerate(recipe.eval.urls)
    ]
    if world.is_main:
        add_to_report(out / "report.json", {"transfer": found})
        print_transfer(found)


def add_to_report(path: Path, parts: Mapping[str, Any]) -> None:
    """Put more into a report: the old one or the new one is there, never half of one."""
    write_json(path, {**(read_json(path) or {}), **parts})


def _entry(trained: Trained, url: str, *, out: Path, world: World) -> dict[str, Any]:
    """What there is to say of one URL, on rank 0; others get nothing."""
    entry: dict[str, Any] = {"url": display_url(url)}
    try:
        with ExitStack() as stack:
            opened = together(world, lambda: _opened(trained, url, world, stack))
            notes = _without_leaks(trained, opened)
            scores = score_windows(opened)
            found: dict[str, Any] = {}
            with main_first(world, timeout_s=_WRITING_S):
                if world.is_main:
                    found = _written(opened, scores, url=url, out=out, notes=notes)
            return entry | found
    except (FmriStreamError, OSError) as error:
        return entry | {"error": str(error)}


def _written(opened: Opened, scores: WindowScores, *, url: str, out: Path, notes: Sequence[str]) -> dict[str, Any]:
    """What the report says of a URL, after its tables are written; rank 0's failures are said here: others wait for it."""
    try:
        table = table_of(opened, scores, url=url, split=ALL)
        with new_folder(out, replaces=True) as folder:
            write_tables(folder, table, about(opened, url=url, split=ALL, where=""))
        targets = numbers_of(table, there=opened.truth)
    except (FmriStreamError, OSError) as error:
        return {"error": str(error)}
    return {"notes": [*opened.told, *notes], "windows": opened.clips.num_windows, "targets": targets}


def _opened(trained: Trained, url: str, world: World, stack: ExitStack) -> Opened:
    """The data, if they have a target; else UsageError."""
    opened = open_for(trained, url, world=world, stack=stack)
    if not opened.truth:
        raise UsageError(f"{display_url(url)}: has no column {' or '.join(trained.targets)}; nothing to score")
    return opened


def _without_leaks(trained: Trained, opened: Opened) -> list[str]:
    """What is to be said of what the data share with the training runs, on rank 0, which alone compares.

    Raises:
        SplitError: a training run, its subject or its family is certainly among them; on every rank.
        EngineError: rank 0 could not compare.
    """
    world, found, failure = opened.world, None, None
    with main_first(world, timeout_s=_WRITING_S):  # others wait as long as the fingerprints take
        try:
            found = _audit(trained, opened) if world.is_main else None
        except (FmriStreamError, OSError) as error:
            failure = error
    together(world, lambda: _raise(failure))
    if certain := world.from_main(found.certain if found is not None else 0):
        counts = "" if found is None else f" ({_counts(found)})"
        raise SplitError(
            f"{opened.clips.dataset.store.name}: some of it were trained on: {certain} runs, subjects or families{counts}; a "
            "score would not be one of new data: leave them out of the one or the other"
        )
    if found is None or not found.suspected:
        return []
    return [
        f"{found.alike} runs look like copies of training runs, {found.same_label} subjects are called like training "
        "subjects, which may be chance: look at them (fmristream audit)"
    ]


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _audit(trained: Trained, opened: Opened) -> PairAudit:
    source, chosen = training_part(trained.recipe)
    training = open_clips(trained.recipe, source=source, split=chosen, normalize="none", window=None)
    return audit_pair(training, opened.clips, names=("train", "elsewhere"))


def _counts(found: PairAudit) -> str:
    what = {"runs": found.same_run, "subjects": found.same_subject, "families": found.same_family}
    return ", ".join(f"{count} {name}" for name, count in what.items() if count)


def numbers_of(table: PredictionTable, *, there: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of each target of data elsewhere, computed as a run's own; `there` are those that the data have."""
    report = report_of(table)
    targets = report.get("targets", {report.get("target"): report})
    found = {}
    for name, numbers in targets.items():
        part = numbers.get(ALL)
        if part is None:
            found[name] = {"error": "no subject has a known value" if name in there else "the data have no such column"}
            continue
        told = {key: numbers[key] for key in ("unit", "threshold") if key in numbers}
        found[name] = told | {key: value for key, value in part.items() if key != "subjects"}
    return found


def print_transfer(found: Sequence[Mapping[str, Any]]) -> None:
    """A row per URL and target."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="elsewhere, nothing fitted anew (95 % bootstrap interval)")
    for name in ("data", "target", "n", "numbers"):
        table.add_column(name)
    for entry in found:
        if "error" in entry:
            table.add_row(entry["url"], "", "", f"not scored: {entry['error']}")
        for target, numbers in entry.get("targets", {}).items():
            if "error" in numbers:
                table.add_row(entry["url"], target, "", f"not scored: {numbers['error']}")
                continue
            told = [
                f"{name} {value:.3f}{_interval(numbers, name)}"
                for name, value in numbers["metrics"].items()
                if value is not None
            ]
            table.add_row(entry["url"], target, str(numbers["num_subjects"]), "\n".join(told))
    console = Console()
    console.print(table)
    for entry in found:
        for note in entry.get("notes", ()):
            console.print(f"note: {entry['url']}: {note}")


def _interval(numbers: Mapping[str, Any], name: str) -> str:
    low, high = numbers["intervals"].get(name) or (None, None)
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
