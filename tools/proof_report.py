"""The page of the proof: tables and a plot from whatever cells are finished, with what is missing said."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmristream.errors import UsageError
from tools.proof_cells import EFFECTS, INPUTS, MODELS, Cell, Settings, described, digest_of
from tools.proof_results import QUANTILES, Line, auroc_draws, expected_s, in_hours, read_lines, remaining

BEGIN, END = "<!-- results: written by tools/proof.py --report -->", "<!-- end of results -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One place of a table: a model's or an input's AUROC on an effect over the seeds that are finished.

    The interval is of the mean over seeds: of each seed's own cohort and network, test subjects are drawn anew.
    """

    mean: float
    low: float
    high: float
    seeds: Mapping[int, float]
    shuffled: float
    shuffled_low: float
    shuffled_high: float


def write_report(path: Path, *, out: Path, wanted: Sequence[Cell], settings: Settings) -> None:
    """Put the tables between the page's two marks, and the plot beside the page.

    Raises:
        UsageError: the page is there and has no marks.
    """
    lines = [line for line in read_lines(out / "results.jsonl") if line["digest"] in _digests(wanted, settings)]
    refused_path = out / "refused.json"
    refused = json.loads(refused_path.read_text()) if refused_path.exists() else {}
    text = "\n".join(_page(lines, wanted, settings, refused, plot=path.with_suffix(".png").name))
    old = path.read_text(encoding="utf-8") if path.exists() else f"# Proof\n\n{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        raise UsageError(f"{path}: expected a page with the lines {BEGIN!r} and {END!r}, between which tables are put")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    save_plot(path.with_suffix(".png"), lines, wanted)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def entry(lines: Sequence[Line]) -> Entry | None:
    """The seeds of one model, input and effect together; None where none is finished."""
    if not lines:
        return None
    latest = {line["seed"]: line for line in lines}
    mean, low, high = _mean_interval(latest, "score")
    shuffled, shuffled_low, shuffled_high = _mean_interval(latest, "shuffled")
    return Entry(
        mean=mean,
        low=low,
        high=high,
        seeds={seed: latest[seed]["auroc"] for seed in sorted(latest)},
        shuffled=shuffled,
        shuffled_low=shuffled_low,
        shuffled_high=shuffled_high,
    )


def difference(lines: Sequence[Line], others: Sequence[Line]) -> tuple[float, float, float] | None:
    """Mean AUROC less the others' on the same subjects and seeds, and its paired interval; None without a common seed."""
    mine, theirs = ({line["seed"]: line for line in some} for some in (lines, others))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    draws = []
    for seed in seeds:
        place = {subject: row for row, subject in enumerate(theirs[seed]["subject"])}
        rows = [place[subject] for subject in mine[seed]["subject"]]
        truth = mine[seed]["truth"]
        paired = [theirs[seed]["score"][row] for row in rows]
        draws.append(auroc_draws(truth, mine[seed]["score"]) - auroc_draws(truth, paired))
    low, high = np.quantile(np.mean(draws, axis=0), QUANTILES)
    return float(np.mean([mine[s]["auroc"] - theirs[s]["auroc"] for s in seeds])), float(low), float(high)


def save_plot(path: Path, lines: Sequence[Line], wanted: Sequence[Cell]) -> None:
    """Models by effect above, SwiFT's inputs by effect below: mean and interval, each seed, and with frames shuffled."""
    from matplotlib.figure import Figure

    effects = [effect for effect in EFFECTS if any(cell.effect == effect for cell in wanted)]
    models = [(model, MODELS[model].inputs[0], MODELS[model].words) for model in _models(wanted)]
    inputs = [("swift", given, INPUTS[given].words) for given in _ablated(wanted)]
    blocks = [rows for rows in (models, inputs) if rows]
    heights = [len(rows) + 1.5 for rows in blocks]
    figure = Figure(figsize=(3.0 * len(effects) + 3.2, 0.34 * sum(heights) + 1.1), layout="constrained")
    grid = figure.subplots(len(blocks), len(effects), sharex=True, sharey="row", squeeze=False, height_ratios=heights)
    for axes_row, rows in zip(grid, blocks, strict=True):
        for axes, effect in zip(axes_row, effects, strict=True):
            _plot_effect(axes, rows, _by_place(lines), effect)
            axes.set_title(f"{effect}: SwiFT by input" if rows is inputs else effect, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("held-out AUROC", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _plot_effect(
    axes: Any, rows: Sequence[tuple[str, str, str]], places: Mapping[tuple[str, str, str], list[Line]], effect: str
) -> None:
    axes.axvline(0.5, color="0.75", linewidth=0.8, zorder=0)
    labelled = False
    for y, (model, given, _) in enumerate(rows):
        found = entry(places.get((effect, model, given), []))
        if found is None:
            axes.text(0.5, y, "not run", color="0.6", fontsize=7, ha="center", va="center")
            continue
        names = (
            [None] * 3 if labelled else ["mean over seeds, 95 %", "each seed", "frames shuffled within windows, 95 %"]
        )
        labelled = True
        axes.plot([found.low, found.high], [y, y], color="C0", linewidth=2.2, solid_capstyle="butt")
        axes.plot(found.mean, y, "o", color="C0", markersize=5, label=names[0])
        axes.plot(list(found.seeds.values()), [y] * len(found.seeds), "|", color="C0", markersize=8, label=names[1])
        axes.plot([found.shuffled_low, found.shuffled_high], [y + 0.27] * 2, color="C1", linewidth=1)
        axes.plot(found.shuffled, y + 0.27, "o", color="C1", markersize=3, markerfacecolor="white", label=names[2])
    axes.set(xlim=(0, 1.03), ylim=(len(rows) - 0.4, -0.7))
    axes.set_yticks(range(len(rows)), [words for _, _, words in rows], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _page(
    lines: Sequence[Line], wanted: Sequence[Cell], settings: Settings, refused: Mapping[str, str], *, plot: str
) -> list[str]:
    places = _by_place(lines)
    effects = [effect for effect in EFFECTS if any(cell.effect == effect for cell in wanted)]
    models = [(MODELS[model].words, model, MODELS[model].inputs[0]) for model in _models(wanted)]
    inputs = [(INPUTS[given].words, "swift", given) for given in _ablated(wanted)]
    text = [*_what_is_missing(lines, wanted, settings, refused), "", f"![AUROC of every model and effect]({plot})", ""]
    text += [
        "### Models × effects",
        "",
        _MEANING.format(test=_range(lines, "num_test"), train=_range(lines, "num_train")),
    ]
    text += ["", *_table(models, effects, places, _auroc), "", "### The same networks, frames shuffled", ""]
    text += ["Test windows with their frames in random order; the reader or network is the same one.", ""]
    text += [*_table(models, effects, places, _shuffled), ""]
    if "fc" in _models(wanted):
        text += ["### AUROC less that of functional connectivity", ""]
        text += ["On the same test subjects, which are drawn together for the interval.", ""]
        others = [row for row in models if row[1] != "fc"]
        text += [*_table(others, effects, places, lambda found, place: _against_fc(found, places, place)), ""]
    if inputs:
        text += ["### SwiFT × inputs × effects", "", *_table(inputs, effects, places, _auroc), ""]
        text += ["Frames shuffled:", "", *_table(inputs, effects, places, _shuffled), ""]
    return [*text, "### What made these numbers", "", *_made_by(lines, models + inputs[1:])]


_MEANING = (
    "AUROC on {test} held-out subjects of each cohort ({train} for training): the mean over seeds [95 % interval of that mean "
    "over test subjects], and each seed's."
)


def _what_is_missing(
    lines: Sequence[Line], wanted: Sequence[Cell], settings: Settings, refused: Mapping[str, str]
) -> list[str]:
    left = remaining(wanted, lines, settings)
    text = [f"{len(wanted) - len(left)} of {len(wanted)} cells are finished."]
    if left:
        time_left = in_hours(sum(expected_s(cell, lines, settings) for cell in left))
        text[0] += f" **Missing: {len(left)}**, about {time_left} on one core."
    for model in dict.fromkeys(cell.model for cell in left):
        missing = sum(cell.model == model for cell in left)
        why = f": not in this copy, {refused[model]}" if model in refused else ""
        text.append(f"- {MODELS[model].words}: {missing} of {sum(c.model == model for c in wanted)} cells not run{why}")
    return text


def _table(rows: Sequence[tuple[str, str, str]], effects: Sequence[str], places: Any, write: Any) -> list[str]:
    text = [f"| | {' | '.join(effects)} |", f"|---|{'---|' * len(effects)}"]
    for words, model, given in rows:
        shown = [write(places.get((effect, model, given), []), (effect, model, given)) for effect in effects]
        text.append(f"| {words} | {' | '.join(shown)} |")
    return text


def _auroc(lines: Sequence[Line], place: tuple[str, str, str]) -> str:
    found = entry(lines)
    if found is None:
        return "not run"
    seeds = " ".join(_short(value) for value in found.seeds.values())
    return f"{_short(found.mean)} [{_short(found.low)}, {_short(found.high)}] ({seeds})"


def _shuffled(lines: Sequence[Line], place: tuple[str, str, str]) -> str:
    found = entry(lines)
    if found is None:
        return "not run"
    return f"{_short(found.shuffled)} [{_short(found.shuffled_low)}, {_short(found.shuffled_high)}]"


def _against_fc(lines: Sequence[Line], places: Mapping[tuple[str, str, str], list[Line]], place: Any) -> str:
    found = difference(lines, places.get((place[0], "fc", "features"), []))
    return "not run" if found is None else f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def _made_by(lines: Sequence[Line], rows: Sequence[tuple[str, str, str]]) -> list[str]:
    text = ["| | weights | loss of the last 50 steps | core-seconds a cell | code |", "|---|---|---|---|---|"]
    for words, model, given in rows:
        mine = [line for line in lines if (line["model"], line["input"]) == (model, given)]
        if mine:
            codes = ", ".join(dict.fromkeys(line["code"]["digest"] for line in mine))
            loss = _range(mine, "last_loss", ".2f")
            text.append(
                f"| {words} | {_range(mine, 'parameters', ',')} | {loss} | {_range(mine, 'core_s', '.0f')} | {codes} |"
            )
    told = dict.fromkeys(", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in lines)
    commits = dict.fromkeys(line["code"]["commit"] or "no commit" for line in lines)
    total = in_hours(sum(line["core_s"] for line in lines))
    return [*text, "", f"Code is a digest of the files that decide a number; commits {', '.join(commits) or 'none'};",
            f"{'; '.join(told) or 'no versions'}. {total} in all."]  # fmt: skip


def _mean_interval(latest: Mapping[int, Line], scores: str) -> tuple[float, float, float]:
    draws = np.mean([auroc_draws(line["truth"], line[scores]) for line in latest.values()], axis=0)
    low, high = np.quantile(draws, QUANTILES)
    field = "auroc" if scores == "score" else "shuffled_auroc"
    return float(np.mean([line[field] for line in latest.values()])), float(low), float(high)


def _digests(wanted: Sequence[Cell], settings: Settings) -> set[str]:
    return {digest_of(described(cell, settings)) for cell in wanted}


def _by_place(lines: Sequence[Line]) -> dict[tuple[str, str, str], list[Line]]:
    places: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        places.setdefault((line["effect"], line["model"], line["input"]), []).append(line)
    return places


def _models(wanted: Sequence[Cell]) -> list[str]:
    return [model for model in MODELS if any(cell.model == model for cell in wanted)]


def _ablated(wanted: Sequence[Cell]) -> list[str]:
    """SwiFT's inputs, its own first."""
    return list(MODELS["swift"].inputs) if any(cell.model == "swift" for cell in wanted) else []


def _range(lines: Sequence[Line], name: str, form: str = "") -> str:
    values = sorted({line[name] for line in lines if line.get(name) is not None})
    shown = list(dict.fromkeys(format(value, form) for value in values[:: max(1, len(values) - 1)]))
    return " to ".join(shown) or "–"


def _short(value: float) -> str:
    """Two digits, 1.00 only where it is 1."""
    return f"{value:.3f}" if 0.995 <= value < 1 else f"{value:.2f}"
