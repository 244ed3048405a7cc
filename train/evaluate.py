"""Score every window once, on all ranks together, and reduce the scores to subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fmristream.errors import FmriStreamError, UsageError
from train import metrics
from train.launch import World
from train.objectives import Objective

if TYPE_CHECKING:
    from fmristream.catalog.run import Run
    from fmristream.stream.clips import StreamingDataset
    from fmristream.stream.loader import StreamingLoader


class NonFiniteError(FmriStreamError):
    """A loss or score that is NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One row per window, sorted by window number; the same on every rank, whatever their number."""

    window: NDArray[np.int64]
    run: NDArray[np.int64]  # place in the dataset's list of runs
    target: NDArray[np.float64]
    score: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """One row per subject whose target is known."""

    label: tuple[str, ...]
    truth: NDArray[np.float64]  # 0 or 1 for classes, else the value
    score: NDArray[np.float64]  # logit of class 1, or the value


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One split of a dataset, and this rank's share of it."""

    clips: "StreamingDataset"
    loader: "StreamingLoader"


def predict(model: nn.Module, part: Part, *, objective: Objective, world: World, bf16: bool) -> Predictions:
    """Score every window of a split; padding is dropped.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    run_number = {run.name: number for number, run in enumerate(part.clips.runs)}
    keys, values = [torch.zeros((0, 2), dtype=torch.int64)], [torch.zeros((0, 2))]
    was_training = model.training
    model.eval()
    for packed in part.loader:
        batch = packed.to(world.device)
        with torch.inference_mode(), torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = model(batch.bold)
        scores = objective.scores(outputs).cpu()
        numbers = torch.tensor([run_number[name] for name in packed.run])
        keys.append(torch.stack([packed.window, numbers], dim=1)[packed.valid])
        values.append(torch.stack([packed.targets[objective.target], scores], dim=1)[packed.valid])
    model.train(was_training)
    predictions = _sorted_predictions(world.gather(torch.cat(keys)), world.gather(torch.cat(values)))
    assert len(predictions.window) == part.clips.num_windows, "a window was not scored"
    return predictions


def by_subject(predictions: Predictions, *, objective: Objective, runs: Sequence["Run"]) -> Subjects:
    """Mean score per run, then per subject; subjects without a target are left out.

    Raises:
        UsageError: a subject's target is not one value, or none of the two classes.
    """
    labels, label_of_run = np.unique([run.subject for run in runs], return_inverse=True)
    known = np.isfinite(predictions.target)
    run = predictions.run[known]
    place, score = metrics.subject_means(predictions.score[known], runs=run, subjects=label_of_run[run])
    _, truth = metrics.subject_means(predictions.target[known], runs=run, subjects=label_of_run[run])
    coded = objective.truth(truth)
    varies = truth[np.searchsorted(place, label_of_run[run])] != predictions.target[known]
    odd = ~np.isin(coded, (0, 1)) if objective.kind == "classification" else np.zeros(len(coded), bool)
    if varies.any() or odd.any():
        which = labels[label_of_run[run[varies][0]]] if varies.any() else labels[place[odd][0]]
        raise UsageError(
            f"{objective.target}: subject {which} has no single value of a known class; choose another data.target"
        )
    return Subjects(label=tuple(str(labels[i]) for i in place), truth=coded, score=score)


def measure(subjects: Subjects, *, objective: Objective, threshold: float) -> dict[str, float]:
    """The numbers of the objective's kind."""
    if objective.kind == "classification":
        return metrics.classification_metrics(subjects.truth, subjects.score, threshold=threshold)
    return metrics.regression_metrics(subjects.truth, subjects.score)


def intervals(
    subjects: Subjects, *, objective: Objective, threshold: float, draws: int
) -> Mapping[str, tuple[float, float]]:
    """95 % bootstrap intervals of the numbers that a verdict rests on."""
    if objective.kind == "classification":
        return metrics.classification_intervals(subjects.truth, subjects.score, threshold=threshold, draws=draws)
    return metrics.regression_intervals(subjects.truth, subjects.score, draws=draws)


def _sorted_predictions(keys: torch.Tensor, values: torch.Tensor) -> Predictions:
    order = torch.argsort(keys[:, 0], stable=True)
    window, run = _columns(keys[order].numpy())
    target, score = _columns(values[order].to(torch.float64).numpy())
    assert len(np.unique(window)) == len(window), "a window was scored twice"
    if not np.isfinite(score).all():
        bad = window[~np.isfinite(score)]
        raise NonFiniteError(
            f"evaluation: the scores of {len(bad)} of {len(window)} windows are not finite, first windows {bad[:8].tolist()}"
        )
    return Predictions(window=window, run=run, target=target, score=score)


def _columns(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1])
