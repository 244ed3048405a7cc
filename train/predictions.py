"""The table of all predictions of a finished run, or of `--task predict`, one row a window: every number comes from it.

`OUT/predictions.parquet` names the user's participants, with their truths: it is to be treated as their data are.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.row_tables import Values, decode_rows, encode_rows
from fmristream.errors import CorruptDataError, UsageError
from train.files import write_whole

FILE = "predictions.parquet"
FORMAT = 1
# Under which the table's facts say what the columns are.
_KEY = "predictions"
_WINDOWS = "windows"  # of each split
_WORDS = ("split", "run", "subject", "session", "family", "site")
_NUMBERS = ("window", "start_frame", "frames")
LOSS = "loss"

Texts = NDArray[np.object_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the columns of a target hold.

    Attributes:
        name: its column in the participants table.
        kind: classes or a number.
        offset: of numbers, the mean of the training subjects.
        classes: their words, in the order of their numbers: `truth` holds 0, 1, ...; empty for numbers.
        truth: the column of what is so; null where nobody knows.
        scores: the columns of what the network says: logit of class 1 of two, one of each of several, or the number.
    """

    name: str
    kind: Literal["classification", "regression"]
    offset: float = 0.0
    classes: tuple[str, ...] = ()
    truth: str
    scores: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the table says of itself.

    Attributes:
        step: optimiser steps that the network had taken.
        objective: the recipe's kind.
        targets: what was scored; none where windows have losses only.
        average: what of classes is averaged over windows: `logit` or `sigmoid`.
        unit: `auto`, `subject` or `session`, as the recipe asks.
        draws: of the bootstrap.
        made_of: what decides about the rows: recipe and digests of the data.
        scorings: how often the rows of this folder were computed anew, this time included.
        thresholds: by target, where they were chosen before: on validation units of the run, for data that it has not seen.
    """

    step: int
    objective: str
    targets: tuple[Target, ...] = ()
    average: Literal["logit", "sigmoid"] = "logit"
    unit: Literal["auto", "subject", "session"] = "auto"
    draws: int = 2000
    made_of: Mapping[str, Any] = field(default_factory=dict)
    scorings: int = 1
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """JSON that `about_from` reads back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionTable:
    """One row per window of validation and test, sorted by split and window; of other data, in stored order.

    Attributes:
        about: what the columns mean.
        words: `split`, `run`, `subject`, `session`, `family` and `site` of each row; None where it is not known.
        numbers: `window`, `start_frame` and `frames` of each row.
        values: truths and scores by the names that `about` gives, or `loss`; NaN where a truth is not known.
    """

    about: About
    words: Mapping[str, Texts]
    numbers: Mapping[str, NDArray[np.int64]]
    values: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.words["split"])

    def of_split(self, split: str) -> "PredictionTable":
        """The rows of one split."""
        return self.at(self.words["split"] == split)

    def at(self, rows: NDArray[np.bool_]) -> "PredictionTable":
        """Some of the rows."""
        return PredictionTable(
            about=self.about,
            words={name: column[rows] for name, column in self.words.items()},
            numbers={name: column[rows] for name, column in self.numbers.items()},
            values={name: column[rows] for name, column in self.values.items()},
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(self.words["split"].tolist()))


def target_columns(name: str, classes: Sequence[str], *, several: bool) -> tuple[str, tuple[str, ...]]:
    """(column of the truth, columns of the scores) of a target."""
    return f"truth_{name}", tuple(f"score_{name}_{word}" for word in classes) if several else (f"score_{name}",)


def require_own_columns(targets: Iterable[Target]) -> None:
    """Raise UsageError where two targets would share a column."""
    names = [name for target in targets for name in (target.truth, *target.scores)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"predictions: two targets or classes share the column {twice[0]!r}; rename one of them")


def write_predictions(table: PredictionTable, path: Path) -> None:
    """Write the table, whole or not at all; one that is there stays as it is where it is the same.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    data = encode(table)
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)


def read_predictions(path: Path) -> PredictionTable:
    """The table in a file.

    Raises:
        UsageError: there is no such file.
        CorruptDataError: it is none of ours, or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror}; give the --out folder of a finished run"
        ) from error
    try:
        return decode(data)
    except CorruptDataError as error:
        raise CorruptDataError(f"{path}: {error}; finish the run again to have it written anew") from error


def encode(table: PredictionTable) -> bytes:
    """As Parquet: scores are float32 as networks give them, truths and losses float64."""
    scores = {name for target in table.about.targets for name in target.scores}
    values = {
        name: column.astype(np.float32 if name in scores else np.float64) for name, column in table.values.items()
    }
    words: dict[str, Values] = {name: list(table.words[name]) for name in _WORDS}
    columns: dict[str, Values] = {"split": words["split"], "window": table.numbers["window"], **words, **table.numbers}
    windows = {split: int((table.words["split"] == split).sum()) for split in table.splits}
    return encode_rows(columns | values, facts={_KEY: table.about.facts(), _WINDOWS: windows})


def decode(data: bytes) -> PredictionTable:
    """The table of such bytes.

    Raises:
        CorruptDataError: they are not such a table, a window is there twice, or a score is not finite.
    """
    columns, facts = decode_rows(data)
    if _KEY not in facts:
        raise CorruptDataError("it is no table of predictions; it does not say what its columns are")
    about = about_from(facts[_KEY])
    scored = [name for target in about.targets for name in (target.truth, *target.scores)] or [LOSS]
    lacking = [name for name in (*_WORDS, *_NUMBERS, *scored) if name not in columns]
    if lacking:
        raise CorruptDataError(f"the table of predictions lacks the columns {', '.join(lacking)}")
    table = PredictionTable(
        about=about,
        words={name: texts_of(columns[name]) for name in _WORDS},
        numbers={name: np.asarray(columns[name], dtype=np.int64) for name in _NUMBERS},
        values={name: np.asarray(columns[name], dtype=np.float64) for name in scored},
    )
    require_sound(table)
    for split, expected in facts.get(_WINDOWS, {}).items():  # earlier tables do not say
        found = int((table.words["split"] == split).sum())
        if found != expected:
            raise CorruptDataError(f"split {split!r}: expected {expected} windows as written, got {found}")
    return table


def require_sound(table: PredictionTable) -> None:
    """Raise CorruptDataError unless the windows are 0, 1, ... in order, and every score is finite.

    They are numbered in each split; of other data, whose rows are in stored order, through all of them. A loss may be missing:
    windows that are all scrubbed have none.
    """
    every = table.numbers["window"]
    for split in table.splits if not np.array_equal(every, np.arange(len(every))) else ():
        windows = every[table.words["split"] == split]
        if not np.array_equal(windows, np.arange(len(windows))):
            raise CorruptDataError(
                f"split {split!r}: expected the windows 0 to {len(windows) - 1} once each in this order, and some are "
                "missing, doubled or moved"
            )
    may_lack = {target.truth for target in table.about.targets} | {LOSS}
    bad = [name for name, column in table.values.items() if name not in may_lack and not np.isfinite(column).all()]
    if bad:
        raise CorruptDataError(f"column {bad[0]} holds values that are not finite")


def about_from(facts: Any) -> About:
    """What `About.facts` gave.

    Raises:
        CorruptDataError: it is something else, or of a later release.
    """
    try:
        facts = dict(facts)
        found = facts.pop("format")
        if found != FORMAT:
            raise CorruptDataError(f"the table of predictions has format {found}, this release reads {FORMAT}")
        targets = tuple(
            Target(**{**one, "classes": tuple(one["classes"]), "scores": tuple(one["scores"])})
            for one in facts.pop("targets")
        )
        return About(targets=targets, **facts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptDataError(f"the table of predictions does not say what its columns are: {error}") from error


def texts_of(values: Iterable[str | None]) -> Texts:
    """(n,) words, None where there is none."""
    listed = list(values)
    found = np.empty(len(listed), dtype=object)
    found[:] = listed
    return found
