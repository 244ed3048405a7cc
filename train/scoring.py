"""From a run to its scores: on the way, and once at the end, where test subjects are looked at a single time."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from fmristream.errors import CorruptDataError
from train import evaluate
from train.checkpoint_async import together
from train.checkpoint_manifest import read_manifest
from train.data import Part
from train.evaluate import Subjects, Windows
from train.predictions import FILE, About, PredictionTable, read_predictions
from train.state import Outcome, Run


def look(run: Run, part: Part) -> Mapping[str, float]:
    """Score the validation windows on the way; the numbers are also told."""
    split = run.recipe.data.val_split
    numbers = evaluate.numbers_of(predictions(run, {split: part}))
    if numbers and run.world.is_main:
        run.log.event("eval", {"step": run.step, "split": split, **numbers})
    return numbers


def score(run: Run, part: Part) -> Subjects | Windows:
    """Every subject of a split from every window (of several targets, by the first), or what the task says of all windows."""
    found = evaluate.scores_of(predictions(run, {"part": part}), "part")
    assert found is not None
    return found


def predictions(run: Run, parts: Mapping[str, Part], *, about: About | None = None) -> PredictionTable:
    """Every window of some splits once, on all ranks together."""
    if about is None:
        about = _about(run, parts)
    found = {
        name: (evaluate.predict(run.model, part, task=run.task, world=run.world, bf16=run.bf16), part.clips)
        for name, part in parts.items()
    }
    return evaluate.table_of(found, task=run.task, about=about)


def outcome_of(run: Run, *, step: int, was_finished: bool) -> Outcome:
    """The end of a run: every validation and test window, scored once.

    Args:
        run: with the weights that are scored.
        step: of those; the best ones may be older than the last.
        was_finished: whether it was so when it was started. Then the table of its folder is taken, where it was written by
            this very network; where data or recipe would give other rows they are made anew, which the log says and table
            and report count.
    """
    parts = {name: part for name, part in (("val", run.val), ("test", run.test)) if part is not None}
    if not parts:
        return Outcome(step=step, task=run.task, val=None, test=None)
    now = _about(run, parts)
    now = dataclasses.replace(now, step=step, made_of={**now.made_of, "checkpoint": _checkpoint(run, step)})
    table, before = _kept(run, now, was_finished=was_finished)
    if table is None:
        table = predictions(run, parts, about=dataclasses.replace(now, scorings=before + 1))
    val, test = (evaluate.scores_of(table, split) for split in ("val", "test"))
    return Outcome(step=step, task=run.task, val=val, test=test, table=table)


def _about(run: Run, parts: Mapping[str, Part]) -> About:
    clips = {name: part.clips for name, part in parts.items()}
    return evaluate.about_of(run.recipe, task=run.task, step=run.step, clips=clips)


def _checkpoint(run: Run, step: int) -> str:
    """A digest of the weights that are scored, as their checkpoint lists them.

    The number of a step does not tell them: a folder whose checkpoints were taken away, or are kept elsewhere by now, may
    hold the table of another run.
    """
    shelf = run.saver.shelf
    manifest = together(
        lambda: read_manifest(shelf.folder(f"step-{step}")), run.world, what=f"{shelf.where}: reading step {step}"
    )
    weights = {name: listed.sha256 for name, listed in manifest.files.items() if name.startswith(("model", "ema"))}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def _kept(run: Run, now: About, *, was_finished: bool) -> tuple[PredictionTable | None, int]:
    """(the folder's table, if it is that of this network and recipe; how often it had been scored)."""
    path = run.out / FILE
    table, before, why = None, 0, ""
    if run.world.is_main and path.exists():
        try:
            table = read_predictions(path)
            before, why = table.about.scorings, _why_anew(table.about, now, was_finished=was_finished)
        except CorruptDataError as error:
            before, why = 1, f"damaged: {error}"
        if why:
            run.log.event("scored again", {"step": run.step, "scorings": before + 1, "why": why})
    said = run.world.from_main(before if why or table is None else -1)
    if said >= 0:
        return None, said
    kept = table or read_predictions(path)
    # How rows become numbers is the recipe's of today.
    return dataclasses.replace(kept, about=dataclasses.replace(now, scorings=kept.about.scorings)), kept.about.scorings


def _why_anew(then: About, now: About, *, was_finished: bool) -> str:
    """Why the rows are not those that would be made now; empty where they are."""
    if not was_finished:
        return "the network was trained further"
    if (then.step, then.targets) != (now.step, now.targets):
        return "another step or other targets"
    made_then, made_now = then.made_of, json.loads(json.dumps(now.made_of))
    changed = sorted(name for name in {*made_then, *made_now} if made_then.get(name) != made_now.get(name))
    return f"changed: {', '.join(changed)}" if changed else ""
