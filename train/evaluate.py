"""Score every window once, on all ranks together, into one table from which all numbers come."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from fmristream.errors import FmriStreamError, UsageError
from train.config import Recipe, as_tables
from train.data import Part
from train.launch import World
from train.objectives import Objective
from train.participants import FAMILY_COLUMNS, SITE_COLUMNS, words_of
from train.predictions import (
    LOSS,
    About,
    PredictionTable,
    Target,
    require_own_columns,
    require_sound,
    target_columns,
    texts_of,
)
from train.stopping import uses_best
from train.summary import measure, numbers_of
from train.tasks import Task, UnscoredTask
from train.units import Subjects, unit_of, units_of

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset

__all__ = ["NonFiniteError", "Predictions", "ScoringError", "Subjects", "Windows", "measure", "numbers_of", "predict"]

# What of a recipe's data section does not decide about the scores.
_FREE = ("url", "threads", "prefetch_batches", "audit")


class NonFiniteError(FmriStreamError):
    """A loss or score that is NaN or infinite."""


class ScoringError(FmriStreamError):
    """A window was not scored, or was scored twice: no number may be made of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One row per window, sorted by window number; the same on every rank, whatever their number."""

    window: NDArray[np.int64]
    run: NDArray[np.int64]  # place in the dataset's list of runs
    start: NDArray[np.int64]  # first frame
    frames: NDArray[np.int64]  # of the run's own
    target: NDArray[np.float64]  # (n, objectives), NaN where there is none
    score: NDArray[np.float64]  # (n, k) what the task keeps of a window


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Numbers of a split without a target, over every window once."""

    num_windows: int
    numbers: Mapping[str, float]


def predict(model: nn.Module, part: Part, *, task: Task, world: World, bf16: bool) -> Predictions:
    """Look at every window of a split once; padding is dropped.

    Raises:
        AskedToStop: before the end, on all ranks.
        NonFiniteError: a score is NaN or infinite.
        ScoringError: a window came twice, or not at all.
    """
    run_number = {name: number for number, name in enumerate(part.clips.runs.column("name"))}
    names = [objective.target for objective in task.objectives]
    keys, values = [torch.zeros((0, 4), dtype=torch.int64)], []
    was_training = model.training
    model.eval()
    share_statistics(model, world)
    network = under_autocast(model, device=world.device, bf16=bf16)
    for packed in part.loader:
        world.heed_stop()
        with torch.no_grad():  # not inference_mode, whose tensors FSDP could not fill again in training
            rows = task.rows(network, packed.to(world.device)).cpu()
        own = slice(len(rows))  # of two views, the first
        numbers = torch.tensor([run_number[name] for name in packed.run[own]])
        lengths = torch.full((len(packed),), part.clips.window) if packed.lengths is None else packed.lengths
        place = torch.stack([packed.window[own], numbers, packed.start[own], lengths[own]], dim=1)
        targets = torch.stack([*(packed.targets[name][own] for name in names), torch.zeros(len(rows))], dim=1)[:, :-1]
        keys.append(place[packed.valid[own]])
        values.append(torch.cat([targets, rows], dim=1)[packed.valid[own]])
    model.train(was_training)
    found = world.gather(torch.cat(keys)), world.gather(torch.cat(values))
    return _sorted_predictions(*found, targets=len(names), expected=part.clips.num_windows)


def share_statistics(model: nn.Module, world: World) -> None:
    """Give every rank the running statistics of rank 0's batch normalisations, which are those that a checkpoint has.

    Each rank's have followed its own windows: scores would depend on who computed them, and differ after a restart.
    """
    if world.size == 1:
        return
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for buffer in part.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def under_autocast(
    network: nn.Module, *, device: torch.device, bf16: bool, dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """The network as tasks call it; what they make of its outputs is computed outside."""

    def call(*inputs: torch.Tensor, **named: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=bf16):
            return network(*inputs, **named)

    return call


def table_of(
    parts: Mapping[str, tuple[Predictions, "StreamingDataset"]], *, task: Task, about: About
) -> PredictionTable:
    """The table of the predictions of some splits; the same on every rank.

    Raises:
        UsageError: a target is none of the classes.
    """
    pieces = [_table_of_part(name, *part, task=task, about=about) for name, part in parts.items()]
    table = PredictionTable(
        about=about,
        words={name: np.concatenate([piece.words[name] for piece in pieces]) for name in pieces[0].words},
        numbers={name: np.concatenate([piece.numbers[name] for piece in pieces]) for name in pieces[0].numbers},
        values={name: np.concatenate([piece.values[name] for piece in pieces]) for name in pieces[0].values},
    )
    require_sound(table)
    return table


def about_of(
    recipe: Recipe, *, task: Task, step: int, clips: Mapping[str, "StreamingDataset"], scorings: int = 1
) -> About:
    """What the table of these splits says of itself."""
    labels = next(iter(clips.values())).target_labels if clips else {}
    targets = tuple(target_of(objective, labels.get(objective.target, ())) for objective in task.objectives)
    require_own_columns(targets)
    tables = as_tables(recipe)
    data = {name: value for name, value in tables["data"].items() if name not in _FREE}
    rows = {"model": tables["model"], "objective": tables["objective"], "data": data}
    made_of: dict[str, Any] = rows | {
        "stride": recipe.eval.stride,
        "precision": recipe.train.precision,
        "weights": ["best" if uses_best(recipe) else "last", recipe.train.ema],
        "content": {name: one.content_digest for name, one in clips.items()},
        # The participants table (truths, families, sites, columns that a network is given) is of a version, not of the content.
        "version": {name: one.generation_digest for name, one in clips.items()},
        "selection": {name: one.selection_digest for name, one in clips.items()},
    }
    return About(
        step=step,
        objective=recipe.objective.kind,
        targets=targets,
        average=recipe.eval.average,
        unit=recipe.eval.unit,
        draws=recipe.eval.bootstrap_draws,
        made_of=made_of,
        scorings=scorings,
    )


def scores_of(table: PredictionTable, split: str, *, target: int = 0) -> Subjects | Windows | None:
    """The units of a split for one of the targets, or its windows where there is none; None: there is no such split."""
    if split not in table.splits:
        return None
    part = table.of_split(split)
    if not table.about.targets:
        return Windows(num_windows=len(part), numbers=numbers_of(part))
    chosen = table.about.targets[target]
    return units_of(part, chosen, unit=unit_of(table, chosen))


def _table_of_part(
    split: str, found: Predictions, clips: "StreamingDataset", *, task: Task, about: About
) -> PredictionTable:
    words = {name: column[found.run] for name, column in words_of_runs(clips).items()}
    values: dict[str, NDArray[np.float64]] = {}
    column = 0
    for place, (target, objective) in enumerate(zip(about.targets, task.objectives, strict=True)):
        values[target.truth] = _coded(objective, found.target[:, place])
        for name in target.scores:
            values[name] = found.score[:, column]
            column += 1
    if not about.targets:
        unscored = cast(UnscoredTask, task)
        losses = unscored.window_losses(torch.from_numpy(found.score), words["subject"].tolist())
        values[LOSS] = losses.double().numpy()
    split_column = texts_of([split] * len(found.window))
    numbers = {"window": found.window, "start_frame": found.start, "frames": found.frames}
    return PredictionTable(about=about, words={"split": split_column, **words}, numbers=numbers, values=values)


def words_of_runs(clips: "StreamingDataset") -> dict[str, NDArray[Any]]:
    """What is said of each run, and of its subject."""
    runs = clips.runs
    subjects, groups = runs.column("subject"), runs.column("group")
    family_of, site_of = (words_of(clips.dataset, known) for known in (FAMILY_COLUMNS, SITE_COLUMNS))
    families, sites = [family_of.get(one) for one in subjects], [site_of.get(one) for one in subjects]
    if all(family is None for family in families) and not _are_sites(groups, subjects, sites):
        # What the splitter keeps together, where that is neither the subject nor the site.
        families = [None if group == subject else group for group, subject in zip(groups, subjects, strict=True)]
    named = {"run": runs.column("name"), "subject": subjects, "session": runs.column("session")}
    return {name: texts_of(column) for name, column in (named | {"family": families, "site": sites}).items()}


def _are_sites(groups: Sequence[str], subjects: Sequence[str], sites: Sequence[str | None]) -> bool:
    """Whether the groups that a conversion kept together are sites: to be drawn whole they would have to be many."""
    pairs = [(group, site) for group, subject, site in zip(groups, subjects, sites, strict=True) if group != subject]
    return any(site is not None for _, site in pairs) and all(site in (None, group) for group, site in pairs)


def target_of(objective: Objective, labels: Sequence[str]) -> Target:
    """What the columns of a target hold; `labels` are the words behind its codes, where it has words."""
    classes = class_names(objective, labels)
    truth, scores = target_columns(objective.target, classes, several=objective.outputs > 1)
    offset = 0.0 if objective.kind == "classification" else objective.offset
    return Target(
        name=objective.target, kind=objective.kind, offset=offset, classes=classes, truth=truth, scores=scores
    )


def class_names(objective: Objective, labels: Sequence[str]) -> tuple[str, ...]:
    """What the classes of a target are called, in the order of the scores; numbers where they have no words."""
    return objective.names or tuple(labels[int(v)] if labels else f"{v:g}" for v in objective.values)


def _coded(objective: Objective, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Truths as metrics want them; NaN where nothing is known."""
    truth = objective.truth(values)
    odd = np.isfinite(values) & ~np.isin(truth, range(max(2, objective.outputs)))
    if objective.values and odd.any():
        raise UsageError(
            f"{objective.target}: {int(odd.sum())} windows have a value that is none of the classes of training; choose "
            "another data.target, or leave those subjects out with data.where"
        )
    return np.where(np.isfinite(values), truth, np.nan)


def _sorted_predictions(keys: torch.Tensor, values: torch.Tensor, *, targets: int, expected: int) -> Predictions:
    order = torch.argsort(keys[:, 0], stable=True)
    window, run, start, frames = np.ascontiguousarray(keys[order].numpy().T)
    if not np.array_equal(window, np.arange(expected)):
        raise ScoringError(
            f"evaluation: expected {expected} windows once each, got {len(window)} rows of {len(np.unique(window))} windows; "
            "this is a fault of the trainer: please report it"
        )
    table = values[order].to(torch.float64).numpy()
    target, score = np.ascontiguousarray(table[:, :targets]), np.ascontiguousarray(table[:, targets:])
    if not np.isfinite(score).all():
        bad = window[~np.isfinite(score).all(axis=1)]
        raise NonFiniteError(
            f"evaluation: the scores of {len(bad)} of {len(window)} windows are not finite, first windows {bad[:8].tolist()}"
        )
    return Predictions(window=window, run=run, start=start, frames=frames, target=target, score=score)
