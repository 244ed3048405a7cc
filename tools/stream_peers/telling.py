"""Results as a table, as a document and as a picture."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.stream_peers.cases import MASKED, PLACED, Case
from tools.stream_peers.data import Facts
from tools.stream_peers.measure import Measured

# What others are compared with: ours with the same output.
BASES = {
    MASKED: "ours lossless masked, 1 thread",
    PLACED: "ours lossless placed, 1 thread",
    "TFF": "ours lossless placed, 1 thread",
}
_COLD_MB = 5  # of all rounds: below it is noise
REMOTE_BASE = "ours, {} in flight"


def base_of(one: Measured, found: Sequence[Measured]) -> Measured | None:
    """Ours with the same output, remote also with as many windows in flight, or with 16 where there is none."""
    named = {other.case.name: other for other in found if other.windows_per_s}
    return next((named[name] for name in bases_for(one.case) if name in named), None)


def bases_for(case: Case) -> tuple[str, ...]:
    """Names of the cases that it may be compared with, the best one first."""
    return REMOTE_BASE.format(case.in_flight), REMOTE_BASE.format(16), BASES[case.output]


def ratio(mine: Sequence[float], base: Sequence[float]) -> float | None:
    """Median over rounds of base / mine; None where one of the two was not measured."""
    if not mine or len(mine) != len(base):
        return None
    return statistics.median(b / a for a, b in zip(mine, base, strict=True))


def stored_mb(one: Measured, facts: Facts) -> float | None:
    """Megabytes of the layout that one window's share is."""
    folder = facts.path / one.case.layout
    if not one.case.layout or not folder.is_dir():
        return None
    pattern = "*.nii.gz" if "gz" in one.case.peer else "*.nii" if one.case.layout == "nifti" else "**/*"
    total = sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())
    held = facts.frames
    if one.case.layout in ("webdataset", "mosaic", "litdata"):
        held = facts.frames // facts.window * facts.window
    return total / (facts.runs * held) * facts.window / 1e6


def rows(found: Sequence[Measured], facts: Facts) -> list[dict[str, Any]]:
    """One document for each case."""
    made = []
    for one in found:
        base = base_of(one, found)
        made.append(
            {
                **asdict(one),
                "median": statistics.median(one.windows_per_s) if one.windows_per_s else None,
                "base": base.case.name if base else None,
                "ours_over_it": ratio(one.windows_per_s, base.windows_per_s) if base else None,
                "ours_over_it_cpu": ratio(base.cpu_ms, one.cpu_ms) if base else None,
                "stored_mb": stored_mb(one, facts),
            }
        )
    return made


def print_rows(title: str, made: Sequence[dict[str, Any]]) -> None:
    """As a table; what could not be measured is in it."""
    print(f"\n{title}")
    is_remote = any(row["requests"] is not None for row in made)
    last = f"{'req/w':>8}{'MB/w':>8}" if is_remote else f"{'MB/w':>8}"
    print(
        f"{'':46}{'windows/s':>10}{'min..max':>18}{'ours x':>8}{'in CPU':>8}{'CPU ms':>8}{'first s':>9}{last}  not equal"
    )
    for row in made:
        name = row["case"]["name"]
        if row["median"] is None:
            print(f"{name:46}{row['missing']}")
            continue
        spread = f"{_rate(min(row['windows_per_s']))}..{_rate(max(row['windows_per_s']))}"
        cpu_ms = statistics.median(row["cpu_ms"])
        size = row["megabytes"] if is_remote else row["stored_mb"]
        ratios = f"{_cell(row['ours_over_it']):>8}{_cell(row['ours_over_it_cpu']):>8}"
        cells = f"{_rate(row['median']):>10}{spread:>18}{ratios}{cpu_ms:8.3g}{row['first_s']:9.2f}"
        cells += f"{_cell(row['requests']):>8}" if is_remote else ""
        cold = f"{sum(row['disk_mb']):,.0f} MB came from the disk" if sum(row["disk_mb"]) > _COLD_MB else ""
        print(f"{name:46}{cells}{_cell(size):>8}  {'; '.join(word for word in (row['case']['note'], cold) if word)}")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(sections: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Bars of windows a second, on a logarithmic axis, fastest on top; ours in one colour, ceilings in another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        title: sorted((row for row in made if row["median"]), key=lambda row: row["median"])
        for title, made in sections.items()
    }
    shown = {title: made for title, made in shown.items() if made}
    lengths = [len(made) for made in shown.values()]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(10, 0.27 * sum(lengths) + 1.1 * len(shown)), height_ratios=lengths, squeeze=False
    )
    for axis, (title, made) in zip(axes[:, 0], shown.items(), strict=True):
        names, values = [row["case"]["name"] for row in made], [row["median"] for row in made]
        low = [row["median"] - min(row["windows_per_s"]) for row in made]
        high = [max(row["windows_per_s"]) - row["median"] for row in made]
        axis.barh(names, values, xerr=[low, high], color=[_color(row) for row in made], ecolor="0.3", height=0.75)
        for number, row in enumerate(made):
            axis.text(max(row["windows_per_s"]) * 1.06, number, _rate(row["median"]), va="center", fontsize=7)
        axis.set(xscale="log", title=title, ylim=(-0.6, len(made) - 0.4))
        rates = [rate for row in made for rate in row["windows_per_s"]]
        axis.set_xlim(min(rates) / 1.5, max(rates) * 2)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        "windows per second (median; lines: slowest and fastest round)\n"
        "red: ours; light red: our layout read by others; blue: others; grey: ceilings"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _color(row: dict[str, Any]) -> str:
    if row["case"]["peer"].startswith("ceilings:"):
        return "0.75"
    if row["case"]["peer"].endswith(":ours"):
        return "#c44e52"
    return "#dd9f8f" if row["case"]["name"].startswith("ours") else "#4c72b0"
