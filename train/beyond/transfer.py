"""How a network does elsewhere, right after it was trained: data of `eval.urls`, every one scored once, nothing fitted anew.

    OUT/report.json              gets `transfer`: numbers and intervals of each URL, or why there are none
        transfer/0/...           what `--task predict` writes of the first URL, and so on

Statistics, grids, codings and thresholds are those of the run. What goes wrong with a URL is said there and costs neither
the run's own report nor the other URLs.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fmristream.errors import FmriStreamError, SplitError, UsageError
from fmristream.report.leaks import find_leaks
from fmristream.storage.urls import display_url
from train.beyond.numbers import average_of, centre_of, numbers_of
from train.beyond.opened import Opened, open_for
from train.beyond.places import new_folder, together, write_csv
from train.beyond.predict import (
    WindowScores,
    about,
    frozen_thresholds,
    score_windows,
    scored_subjects,
    subject_rows,
    write_predictions,
)
from train.beyond.trained import Trained, load_trained
from train.config import Recipe
from train.data import open_clips
from train.launch import World, main_first
from train.objectives import Objective

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
    report = json.loads(path.read_text(encoding="utf-8")) | dict(parts)
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _entry(trained: Trained, url: str, *, out: Path, world: World) -> dict[str, Any]:
    """What there is to say of one URL, on rank 0; others get nothing."""
    entry: dict[str, Any] = {"url": display_url(url)}
    try:
        with ExitStack() as stack:
            opened = together(world, lambda: _opened(trained, url, world, stack))
            scores = score_windows(opened)
            found: dict[str, Any] = {}
            with main_first(world, timeout_s=_WRITING_S):
                if world.is_main:
                    found = _written(opened, scores, url=url, out=out)
            return entry | found
    except (FmriStreamError, OSError) as error:
        return entry | {"error": str(error)}


def _written(opened: Opened, scores: WindowScores, *, url: str, out: Path) -> dict[str, Any]:
    """What the report says of a URL, after its tables are written; rank 0's failures are said here: others wait for it."""
    try:
        _write_tables(opened, scores, url=url, out=out)
        targets = {objective.target: _numbers(opened, scores, objective) for objective in opened.trained.objectives}
    except (FmriStreamError, OSError) as error:
        return {"error": str(error)}
    return {"notes": list(opened.told), "windows": opened.clips.num_windows, "targets": targets}


def _write_tables(opened: Opened, scores: WindowScores, *, url: str, out: Path) -> None:
    with new_folder(out, replaces=True) as folder:
        write_predictions(folder / "predictions.parquet", opened, scores, url=url)
        write_csv(folder / "subjects.csv", subject_rows(opened, scores))
        (folder / "about.json").write_text(about(opened, url=url, split="all", where=""), encoding="utf-8")


def _opened(trained: Trained, url: str, world: World, stack: ExitStack) -> Opened:
    """The data, if they have a target and nobody of them was trained on.

    Raises:
        UsageError: there is no target to score.
        SplitError: a training run, or its subject, is among them.
    """
    opened = open_for(trained, url, world=world, stack=stack)
    if not opened.truth:
        raise UsageError(f"{display_url(url)}: has no column {' or '.join(trained.targets)}; nothing to score")
    _refuse_leaks(trained, opened)  # on every rank: none waits for another's reading
    return opened


def _refuse_leaks(trained: Trained, opened: Opened) -> None:
    data = trained.recipe.data
    training = open_clips(trained.recipe, split=data.train_split, normalize="none", window=None)
    certain = find_leaks(training, opened.clips, fingerprints=False).certain
    if certain:
        counts = Counter(leak.kind for leak in certain)
        told = " and ".join(f"{count} of the {kind}" for kind, count in counts.items())
        raise SplitError(
            f"{opened.clips.dataset.store.name}: some of it were trained on ({told}); a score would not be one of new data: "
            "leave them out of the one or the other"
        )


def _numbers(opened: Opened, scores: WindowScores, objective: Objective) -> dict[str, Any]:
    """Metrics and intervals of one target."""
    if objective.target not in opened.truth:
        return {"error": "the data have no such column"}
    subjects = scored_subjects(opened, scores, objective)
    if not subjects.label:
        return {"error": "no subject has a known value"}
    recipe = opened.trained.recipe
    average, draws = average_of(recipe), recipe.eval.bootstrap_draws
    threshold = frozen_thresholds(opened.trained).get(objective.target, centre_of(average))
    found, bounds = numbers_of(subjects, objective, threshold=threshold, draws=draws, average=average)
    facts = {"num_subjects": len(subjects.label), "threshold": threshold, "metrics": found}
    return dict(_plain({**facts, "intervals": {name: list(pair) for name, pair in bounds.items()}}))


def print_transfer(found: Sequence[Mapping[str, Any]]) -> None:
    """A row per URL and target."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="elsewhere, nothing fitted anew (95 % bootstrap interval over subjects)")
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


def _plain(value: Any) -> Any:
    """The same with null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
