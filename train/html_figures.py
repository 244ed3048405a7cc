"""The pictures of a report as SVG text: what was measured, with the uncertainty of the test subjects around it."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from train.evaluate import Subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from train.log import History

Floats = NDArray[np.float64]

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a97a5"
# More steps are drawn as means and ranges of so many stretches.
_MOST_POINTS = 1500
# More dots are drawn as pixels: an SVG of each would be megabytes.
_MOST_DOTS = 3000
_DRAWS = 1000
_SEED = 2000
_RATES = np.linspace(0, 1, 101)
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fmristream",  # the same numbers give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a column may be called anything
}


def curves(history: "History") -> str:
    """Training loss, learning rate, and validation's numbers where they were looked at."""
    keys = _eval_keys(history.evals)
    with _figure(7.6, 2.2 + 1.9 * (1 + bool(keys))) as (figure, svg):
        rows = figure.subplots(2 + bool(keys), 1, sharex=True, squeeze=False)[:, 0]
        steps = np.array([entry["step"] for entry in history.steps], dtype=np.float64)
        _line(rows[0], steps, _values(history.steps, "loss"), colour=BLUE, label="training")
        looked = np.array([entry["step"] for entry in history.evals], dtype=np.float64)
        if history.evals and "loss" in history.evals[0]:
            rows[0].plot(looked, _values(history.evals, "loss"), "o-", color=ORANGE, markersize=3, label="validation")
        rows[0].set_ylabel("loss")
        rows[0].legend(frameon=False)
        _line(rows[1], steps, _values(history.steps, "lr"), colour=GREY, label="")
        rows[1].set_ylabel("learning rate")
        for key, colour in zip(keys, (GREEN, ORANGE, BLUE), strict=False):
            rows[2].plot(looked, _values(history.evals, key), "o-", color=colour, markersize=3, label=key)
        if keys:
            rows[2].set_ylabel("validation")
            rows[2].legend(frameon=False)
        rows[-1].set_xlabel("step")
    return svg.getvalue()


def roc(subjects: Subjects, *, clusters: Sequence[str] | None = None) -> str:
    """The curve of two classes with the pointwise 95 % band over resampled subjects (families, where given)."""
    with _figure(4.4, 4.2) as (figure, svg):
        axes = figure.subplots()
        rates = [true_rates(subjects.truth[rows], subjects.score[rows]) for rows in _resampled(subjects, clusters)]
        if rates:
            low, high = np.quantile(rates, (0.025, 0.975), axis=0)
            axes.fill_between(_RATES, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % band")
        false, true = roc_points(subjects.truth, subjects.score)
        axes.plot(false, true, color=BLUE, label="net")
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axes.legend(frameon=False, loc="lower right")
    return svg.getvalue()


def scatter(subjects: Subjects, *, unit: str) -> str:
    """Prediction by truth, the line of equality, and the least-squares line with its 95 % band."""
    truth, told = subjects.truth, subjects.score
    with _figure(4.6, 4.2) as (figure, svg):
        axes = figure.subplots()
        axes.scatter(truth, told, s=14, color=BLUE, alpha=0.55, linewidth=0, rasterized=len(truth) > _MOST_DOTS)
        low, high = float(min(truth.min(), told.min())), float(max(truth.max(), told.max()))
        axes.plot([low, high], [low, high], color=GREY, linestyle=":", label="equal")
        at = np.linspace(float(truth.min()), float(truth.max()), 50)
        lines = [
            np.polyval(np.polyfit(truth[rows], told[rows], 1), at)
            for rows in _resampled(subjects, None, stratify=False)
            if np.ptp(truth[rows]) > 0
        ]
        if len(truth) > 2 and lines:
            bounds = np.quantile(lines, (0.025, 0.975), axis=0)
            axes.fill_between(at, *bounds, color=ORANGE, alpha=0.2, linewidth=0)
            axes.plot(at, np.polyval(np.polyfit(truth, told, 1), at), color=ORANGE, label="least squares, 95 % band")
        axes.set(xlabel=f"{unit}, true", ylabel=f"{unit}, predicted")
        axes.legend(frameon=False)
    return svg.getvalue()


def confusion(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    """Counts of subjects, shaded by the share of their true class."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.2 + 0.62 * len(names)
    with _figure(size + 0.7, size) as (figure, svg):
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            dark = share[row, column] > 0.55
            axes.text(
                column, row, str(counts[row, column]), ha="center", va="center", color="white" if dark else "black"
            )
        places = range(len(names))
        axes.set_xticks(places, labels=names, rotation=30, ha="right")
        axes.set_yticks(places, labels=names)
        axes.set(xlabel="told", ylabel="true")
        axes.spines[:].set_visible(False)
    return svg.getvalue()


def calibration(subjects: Subjects, *, bins: int = 5) -> str:
    """Share of the upper class by what the net says of its chance, in bins of equal numbers, with 95 % Wilson intervals."""
    chance = 1 / (1 + np.exp(-np.clip(subjects.score, -500, 500)))
    with _figure(4.4, 4.2) as (figure, svg):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
        for rows in np.array_split(np.argsort(chance, kind="stable"), bins):
            share, low, high = wilson(int(subjects.truth[rows].sum()), len(rows))
            at = float(chance[rows].mean())
            axes.errorbar(at, share, yerr=[[share - low], [high - share]], fmt="o", color=BLUE, markersize=5)
        axes.set(
            xlabel="chance that the net tells",
            ylabel="share of subjects",
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
            aspect="equal",
        )
        axes.legend(frameon=False)
    return svg.getvalue()


def forest(rows: Sequence[tuple[str, float, tuple[float, float]]], *, unit: str) -> str:
    """Differences, net minus baseline, with their 95 % intervals around 0."""
    with _figure(7.2, 1.1 + 0.42 * len(rows)) as (figure, svg):
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linewidth=1)
        for place, (_, difference, (low, high)) in enumerate(rows):
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2.2, solid_capstyle="round")
            axes.plot(difference, place, "o", color=BLUE, markersize=6)
        axes.set_yticks(range(len(rows)), labels=[name for name, _, _ in rows])
        axes.set(xlabel=f"net minus baseline, {unit}", ylim=(len(rows) - 0.4, -0.6))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return svg.getvalue()


def roc_points(truth: Floats, score: Floats) -> tuple[Floats, Floats]:
    """(false positive rate, true positive rate) at every distinct score, from nobody told positive to everybody."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    positive = (truth[order] == 1).astype(np.float64)
    true, all_told = np.cumsum(positive)[last], last + 1.0
    false = all_told - true
    return np.append(0, false / max(1.0, float((truth != 1).sum()))), np.append(
        0, true / max(1.0, float(positive.sum()))
    )


def true_rates(truth: Floats, score: Floats) -> Floats:
    """(101,) true positive rate at each false positive rate from 0 to 1, ties along the diagonal as AUROC counts them."""
    return np.asarray(np.interp(_RATES, *roc_points(truth, score)))


def wilson(positive: int, total: int, *, z: float = 1.959964) -> tuple[float, float, float]:
    """(share, lower, upper) of Wilson's 95 % interval (1927)."""
    share = positive / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * float(np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)))
    return share, min(share, middle - half), max(share, middle + half)


@contextmanager
def _figure(width: float, height: float) -> "Iterator[tuple[Figure, io.StringIO]]":
    """A figure in inches, written as SVG when it is done."""
    import matplotlib
    from matplotlib.figure import Figure

    svg = io.StringIO()
    with matplotlib.rc_context(dict(_STYLE)):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, svg
        figure.savefig(svg, format="svg", dpi=130, metadata={"Date": None, "Creator": None})


def _line(axes: "Axes", steps: Floats, values: Floats, *, colour: str, label: str) -> None:
    """Values by step; of very many the mean and range of stretches."""
    if len(steps) <= _MOST_POINTS:
        axes.plot(steps, values, color=colour, linewidth=1, label=label)
        return
    pieces = np.array_split(np.arange(len(steps)), _MOST_POINTS // 3)
    known = [rows[np.isfinite(values[rows])] for rows in pieces]
    known = [rows for rows in known if len(rows)]
    at = [steps[rows].mean() for rows in known]
    low, high = ([bound(values[rows]) for rows in known] for bound in (np.min, np.max))
    axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(at, [values[rows].mean() for rows in known], color=colour, linewidth=1.2, label=label)


def _values(entries: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.array([np.nan if entry.get(key) is None else entry[key] for entry in entries], dtype=np.float64)


def _eval_keys(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Numbers of validation that fit one axis: those that lie between -1 and 1."""
    known = ("auroc", "balanced_accuracy", "r", "r2", "f1")
    return [key for key in known if any(entry.get(key) is not None for entry in evals)][:3]


def _resampled(
    subjects: Subjects, clusters: Sequence[str] | None, *, stratify: bool = True
) -> Iterator[NDArray[np.int64]]:
    """Rows of so many draws of subjects (of each class, or of whole families), those of one class only left out."""
    rng = np.random.default_rng(_SEED)
    truth = subjects.truth
    if clusters is not None:
        _, of = np.unique(np.asarray(clusters), return_inverse=True)
        members = [np.flatnonzero(of == number) for number in range(int(of.max()) + 1)]
        for _ in range(_DRAWS):
            rows = np.concatenate([members[number] for number in rng.integers(0, len(members), len(members))])
            if not stratify or len(np.unique(truth[rows])) > 1:
                yield rows
        return
    strata = [np.flatnonzero(truth == value) for value in np.unique(truth)] if stratify else [np.arange(len(truth))]
    if stratify and len(strata) < 2:
        return
    for _ in range(_DRAWS):
        yield np.concatenate([rows[rng.integers(0, len(rows), len(rows))] for rows in strata])
