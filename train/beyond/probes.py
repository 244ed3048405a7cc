"""What else the features of a network know: targets, and site, scanner and motion, read by linear maps and neighbours.

    OUT/embeddings/...   the vectors (`train/beyond/embed.py`)
        probes.json      every number, its interval, and chance
        probes.md        the same as a table

A network that tells sites or motion as well as its target may rest on them: the table stands beside its score.
"""

import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmristream import open as open_dataset
from fmristream.catalog.row_tables import read_rows
from fmristream.errors import UsageError
from fmristream.storage.urls import display_url
from train.baselines_fit import Features, require_scikit_learn
from train.baselines_nuisance import framewise_displacement_mm
from train.beyond.embed import embed
from train.beyond.places import new_folder, require_free
from train.beyond.predict import network_facts
from train.beyond.probe_readers import READERS, Found, Question, read
from train.beyond.trained import Trained
from train.files import write_json, write_whole
from train.launch import World
from train.participants import SITE_COLUMNS, word_of

if TYPE_CHECKING:
    from fmristream.shards.dataset import Dataset

PARTS = ("train", "val", "test")
MOTION = "mean_fd_mm"
# Columns that say where and by what somebody was scanned, whatever their case.
_PLACES = (*SITE_COLUMNS, "scanner_id", "manufacturer")
# Numbers of so few values are classes.
_MOST_CODES = 2


def probe(
    trained: Trained,
    url: str,
    *,
    out: Path,
    world: World,
    targets: Sequence[str] = (),
    where: str = "",
    seed: int = 0,
) -> tuple[str, ...]:
    """Embed a dataset and read targets from the vectors of its subjects; returns what there is to say of the data.

    Args:
        trained: a network.
        url: of a converted dataset that is split; probes learn from its training subjects.
        out: a folder that is not there yet.
        world: who computes the vectors; the probes are rank 0's.
        targets: columns of the participants table; the network's own target where none is given. Site, scanner and motion
            are read as well, where they are known.
        where: a condition that chooses runs.
        seed: of folds and shuffles.

    Raises:
        FmriStreamError: there is no such column, or no part to learn from; nothing was written.
    """
    require_scikit_learn()
    require_free(out, world)
    wanted = list(targets) or list(trained.targets)
    dataset = open_dataset(url) if not where else open_dataset(url).where(where)
    questions = [column_question(dataset, name) for name in wanted]
    vectors = out.with_name(f".unfinished-vectors-{out.name}-{uuid.uuid4().hex[:8]}")  # rank 0's, who alone writes
    told = embed(trained, url, out=vectors, world=world, where=where)
    if not world.is_main:
        return told
    try:
        answers, document = _answers(trained, dataset, vectors, wanted=wanted, questions=questions, seed=seed)
        document |= {"url": display_url(url), "notes": list(told)}
        with new_folder(out) as folder:
            vectors.rename(folder / "embeddings")
            write_json(folder / "probes.json", document)
            write_whole(folder / "probes.md", table(answers))
    finally:
        shutil.rmtree(vectors, ignore_errors=True)
    print(table(answers), end="")
    return told


def _answers(
    trained: Trained,
    dataset: "Dataset",
    vectors: Path,
    *,
    wanted: Sequence[str],
    questions: Sequence[Question],
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(every question's numbers, the document that holds them)."""
    asked = {name.lower() for name in wanted}
    others = [name for name in place_columns(dataset) if name.lower() not in asked]
    motion = [found for found in [motion_question(dataset)] if found is not None and MOTION not in asked]
    every = [*questions, *(column_question(dataset, name) for name in others), *motion]
    parts = subject_parts(vectors)
    answers = [answer(question, parts, draws=trained.recipe.eval.bootstrap_draws, seed=seed) for question in every]
    return answers, {
        "network": network_facts(trained),
        "subjects": {name: len(rows.subject) for name, rows in parts.items()},
        "probes": answers,
    }


def place_columns(dataset: "Dataset") -> list[str]:
    """Columns of the participants table that say where and by what somebody was scanned."""
    return [name for name in dataset.participant_columns if name.lower() in _PLACES]


def column_question(dataset: "Dataset", name: str) -> Question:
    """A column of the participants table: words, numbers of two values and of sites are classes.

    Raises:
        UsageError: there is none of this name.
    """
    columns = dataset.participant_columns
    if name == MOTION and name not in columns:
        found = motion_question(dataset)
        if found is not None:
            return found
    if name not in columns or name == "subject":
        known = ", ".join(one for one in columns if one != "subject") or "none"
        raise UsageError(f"--target {name}: there is no such column; the participants table has {known}")
    here = set(dataset.runs.column("subject"))
    cells = {str(who): cell for who, cell in zip(columns["subject"], columns[name], strict=True) if str(who) in here}
    known_cells = {who: cell for who, cell in cells.items() if cell is not None and cell == cell}
    if name.lower() in _PLACES:  # the number of a site is its name
        known_cells = {who: word_of(cell) for who, cell in known_cells.items()}
    values = sorted(set(known_cells.values()), key=str)
    if any(isinstance(value, str) for value in values) or len(values) <= _MOST_CODES:
        place = {value: float(number) for number, value in enumerate(values)}
        truth = {who: place[cell] for who, cell in known_cells.items()}
        return Question(name=name, kind="classification", truth=truth, classes=tuple(str(value) for value in values))
    return Question(name=name, kind="regression", truth={who: float(cell) for who, cell in known_cells.items()})


def motion_question(dataset: "Dataset") -> Question | None:
    """Mean framewise displacement of each subject, mean over runs, in mm; None where no run has confounds of motion."""
    found: dict[str, list[float]] = {}
    for run in dataset.runs:
        displacement = framewise_displacement_mm(dataset, run)
        if displacement is not None and np.isfinite(displacement).any():
            found.setdefault(run.subject, []).append(float(np.nanmean(displacement)))
    if not found:
        return None
    return Question(name=MOTION, kind="regression", truth={who: float(np.mean(means)) for who, means in found.items()})


def subject_parts(vectors: Path) -> dict[str, Features]:
    """The vectors of the subjects of each part, from the tables of `embed`.

    Raises:
        UsageError: there are no subjects to learn from, or to test on.
    """
    runs, _ = read_rows(vectors / "runs.parquet")
    subjects, _ = read_rows(vectors / "subjects.parquet")
    part = dict(zip(runs["subject"], runs["split"], strict=True))
    group = {who: family or who for who, family in zip(runs["subject"], runs["family"], strict=True)}
    found = {}
    for name in PARTS:
        rows = [place for place, who in enumerate(subjects["subject"]) if part[who] == name]
        labels = tuple(str(subjects["subject"][place]) for place in rows)
        values = np.asarray(subjects["features"])[rows].astype(np.float64)
        found[name] = Features(subject=labels, group=tuple(str(group[who]) for who in labels), values=values)
    for name in ("train", "test"):
        if not found[name].subject:
            raise UsageError(f"no subject of the data is in the split {name!r}; probes need a dataset that is split")
    return found


def answer(question: Question, parts: Mapping[str, Features], *, draws: int, seed: int) -> dict[str, Any]:
    """Both readers' numbers, or why there are none."""
    asked, strangers = _of_training_classes(question, parts["train"].subject)
    row: dict[str, Any] = {"target": question.name, "kind": question.kind, "readers": {}}
    if question.kind == "classification":
        row |= {"classes": list(asked.classes), "subjects_of_other_classes": strangers}
    for reader in READERS:
        try:
            row["readers"][reader] = _numbers(read(asked, dict(parts), reader=reader, draws=draws, seed=seed))
        except UsageError as error:
            row["readers"][reader] = {"refused": str(error)}
    return row


def table(answers: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per target and reader, the main number with its interval beside chance."""
    lines = [
        "| target | reader | train | test | number | value [95 %] | chance [95 %] |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in answers:
        for reader, found in row["readers"].items():
            if "refused" in found:
                lines.append(f"| {row['target']} | {reader} | | | | {found['refused']} | |")
                continue
            name = next(one for one in ("auroc", "balanced_accuracy", "r") if one in found["metrics"])
            value, (low, high) = found["metrics"][name], found["intervals"].get(name, (math.nan, math.nan))
            mean, least, most = found["chance"][name]
            lines.append(
                f"| {row['target']} | {reader} | {found['train']} | {found['test']} | {name} | {value:.3f} [{low:.3f}, "
                f"{high:.3f}] | {mean:.3f} [{least:.3f}, {most:.3f}] |"
            )
    return "\n".join(lines) + "\n"


def _of_training_classes(question: Question, train: Sequence[str]) -> tuple[Question, int]:
    """The question with the classes that training subjects have, and how many subjects have others."""
    if question.kind == "regression":
        return question, 0
    there = sorted({question.truth[who] for who in train if who in question.truth})
    number = {value: float(place) for place, value in enumerate(there)}
    kept = {who: number[value] for who, value in question.truth.items() if value in number}
    names = tuple(question.classes[int(value)] for value in there)
    asked = Question(name=question.name, kind="classification", truth=kept, classes=names)
    return asked, len(question.truth) - len(kept)


def _numbers(found: Found) -> dict[str, Any]:
    return {
        "setting": found.setting,
        "train": found.train,
        "test": len(found.test.label),
        "threshold": found.threshold,
        "metrics": found.numbers,
        "intervals": {name: list(pair) for name, pair in found.intervals.items()},
        "chance": {name: list(numbers) for name, numbers in found.chance.items()},
    }
