"""What a trained network says of data that need not be labelled: every window once, then every run, then every subject.

    OUT/predictions.parquet   a row per window, in stored order
        subjects.csv          a row per subject: the mean over runs of the mean over each run's windows
        about.json            which network, which data, and in which ways these are not those of training

Tables name subjects: they are for those who may see the data.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.storage.urls import display_url
from train.beyond.opened import ALL, Opened, open_for
from train.beyond.places import new_folder, require_free, together, write_csv
from train.beyond.trained import Trained
from train.evaluate import NonFiniteError, target_of, words_of_runs
from train.files import read_json, write_json
from train.launch import World
from train.models.brainlm_heads import FineTuneOutput
from train.objectives import Objective
from train.predictions import (
    FILE,
    About,
    Floats,
    PredictionTable,
    Target,
    Texts,
    require_own_columns,
    require_sound,
    texts_of,
    write_predictions,
)
from train.summary import Average, centre_of
from train.units import all_units, unit_of, window_scores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowScores:
    """One row per window, in the order of their numbers, on every rank."""

    window: NDArray[np.int64]
    run: NDArray[np.int64]  # place in the selection's list of runs
    score: Floats  # (n, k), as `Objective.scores` gives them


def predict(
    trained: Trained,
    url: str,
    *,
    out: Path,
    world: World,
    split: str = ALL,
    where: str = "",
    replaces: bool = False,
) -> tuple[str, ...]:
    """Write what a network says of a dataset as a new folder; returns what there is to say of the data.

    Args:
        trained: a network with a target.
        url: of a converted dataset; its target column is taken along where it has one.
        out: a folder that is not there yet.
        world: who computes.
        split: which part of the data.
        where: a condition that chooses runs.
        replaces: what `out` holds goes.

    Raises:
        FmriStreamError: the network has no target, or the data are not for it; nothing was written.
    """
    if not replaces:
        require_free(out, world)
    with ExitStack() as stack:
        opened = together(world, lambda: open_for(trained, url, split=split, where=where, world=world, stack=stack))
        scores = score_windows(opened)
        if world.is_main:
            table = table_of(opened, scores, url=url, split=split, where=where)
            with new_folder(out, replaces=replaces) as folder:
                write_tables(folder, table, about(opened, url=url, split=split, where=where))
    return opened.told


def score_windows(opened: Opened) -> WindowScores:
    """Every window once, on all ranks together.

    Raises:
        UsageError: the network has no target.
        NonFiniteError: a score is not finite.
    """
    objectives = opened.trained.objectives
    if not objectives:
        raise UsageError(
            f"{opened.trained.source}: the network has no target to predict (objective "
            f"{opened.trained.recipe.objective.kind!r}); use --task embed or --task anomaly"
        )
    network = opened.network

    def share() -> tuple[torch.Tensor, torch.Tensor]:
        number = {run.name: place for place, run in enumerate(opened.clips.runs)}
        keys, values = [torch.zeros((0, 2), dtype=torch.int64)], []
        for batch in opened.batches():
            with torch.inference_mode():
                signal, named = opened.inputs(batch)
                rows = joined_scores(objectives, network(signal, **named)).cpu()
            valid = batch.valid.cpu()
            runs = torch.tensor([number[name] for name in batch.run])
            keys.append(torch.stack([batch.window.cpu(), runs], dim=1)[valid])
            values.append(rows[valid])
        return torch.cat(keys), torch.cat(values) if values else torch.zeros((0, len(score_names(opened.trained))))

    own_keys, own_values = together(opened.world, share)
    keys, values = opened.world.gather(own_keys), opened.world.gather(own_values)
    order = torch.argsort(keys[:, 0], stable=True)
    window, run = np.ascontiguousarray(keys[order].numpy().T)
    score = values[order].double().numpy()
    assert np.array_equal(window, np.arange(opened.clips.num_windows)), "a window was not scored, or twice"
    if not np.isfinite(score).all():
        bad = window[~np.isfinite(score).all(axis=1)]
        raise NonFiniteError(
            f"the scores of {len(bad)} of {len(window)} windows are not finite, first windows {bad[:8].tolist()}; look at them"
        )
    return WindowScores(window=window, run=run, score=score)


def joined_scores(objectives: Sequence[Objective], found: Any) -> torch.Tensor:
    """(b, k) float32: the scores of each target in turn, from what the network gave."""
    outputs = found.outputs if isinstance(found, FineTuneOutput) else found
    wanted = [objective.outputs for objective in objectives]
    if outputs.shape[1] != sum(wanted):
        raise UsageError(
            f"the network gives {outputs.shape[1]} outputs, its {len(wanted)} targets have {sum(wanted)}; of an import say which "
            "by --set objective.kind"
        )
    parts = torch.split(outputs, wanted, dim=1)
    scores = [objective.scores(part) for objective, part in zip(objectives, parts, strict=True)]
    return torch.cat([one.view(len(one), -1) for one in scores], dim=1)


def run_columns(opened: Opened) -> dict[str, Texts]:
    """What is known of each run of the selection: `run`, `subject`, `session`, `family`, `site` and `split`."""
    return {**words_of_runs(opened.clips), "split": texts_of(opened.clips.runs.column("split"))}


def frames_of(opened: Opened, window: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Which frames windows have: number, first frame, and how many."""
    clips = [opened.clips.clip(int(number)) for number in window]
    start, frames = (np.array([getattr(clip, name) for clip in clips], dtype=np.int64) for name in ("start", "length"))
    return {"window": window, "start_frame": start, "frames": frames}


def table_of(opened: Opened, scores: WindowScores, *, url: str, split: str, where: str = "") -> PredictionTable:
    """The table of all windows.

    A row's split is what was asked for. Of the whole of the data that the network was trained on it is the run's own, so that
    nobody takes scores of training subjects for others; of the whole of other data, whose splits mean nothing here, `all`.
    """
    trained, clips = opened.trained, opened.clips
    about = About(
        step=trained.step,
        objective=trained.recipe.objective.kind,
        targets=targets_of(trained),
        average=frozen_average(trained),
        unit=trained.recipe.eval.unit,
        draws=trained.recipe.eval.bootstrap_draws,
        made_of={"network": network_facts(trained), "data": data_facts(opened, url=url, split=split, where=where)},
        thresholds=frozen_thresholds(trained),
    )
    require_own_columns(about.targets)
    words = {name: column[scores.run] for name, column in run_columns(opened).items()}
    if split != ALL or clips.content_digest != trained.content_digest:
        words["split"] = texts_of([split] * len(scores.run))
    values: dict[str, Floats] = {}
    names = [name for target in about.targets for name in target.scores]
    for target, objective in zip(about.targets, trained.objectives, strict=True):
        known = opened.truth.get(target.name, {})
        values[target.truth] = objective.truth(np.array([known.get(one, np.nan) for one in words["subject"]]))
    values |= {name: np.ascontiguousarray(column) for name, column in zip(names, scores.score.T, strict=True)}
    table = PredictionTable(about=about, words=words, numbers=frames_of(opened, scores.window), values=values)
    require_sound(table)
    return table


def targets_of(trained: Trained) -> tuple[Target, ...]:
    """What the network says something of."""
    return tuple(target_of(objective, trained.labels.get(objective.target, ())) for objective in trained.objectives)


def score_names(trained: Trained) -> list[str]:
    """Of the columns of scores: of each target in turn one, or one a class."""
    return [name for target in targets_of(trained) for name in target.scores]


def write_tables(folder: Path, table: PredictionTable, document: Mapping[str, Any]) -> None:
    """The three files."""
    write_predictions(table, folder / FILE)
    write_csv(folder / "subjects.csv", subject_rows(table))
    write_json(folder / "about.json", document)


def frozen_thresholds(trained: Trained) -> dict[str, float]:
    """By target: above which score a unit is told positive, as validation by the run decided.

    None where another checkpoint than the one that was asked for is the one that it decided for.
    """
    report = _report_of(trained)
    several = {name: part["threshold"] for name, part in report.get("targets", {}).items() if "threshold" in part}
    only = {trained.targets[0]: report["threshold"]} if len(trained.targets) == 1 and "threshold" in report else {}
    return {name: float(value) for name, value in (several | only).items()}


def frozen_average(trained: Trained) -> Average:
    """What of classes is averaged: what those thresholds are of, whatever the recipe said when the checkpoint was written."""
    report = _report_of(trained)
    said = {part["average"] for part in (report, *report.get("targets", {}).values()) if "average" in part}
    return "sigmoid" if said == {"sigmoid"} else "logit" if said else trained.recipe.eval.average


def _report_of(trained: Trained) -> Mapping[str, Any]:
    """The report of the checkpoint; empty where there is none, or it is of another one."""
    report = None if trained.folder is None else read_json(trained.folder / "report.json")
    return report if report is not None and f"step-{report.get('step')}" == trained.name else {}


def subject_rows(table: PredictionTable) -> list[dict[str, Any]]:
    """A row per subject, or session of one where those are scored: windows, and what is told of each target.

    Scores are in the target's unit or logits, with the chances that they mean and the class that they tell.
    """
    targets = table.about.targets
    unit = "session" if any(unit_of(table, target) == "session" for target in targets) else "subject"
    sessions = [one or "" if unit == "session" else "" for one in table.words["session"]]
    row_names = list(zip(table.words["subject"], sessions, strict=True))
    count, first = Counter(row_names), {name: row for row, name in reversed(list(enumerate(row_names)))}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for target in targets:
        names, means = all_units(table, target, unit="session" if unit == "session" else "subject")
        for name, mean in zip(names, means.reshape(len(names), -1), strict=True):
            row = rows.setdefault(name, {"subject": name[0], **({"session": name[1]} if unit == "session" else {})})
            row.setdefault("windows", count[name])
            if np.isfinite(table.values[target.truth]).any():
                row[target.truth] = _named(target, float(table.values[target.truth][first[name]]))
            row |= _told(table.about, target, mean)
    return list(rows.values())


def _told(about: About, target: Target, score: Floats) -> dict[str, Any]:
    """What the scores of a unit say of one target."""
    row: dict[str, Any] = dict(zip(target.scores, score.tolist(), strict=True))
    if not target.classes:
        return row
    several = len(target.scores) > 1
    likely = score if about.average == "sigmoid" else window_scores(score[None], target, "sigmoid")[0]
    each = likely if several else np.array([1 - likely[0], likely[0]])
    row |= {
        f"probability_{target.name}_{word}": float(chance) for word, chance in zip(target.classes, each, strict=True)
    }
    threshold = about.thresholds.get(target.name, centre_of(about.average))
    place = int(score.argmax()) if several else int(score[0] > threshold)
    return row | {f"told_{target.name}": target.classes[place]}


def about(opened: Opened, *, url: str, split: str, where: str) -> dict[str, Any]:
    """What made the tables, as JSON."""
    trained = opened.trained
    return {
        "network": network_facts(trained),
        "data": data_facts(opened, url=url, split=split, where=where),
        "targets": [objective.state() for objective in trained.objectives],
        "thresholds": frozen_thresholds(trained),
        "notes": list(opened.told),
    }


def network_facts(trained: Trained) -> dict[str, Any]:
    """Which network."""
    return {
        "source": display_url(trained.source),
        "checkpoint": trained.name,
        "weights": trained.weights_are,
        "model": trained.recipe.model.name,
    }


def data_facts(opened: Opened, *, url: str, split: str, where: str) -> dict[str, Any]:
    """Which data."""
    clips = opened.clips
    return {
        "url": display_url(url),
        "content_digest": clips.content_digest,
        "selection_digest": clips.selection_digest,
        "split": split,
        "where": where,
        "runs": len(clips.runs),
        "windows": clips.num_windows,
        "subjects": len(set(clips.subjects)),
    }


def _named(target: Target, truth: float) -> Any:
    """A truth as people read it; NaN where it is not known."""
    return target.classes[int(truth)] if target.classes and np.isfinite(truth) else truth
