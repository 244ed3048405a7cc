"""Score every window once, on all ranks together, and reduce the scores to subjects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fmristream.errors import FmriStreamError, UsageError
from train import metrics
from train.data import Part
from train.launch import World
from train.objectives import Objective
from train.tasks import Task, UnscoredTask

if TYPE_CHECKING:
    from fmristream.catalog.run import Run


class NonFiniteError(FmriStreamError):
    """A loss or score that is NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One row per window, sorted by window number; the same on every rank, whatever their number."""

    window: NDArray[np.int64]
    run: NDArray[np.int64]  # place in the dataset's list of runs
    target: NDArray[np.float64]  # (n, targets of the task); NaN where there is none
    score: NDArray[np.float64]  # (n, k) what the task keeps of a window


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """One row per subject whose target is known."""

    label: tuple[str, ...]
    truth: NDArray[np.float64]  # 0 or 1 for two classes, number of the class for more, else the value
    score: NDArray[np.float64]  # logit of class 1, (n, k) logits of each, or the value


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Numbers of a split without a target, over every window once."""

    num_windows: int
    numbers: Mapping[str, float]


def predict(model: nn.Module, part: Part, *, task: Task, world: World, bf16: bool) -> Predictions:
    """Look at every window of a split once; padding is dropped.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    run_number = {run.name: number for number, run in enumerate(part.clips.runs)}
    keys, values = [torch.zeros((0, 2), dtype=torch.int64)], []
    was_training = model.training
    model.eval()
    network = under_autocast(model, device=world.device, bf16=bf16)
    for packed in part.loader:
        with torch.no_grad():  # not inference_mode, whose tensors FSDP could not fill again in training
            rows = task.rows(network, packed.to(world.device)).cpu()
        own = slice(len(rows))  # of two views, the first
        numbers = torch.tensor([run_number[name] for name in packed.run[own]])
        targets = [packed.targets[objective.target] for objective in task.objectives]
        keys.append(torch.stack([packed.window[own], numbers], dim=1)[packed.valid[own]])
        values.append(torch.cat([target[:, None] for target in targets] + [rows], dim=1)[packed.valid[own]])
    model.train(was_training)
    gathered = world.gather(torch.cat(keys)), world.gather(torch.cat(values))
    predictions = _sorted_predictions(*gathered, targets=len(task.objectives))
    assert len(predictions.window) == part.clips.num_windows, "a window was not scored"
    return predictions


def under_autocast(
    network: nn.Module, *, device: torch.device, bf16: bool, dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """The network as tasks call it; what they make of its outputs is computed outside."""

    def call(*inputs: torch.Tensor, **named: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=bf16):
            return network(*inputs, **named)

    return call


def over_windows(predictions: Predictions, *, task: UnscoredTask, runs: Sequence["Run"]) -> Windows:
    """What a task without a target says of a split."""
    labels = [run.subject for run in runs]
    subjects = [labels[number] for number in predictions.run.tolist()]
    numbers = task.summary(torch.from_numpy(predictions.score), subjects)
    return Windows(num_windows=len(predictions.window), numbers=numbers)


def by_subject(predictions: Predictions, *, objective: Objective, runs: Sequence["Run"]) -> Subjects:
    """Mean scores of the only target per run, then per subject; subjects without a target are left out.

    Raises:
        UsageError: a subject's target is not one value, or none of the two classes.
    """
    labels, label_of_run = np.unique([run.subject for run in runs], return_inverse=True)
    (target,) = predictions.target.T
    known = np.isfinite(target)
    run = predictions.run[known]
    subjects = label_of_run[run]
    columns = predictions.score[known].T
    score = np.stack([metrics.subject_means(column, runs=run, subjects=subjects)[1] for column in columns], axis=1)
    place, truth = metrics.subject_means(target[known], runs=run, subjects=label_of_run[run])
    coded = objective.truth(truth)
    varies = truth[np.searchsorted(place, label_of_run[run])] != target[known]
    odd = ~np.isin(coded, range(max(2, objective.outputs))) if objective.values else np.zeros(len(coded), bool)
    if varies.any() or odd.any():
        which = labels[label_of_run[run[varies][0]]] if varies.any() else labels[place[odd][0]]
        raise UsageError(
            f"{objective.target}: subject {which} has no single value of a known class; choose another data.target"
        )
    score = score[:, 0] if objective.outputs == 1 else score
    return Subjects(label=tuple(str(labels[i]) for i in place), truth=coded, score=score)


def measure(subjects: Subjects, *, objective: Objective, threshold: float) -> dict[str, float]:
    """The numbers of the objective's kind."""
    if objective.classes:
        return metrics.multiclass_metrics(subjects.truth, subjects.score)
    if objective.kind == "classification":
        return metrics.classification_metrics(subjects.truth, subjects.score, threshold=threshold)
    return metrics.regression_metrics(subjects.truth, subjects.score)


def intervals(
    subjects: Subjects, *, objective: Objective, threshold: float, draws: int
) -> Mapping[str, tuple[float, float]]:
    """95 % bootstrap intervals of the numbers that a verdict rests on."""
    if objective.classes:
        return metrics.multiclass_intervals(subjects.truth, subjects.score, draws=draws)
    if objective.kind == "classification":
        return metrics.classification_intervals(subjects.truth, subjects.score, threshold=threshold, draws=draws)
    return metrics.regression_intervals(subjects.truth, subjects.score, draws=draws)


def _sorted_predictions(keys: torch.Tensor, values: torch.Tensor, *, targets: int) -> Predictions:
    order = torch.argsort(keys[:, 0], stable=True)
    window, run = np.ascontiguousarray(keys[order].numpy().T)
    table = values[order].to(torch.float64).numpy()
    target, score = np.ascontiguousarray(table[:, :targets]), np.ascontiguousarray(table[:, targets:])
    assert len(np.unique(window)) == len(window), "a window was scored twice"
    if not np.isfinite(score).all():
        bad = window[~np.isfinite(score).all(axis=1)]
        raise NonFiniteError(
            f"evaluation: the scores of {len(bad)} of {len(window)} windows are not finite, first windows {bad[:8].tolist()}"
        )
    return Predictions(window=window, run=run, target=target, score=score)
