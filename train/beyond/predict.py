"""What a trained network says of data that need not be labelled: every window once, then every run, then every subject.

    OUT/predictions.parquet   a row per window, in stored order
        subjects.csv          a row per subject: the mean over runs of the mean over each run's windows
        about.json            which network, which data, and in which ways these are not those of training

Tables name subjects: they are for those who may see the data.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.catalog.row_tables import FLOAT, INT, TEXT, ColumnKind, Values, write_rows
from fmristream.errors import UsageError
from fmristream.storage.urls import display_url
from train.beyond.numbers import average_of, centre_of, chances, subject_scores
from train.beyond.opened import ALL, Opened, open_for
from train.beyond.places import new_folder, require_free, together, write_csv
from train.beyond.trained import Trained
from train.evaluate import NonFiniteError, Subjects, words_of_runs
from train.launch import World
from train.models.brainlm_heads import FineTuneOutput
from train.objectives import Objective

Floats = NDArray[np.float64]


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
            with new_folder(out, replaces=replaces) as folder:
                write_predictions(folder / "predictions.parquet", opened, scores, url=url)
                write_csv(folder / "subjects.csv", subject_rows(opened, scores))
                (folder / "about.json").write_text(about(opened, url=url, split=split, where=where), encoding="utf-8")
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


def run_columns(opened: Opened) -> dict[str, list[str | None]]:
    """What is known of each run of the selection, by column."""
    runs = opened.clips.runs
    columns: dict[str, list[str | None]] = {name: list(runs.column(name)) for name in ("name", "subject", "session")}
    columns["family"] = list(runs.column("group"))
    columns["split"] = list(runs.column("split"))
    table = opened.clips.dataset.participant_columns
    found = next((name for name in table if name.lower() in ("site", "site_id")), None)
    if found is not None:
        sites = {str(subject): cell for subject, cell in zip(table["subject"], table[found], strict=True)}
        cells = [sites.get(str(subject)) for subject in columns["subject"]]
        columns["site"] = [None if cell is None or cell != cell else str(cell) for cell in cells]
    return columns


def window_columns(
    opened: Opened, window: NDArray[np.int64], run: NDArray[np.int64], known: Mapping[str, list[str | None]]
) -> dict[str, Values]:
    """What windows are: where each comes from and which frames it has; `known` is of `run_columns`."""
    clips = [opened.clips.clip(int(number)) for number in window]
    known = {**known, "family": words_of_runs(opened.clips)["family"].tolist()}  # as the table of a run has it
    columns: dict[str, Values] = {
        "split": [known["split"][place] for place in run],
        "window": window,
        "run": [known["name"][place] for place in run],
    }
    for name in ("subject", "session", "family", "site"):
        if name in known:
            columns[name] = [known[name][place] for place in run]
    columns["start_frame"] = np.array([clip.start for clip in clips], dtype=np.int64)
    columns["frames"] = np.array([clip.length for clip in clips], dtype=np.int64)
    return columns


def kinds_of(columns: Mapping[str, Values]) -> dict[str, ColumnKind]:
    """What these columns hold."""
    found = {}
    for name, values in columns.items():
        is_whole = not isinstance(values, list) and values.dtype.kind == "i"
        found[name] = TEXT if isinstance(values, list) else INT if is_whole else FLOAT
    return found


def write_predictions(path: Path, opened: Opened, scores: WindowScores, *, url: str) -> None:
    """The table of all windows."""
    trained = opened.trained
    columns = window_columns(opened, scores.window, scores.run, run_columns(opened))
    for target, truth in opened.truth.items():
        (objective,) = (one for one in trained.objectives if one.target == target)
        values = np.array([truth[str(subject)] for subject in columns["subject"]])
        columns[f"truth_{target}"] = objective.truth(values)
    for name, column in zip(score_names(trained), scores.score.T, strict=True):
        columns[name] = np.ascontiguousarray(column)
    facts = {
        "objectives": [objective.state() for objective in trained.objectives],
        "class_names": {objective.target: list(trained.class_names(objective)) for objective in trained.objectives},
    }
    with write_rows(path, kinds_of(columns), facts={**facts, "url": display_url(url)}) as table:
        table.add(columns)


def score_names(trained: Trained) -> list[str]:
    """Of the columns of scores: of each target in turn one, or one a class."""
    found = []
    for objective in trained.objectives:
        classes = trained.class_names(objective) if objective.classes else ()
        found += [f"score_{objective.target}_{name}" for name in classes] or [f"score_{objective.target}"]
    return found


def subjects_of(opened: Opened, scores: WindowScores) -> tuple[list[str], dict[str, Floats]]:
    """(labels, by target (subjects, k) mean scores)."""
    trained, average = opened.trained, average_of(opened.trained.recipe)
    labels, label_of_run = np.unique(opened.clips.subjects, return_inverse=True)
    of_window = label_of_run[scores.run]
    ends = np.cumsum([objective.outputs for objective in trained.objectives])
    found, places = {}, np.zeros(0, dtype=np.int64)
    for objective, part in zip(trained.objectives, np.split(scores.score, ends[:-1], axis=1), strict=True):
        places, found[objective.target] = subject_scores(
            part, objective, runs=scores.run, subjects=of_window, average=average
        )
    return [str(labels[place]) for place in places], found


def scored_subjects(opened: Opened, scores: WindowScores, objective: Objective) -> Subjects:
    """Subjects of whom a target is known, as evaluation has them."""
    labels, means = subjects_of(opened, scores)
    truth = np.array([opened.truth[objective.target].get(label, np.nan) for label in labels])
    known = np.flatnonzero(np.isfinite(truth))
    kept = means[objective.target][known]
    # Drawn as the end of a run draws: families whole.
    words = words_of_runs(opened.clips)
    family = dict(zip(words["subject"].tolist(), words["family"].tolist(), strict=True))
    names = [labels[place] for place in known]
    cluster = tuple(f"subject {one}" if family[one] is None else f"family {family[one]}" for one in names)
    return Subjects(
        cluster=cluster if len(set(cluster)) < len(cluster) else (),
        label=tuple(labels[place] for place in known),
        truth=objective.truth(truth[known]),
        score=kept[:, 0] if objective.outputs == 1 else kept,
    )


def frozen_thresholds(trained: Trained) -> dict[str, float]:
    """By target: above which score a subject is told positive, as validation subjects of the run decided.

    None where another checkpoint than the one that was asked for is the one that they decided for.
    """
    if trained.folder is None or not (trained.folder / "report.json").is_file():
        return {}
    report = json.loads((trained.folder / "report.json").read_text(encoding="utf-8"))
    if f"step-{report.get('step')}" != trained.name:
        return {}
    several = {name: part["threshold"] for name, part in report.get("targets", {}).items() if "threshold" in part}
    only = {trained.targets[0]: report["threshold"]} if len(trained.targets) == 1 and "threshold" in report else {}
    return {name: float(value) for name, value in (several | only).items()}


def subject_rows(opened: Opened, scores: WindowScores) -> list[dict[str, Any]]:
    """A row per subject: windows, scores in the target's unit or as logits, probabilities and the class that they tell."""
    trained = opened.trained
    labels, means = subjects_of(opened, scores)
    of_run = opened.clips.subjects
    count = Counter(of_run[place] for place in scores.run.tolist())
    thresholds, centre = frozen_thresholds(trained), centre_of(average_of(trained.recipe))
    rows: list[dict[str, Any]] = []
    for number, label in enumerate(labels):
        row: dict[str, Any] = {"subject": label, "windows": count[label]}
        for objective in trained.objectives:
            target = objective.target
            if target in opened.truth:
                row[f"truth_{target}"] = _named(trained, objective, opened.truth[target][label])
            row |= _told(trained, objective, means[target][number], threshold=thresholds.get(target, centre))
        rows.append(row)
    return rows


def _told(trained: Trained, objective: Objective, score: Floats, *, threshold: float) -> dict[str, Any]:
    """What the scores of a subject say of one target."""
    target, classes = objective.target, trained.class_names(objective)
    if not classes:
        return {f"score_{target}": float(score[0])}
    names = [f"score_{target}_{name}" for name in classes] if objective.classes else [f"score_{target}"]
    row: dict[str, Any] = dict(zip(names, score.tolist(), strict=True))
    likely = score if average_of(trained.recipe) == "sigmoid" else chances(score[None], objective)[0]
    each = likely if objective.classes else np.array([1 - likely[0], likely[0]])
    row |= {f"probability_{target}_{name}": float(chance) for name, chance in zip(classes, each, strict=True)}
    return row | {f"told_{target}": classes[int(score.argmax()) if objective.classes else int(score[0] > threshold)]}


def about(opened: Opened, *, url: str, split: str, where: str) -> str:
    """What made the tables, as JSON."""
    trained, clips = opened.trained, opened.clips
    document = {
        "network": {"source": trained.source, "checkpoint": trained.name, "model": trained.recipe.model.name},
        "data": {
            "url": display_url(url),
            "content_digest": clips.content_digest,
            "split": split,
            "where": where,
            "runs": len(clips.runs),
            "windows": clips.num_windows,
            "subjects": len(set(clips.subjects)),
        },
        "targets": [objective.state() for objective in trained.objectives],
        "thresholds": frozen_thresholds(trained),
        "notes": list(opened.told),
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _named(trained: Trained, objective: Objective, value: float) -> Any:
    """A truth as people read it."""
    if not objective.values or not np.isfinite(value):
        return value
    return trained.class_names(objective)[int(np.abs(np.array(objective.values) - value).argmin())]
