"""What a trained BrainLM says about runs: forecasts, perturbed forecasts, networks in its attention, anomalies.

All functions take parcel series in the normalisation of the training and compute without gradients, in evaluation mode.
Forecasts are honest only if that normalisation saw no frame of the future: statistics of the whole run leak it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmristream.errors import UsageError
from train.models.brainlm_heads import SeriesModel
from train.models.series_masking import Masking, Reconstruction

# SD of a normal distribution over its median absolute deviation.
_MAD_TO_SD = 1.4826
_PERMUTATIONS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """A change of one parcel's past: its last `frames` frames become scale * x + shift."""

    parcel: int
    frames: int
    shift: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbedForecast:
    """The future with and without a change of the past: (b, parcels, frames) each."""

    perturbation: Perturbation
    baseline: Tensor
    perturbed: Tensor

    @property
    def response(self) -> Tensor:
        """What the change did, frame by frame."""
        return self.perturbed - self.baseline

    @property
    def effect(self) -> NDArray[np.float64]:
        """(parcels,) root mean square of the response over windows and frames."""
        return cast(NDArray[np.float64], self.response.double().square().mean((0, 2)).sqrt().cpu().numpy())

    def report(self, names: Sequence[str] | None = None, *, rows: int = 10) -> str:
        """The parcels that the change moved most, as a table in Markdown."""
        change = self.perturbation
        title = (
            f"Parcel {_name(names, change.parcel)}: last {change.frames} frames x {change.scale:g} + {change.shift:g}; "
            f"forecast of {self.baseline.shape[2]} frames, {len(self.baseline)} windows"
        )
        effect = self.effect
        order = np.argsort(-effect, kind="stable")[:rows]
        return _table(
            title, ("parcel", "RMS change"), [(_name(names, place), f"{effect[place]:.4g}") for place in order]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkReadout:
    """Share of parcels whose network their k nearest neighbours name, each parcel left out in turn.

    `attention`: neighbours by attention; `connectivity`: by the correlation of the series; `position`: by distance, because
    a model that is told positions may know no more than that. `chance`: mean, 2.5th and 97.5th percentile with the networks
    shuffled over the parcels, neighbours by attention.
    """

    parcels: int
    networks: int
    neighbours: int
    attention: float
    connectivity: float
    position: float
    chance: tuple[float, float, float]

    def report(self) -> str:
        """The four numbers, as a table in Markdown."""
        mean, low, high = self.chance
        title = f"{self.parcels} parcels, {self.networks} networks, {self.neighbours} nearest neighbours, leave one out"
        rows = [
            ("attention", f"{self.attention:.3f}"),
            ("connectivity", f"{self.connectivity:.3f}"),
            ("position", f"{self.position:.3f}"),
            ("chance", f"{mean:.3f} ({low:.3f} to {high:.3f})"),
        ]
        return _table(title, ("neighbours by", "accuracy"), rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalyScores:
    """Mean squared errors (runs, parcels): of values that were hidden, and of the frames after a context."""

    reconstruction: NDArray[np.float64]
    forecast: NDArray[np.float64]

    @property
    def by_run(self) -> NDArray[np.float64]:
        """(runs, 2): mean over parcels of the reconstruction's and the forecast's error."""
        return np.stack([self.reconstruction.mean(1), self.forecast.mean(1)], axis=1)

    def against(self, reference: "AnomalyScores") -> "AnomalyScores":
        """Robust z per parcel: log errors against their median and MAD over the reference's runs (three at least)."""
        return AnomalyScores(
            reconstruction=_robust_z(self.reconstruction, reference.reconstruction),
            forecast=_robust_z(self.forecast, reference.forecast),
        )

    def report(self, runs: Sequence[str] | None = None, parcels: Sequence[str] | None = None, *, rows: int = 10) -> str:
        """The runs of the largest scores and their most conspicuous parcels, as a table in Markdown."""
        means = self.by_run
        order = np.argsort(-means.sum(1), kind="stable")[:rows]
        lines = [
            (
                _name(runs, run),
                f"{means[run, 0]:.4g}",
                f"{means[run, 1]:.4g}",
                _name(parcels, int(self.reconstruction[run].argmax())),
                _name(parcels, int(self.forecast[run].argmax())),
            )
            for run in order
        ]
        head = ("run", "reconstruction", "forecast", "worst parcel (reconstruction)", "worst parcel (forecast)")
        return _table(f"{len(means)} runs, {self.forecast.shape[1]} parcels", head, lines)


def forecast(
    model: SeriesModel, history: Tensor, xyz: Tensor, *, frames: int, window: int, step: int | None = None
) -> Tensor:
    """Roll the future out: predict `step` frames, append them, slide on.

    Args:
        model: predicts the end of windows of `window` frames.
        history: (b, parcels, t), at least window - step frames.
        xyz: (parcels, 3), mm.
        frames: how many to predict; (b, parcels, frames) is returned.
        window: frames that the model sees at once, the predicted ones included.
        step: frames predicted at once; the model's patch by default.
    """
    step = _checked_step(model, window, step)
    if frames < 1:
        raise UsageError(f"a forecast needs at least 1 frame, got {frames}")
    if history.dim() != 3 or history.shape[2] < window - step:
        raise UsageError(
            f"a forecast by windows of {window} frames, {step} at once, needs a history (b, parcels, {window - step} or "
            f"more), got {tuple(history.shape)}"
        )
    _check_finite(history)
    known = history.shape[2]
    series = history
    with _evaluating(model):
        while series.shape[2] < known + frames:
            context = series[:, :, series.shape[2] - (window - step) :]
            series = torch.cat([series, _predict_end(model, context, xyz, step)], dim=2)
    return series[:, :, known : known + frames]


def perturb(
    model: SeriesModel,
    history: Tensor,
    xyz: Tensor,
    change: Perturbation,
    *,
    frames: int,
    window: int,
    step: int | None = None,
) -> PerturbedForecast:
    """Change one parcel's past and roll the future out, beside the future of the past as it was; as for `forecast`."""
    used = window - _checked_step(model, window, step)
    if not 0 <= change.parcel < history.shape[1]:
        raise UsageError(f"parcel {change.parcel} cannot be perturbed: the series has {history.shape[1]}")
    if not 1 <= change.frames <= used:
        raise UsageError(
            f"{change.frames} perturbed frames: the first prediction sees the last {used}, so change 1 to {used} of them"
        )
    changed = history.clone()
    part = changed[:, change.parcel, changed.shape[2] - change.frames :]
    part.mul_(change.scale).add_(change.shift)
    baseline, perturbed = (
        forecast(model, past, xyz, frames=frames, window=window, step=step) for past in (history, changed)
    )
    return PerturbedForecast(perturbation=change, baseline=baseline, perturbed=perturbed)


def mean_attention(model: SeriesModel, windows: Tensor, xyz: Tensor, *, layer: int = -1) -> NDArray[np.float64]:
    """(parcels, parcels) attention of one encoder layer, mean over windows (n, parcels, t), one at a time."""
    _check_finite(windows)
    with _evaluating(model):
        rows = [model.parcel_attention(window[None], xyz, layer=layer)[0].double() for window in windows]
    return cast(NDArray[np.float64], torch.stack(rows).mean(0).cpu().numpy())


def connectivity(windows: Tensor) -> NDArray[np.float64]:
    """(parcels, parcels) correlation of the series, mean over windows (n, parcels, t); 0 where a parcel is constant."""
    values = windows.double()
    values = values - values.mean(2, keepdim=True)
    length = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    unit = torch.where(length > 0, values / length, 0.0)
    return cast(NDArray[np.float64], (unit @ unit.transpose(1, 2)).mean(0).cpu().numpy())


def read_networks(
    model: SeriesModel,
    windows: Tensor,
    xyz: Tensor,
    networks: Sequence[object],
    *,
    neighbours: int = 5,
    layer: int = -1,
    seed: int = 0,
) -> NetworkReadout:
    """How well attention tells each parcel's network, beside what connectivity, position and chance tell.

    Args:
        model: a trained model.
        windows: (n, parcels, t).
        xyz: (parcels, 3), mm.
        networks: the label of each parcel.
        neighbours: how many vote; at ties, the network of the nearest of the tied.
        layer: of the encoder.
        seed: of the shuffles that give chance.
    """
    labels = np.unique([str(network) for network in networks], return_inverse=True)[1]
    parcels = windows.shape[1]
    if len(labels) != parcels or xyz.shape != (parcels, 3):
        raise UsageError(f"{parcels} parcels, {len(labels)} networks and xyz {tuple(xyz.shape)} do not belong together")
    if not 1 <= neighbours < parcels:
        raise UsageError(f"neighbours must number 1 to {parcels - 1}, got {neighbours}")
    attention = mean_attention(model, windows, xyz, layer=layer)
    places = xyz.double().cpu().numpy()
    closeness: NDArray[np.float64] = -np.linalg.norm(places[:, None] - places[None], axis=2)
    # A parcel's attention profile: whom it attends to, and who attends to it.
    by_attention = nearest(
        row_similarity(np.concatenate([_hollow(attention), _hollow(attention.T)], axis=1)), neighbours
    )
    by_connectivity = nearest(row_similarity(_hollow(connectivity(windows))), neighbours)
    chance = _shuffled_accuracy(by_attention, labels, seed)
    return NetworkReadout(
        parcels=parcels,
        networks=int(labels.max()) + 1,
        neighbours=neighbours,
        attention=vote_accuracy(by_attention, labels),
        connectivity=vote_accuracy(by_connectivity, labels),
        position=vote_accuracy(nearest(closeness, neighbours), labels),
        chance=chance,
    )


def row_similarity(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of every two rows; 0 for a constant row."""
    centred = features - features.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    similarity: NDArray[np.float64] = unit @ unit.T
    return similarity


def nearest(similarity: NDArray[np.float64], neighbours: int) -> NDArray[np.int64]:
    """(n, neighbours) most similar others, the nearest first; equal ones in the order of their numbers."""
    others = similarity.copy()
    np.fill_diagonal(others, -np.inf)
    order: NDArray[np.int64] = np.argsort(-others, axis=1, kind="stable")[:, :neighbours]
    return order


def vote_accuracy(neighbours: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of rows whose label most of their neighbours have; at ties the label of the nearest of the tied."""
    votes = labels[neighbours]
    counts = (votes[:, :, None] == votes[:, None, :]).sum(2)
    winners = votes[np.arange(len(votes)), counts.argmax(1)]
    return float((winners == labels).mean())


def anomaly_scores(
    model: SeriesModel,
    runs: Sequence[Tensor],
    xyz: Tensor,
    *,
    window: int,
    step: int | None = None,
    hidden: float = 0.2,
    seed: int = 0,
) -> AnomalyScores:
    """Errors per run and parcel: of hidden values, and of the `step` frames after a context.

    Args:
        model: a trained model.
        runs: (parcels, t) each, t at least `window`.
        xyz: (parcels, 3), mm.
        window: frames that the model sees at once. Windows follow each other; the last ends with the run.
        step: frames predicted at once; the model's patch by default. Every frame after the first context is predicted.
        hidden: share of tokens hidden at once; every value is hidden at least once.
        seed: of what is hidden together.
    """
    step = _checked_step(model, window, step)
    for number, run in enumerate(runs):
        if run.dim() != 2 or run.shape[1] < window:
            raise UsageError(f"run {number}: expected (parcels, {window} frames or more), got {tuple(run.shape)}")
        _check_finite(run)
    with _evaluating(model):
        reconstructed = [_reconstruction_error(model, run, xyz, window, hidden, seed) for run in runs]
        predicted = [_forecast_error(model, run, xyz, window, step) for run in runs]
    return AnomalyScores(reconstruction=np.stack(reconstructed), forecast=np.stack(predicted))


def _reconstruction_error(
    model: SeriesModel, run: Tensor, xyz: Tensor, window: int, hidden: float, seed: int
) -> NDArray[np.float64]:
    """(parcels,) mean squared error of values when hidden; the order of hiding is that of the seed in every run."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(run.shape[0], dtype=torch.float64, device=run.device)
    count = torch.zeros_like(total)
    for start in _starts(run.shape[1], window, window):
        for result, series in _hide_all(model, run[None, :, start : start + window], xyz, hidden, generator):
            error = (result.series.double() - series.double()).square()
            total += torch.where(result.hidden, error, 0.0).sum((0, 2))
            count += result.hidden.sum((0, 2))
    return cast(NDArray[np.float64], (total / count).cpu().numpy())


def _hide_all(
    model: SeriesModel, series: Tensor, xyz: Tensor, hidden: float, generator: torch.Generator
) -> Iterator[tuple[Reconstruction, Tensor]]:
    """Reconstructions that together hide every token: one random order, turned on by as many tokens as are hidden."""
    masking = Masking(ratio=hidden)
    first = model(series, xyz, masking=masking, generator=generator)
    number, at_once = first.restore.shape[1], int(first.hidden_tokens[0].sum())
    if not 0 < at_once < number:
        raise UsageError(f"a share of {hidden} hides {at_once} of {number} tokens; hide some, but not all")
    yield first, series
    for turned in range(at_once, number, at_once):
        order = (first.restore + turned) % number
        yield model(series, xyz, masking=masking, noise=order.float()), series


def _forecast_error(model: SeriesModel, run: Tensor, xyz: Tensor, window: int, step: int) -> NDArray[np.float64]:
    """(parcels,) mean squared error of the frames after each context."""
    errors = []
    for start in _starts(run.shape[1], window, step):
        context = run[None, :, start : start + window - step]
        predicted = _predict_end(model, context, xyz, step)[0]
        future = run[:, start + window - step : start + window]
        errors.append((predicted.double() - future.double()).square().mean(1))
    return cast(NDArray[np.float64], torch.stack(errors).mean(0).cpu().numpy())


def _predict_end(model: SeriesModel, context: Tensor, xyz: Tensor, step: int) -> Tensor:
    """The `step` frames after a context; what stands in their place is never read."""
    blank = context.new_zeros(*context.shape[:2], step)
    masking = Masking(mode="predict_last_pixel", frames=step)
    return model(torch.cat([context, blank], dim=2), xyz, masking=masking).series[:, :, -step:].to(context.dtype)


def _starts(frames: int, window: int, stride: int) -> list[int]:
    """First frames of windows that cover a run; the last window ends with it."""
    starts = list(range(0, frames - window + 1, stride))
    return starts if starts[-1] == frames - window else [*starts, frames - window]


def _checked_step(model: SeriesModel, window: int, step: int | None) -> int:
    chosen = model.patch if step is None else step
    if not 1 <= chosen < window:
        raise UsageError(f"a step must be 1 to {window - 1} frames of a window of {window}, got {chosen}")
    return chosen


def _check_finite(series: Tensor) -> None:
    if not bool(torch.isfinite(series).all()):
        raise UsageError("the series has values that are not finite; normalise it without empty or constant parcels")


def _robust_z(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(reference) < 3:
        raise UsageError(f"a robust z needs three reference runs or more, got {len(reference)}")
    tiny = np.finfo(np.float64).tiny
    logs, known = (np.log(np.maximum(values, tiny)) for values in (scores, reference))
    centre = np.median(known, axis=0)
    spread = _MAD_TO_SD * np.median(np.abs(known - centre), axis=0)
    z: NDArray[np.float64] = (logs - centre) / np.maximum(spread, np.finfo(np.float64).eps)
    return z


def _hollow(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """With a diagonal of 0, so that what a parcel is to itself says nothing about others."""
    return matrix * (1 - np.eye(len(matrix)))


def _shuffled_accuracy(
    neighbours: NDArray[np.int64], labels: NDArray[np.int64], seed: int
) -> tuple[float, float, float]:
    generator = np.random.default_rng(seed)
    scores = [vote_accuracy(neighbours, generator.permutation(labels)) for _ in range(_PERMUTATIONS)]
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(np.mean(scores)), float(low), float(high)


@contextmanager
def _evaluating(model: SeriesModel) -> Iterator[None]:
    """Evaluation mode and no gradients; the mode is given back."""
    module = cast(nn.Module, model)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def _name(names: Sequence[str] | None, place: int) -> str:
    return str(place) if names is None else names[place]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
