"""Which runs, and where in them, a pre-trained network completes worse than it completes the runs that it learnt from.

    OUT/runs.csv          runs by how conspicuous they are: error, z and place among the reference, the worst places
        places.parquet    a row per run: error and z of every place
        reference.json    what the training runs' errors were: median and spread by place, quantiles of their means
        report.md         the first rows of it, for people

z is robust: log errors against the median and MAD over the reference's runs. A network has learnt from its training runs,
so that new runs are a little worse on average; `--reference val` compares with runs that it has not.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.catalog.row_tables import TEXT, ColumnKind, write_rows
from fmristream.errors import UsageError
from fmristream.signal.recipes import expand
from fmristream.signal.steps import Global, Range, Temporal, TwoChannels, Voxelwise
from fmristream.storage.urls import display_url
from train.beyond.anomaly_errors import errors_of
from train.beyond.opened import ALL, Opened, open_for
from train.beyond.places import new_folder, require_free, together, write_csv
from train.beyond.predict import about, run_columns
from train.beyond.streaming import Means, in_order
from train.beyond.trained import Trained
from train.files import write_json
from train.launch import World

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch

Floats = NDArray[np.float64]

# SD of a normal distribution over its median absolute deviation.
_MAD_TO_SD = 1.4826
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_LEAST_RUNS = 3
_WORST, _ROWS = 3, 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunErrors:
    """Mean squared errors by kind, (runs, places) each; NaN where nothing was hidden."""

    places: tuple[str, ...]
    errors: Mapping[str, Floats]
    about_runs: Mapping[str, Sequence[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The log errors of the reference's runs: centre and spread by place, and of the runs' means."""

    centre: Floats
    spread: Floats
    means: Floats

    @classmethod
    def of(cls, errors: Floats) -> "Reference":
        """Of (runs, places).

        Raises:
            UsageError: there are fewer than three runs.
        """
        if len(errors) < _LEAST_RUNS:
            raise UsageError(
                f"a reference needs {_LEAST_RUNS} runs or more, got {len(errors)}; choose --reference otherwise"
            )
        logs = _logs(errors)
        centre = np.nanmedian(logs, axis=0)
        return cls(centre=centre, spread=_spread(logs, centre), means=_logs(np.nanmean(errors, axis=1)))

    def z(self, errors: Floats) -> Floats:
        """(runs, places)"""
        return np.asarray((_logs(errors) - self.centre) / np.maximum(self.spread, np.finfo(np.float64).eps))

    def run_z(self, errors: Floats) -> Floats:
        """(runs,) of each run's mean over places."""
        centre = np.median(self.means)
        spread = max(float(_spread(self.means[:, None], centre)[0]), float(np.finfo(np.float64).eps))
        return np.asarray((_logs(np.nanmean(errors, axis=1)) - centre) / spread)

    def below(self, errors: Floats) -> Floats:
        """(runs,) share of the reference's runs whose mean error is smaller."""
        means = _logs(np.nanmean(errors, axis=1))
        return np.asarray((self.means[None] < means[:, None]).mean(axis=1))


def anomaly(
    trained: Trained,
    url: str,
    *,
    out: Path,
    world: World,
    split: str = ALL,
    where: str = "",
    reference: str = "train",
) -> tuple[str, ...]:
    """Write how conspicuous the runs of a dataset are as a new folder; returns what there is to say of the data.

    Args:
        trained: a network of pre-training.
        url: of a converted dataset.
        out: a folder that is not there yet.
        world: who computes.
        split: which part of the data.
        where: a condition that chooses runs.
        reference: the part of the network's own data that is compared with.

    Raises:
        FmriStreamError: the network completes nothing, or the data are not for it; nothing was written.
    """
    require_free(out, world)
    data = trained.recipe.data
    own = {"train": data.train_split, "val": data.val_split, "test": data.test_split}.get(reference, reference)
    if not data.url:
        raise UsageError(
            f"{trained.source}: does not say which data it was trained on, which anomalies are held against"
        )
    with ExitStack() as stack:
        opened = together(world, lambda: open_for(trained, url, split=split, where=where, world=world, stack=stack))
        found = run_errors(opened)
        before = together(
            world, lambda: open_for(trained, data.url, split=own, where=data.where, world=world, stack=stack)
        )
        known = run_errors(before)
        told = opened.told + _told(trained, found.errors)
        if not world.is_main:
            return told
        references = {kind: Reference.of(errors) for kind, errors in known.errors.items()}
        with new_folder(out) as folder:
            rows = ranked(found, references)
            write_csv(folder / "runs.csv", rows)
            _write_places(folder / "places.parquet", found, references)
            write_json(folder / "reference.json", _reference_facts(references, found.places, own, known))
            (folder / "report.md").write_text(
                report(rows, told, url=url, reference=f"{own}, {len(before.clips.runs)} runs")
            )
            write_json(folder / "about.json", about(opened, url=url, split=split, where=where))
    return told


def run_errors(opened: Opened) -> RunErrors:
    """The errors of every run, mean over its windows; memory is a number per run and place."""
    errors = errors_of(opened)
    width = len(errors.places)

    def compute(batch: "Batch") -> torch.Tensor:
        signal, named = opened.inputs(batch)
        with torch.autocast(opened.world.device.type, dtype=torch.bfloat16, enabled=opened.bf16):
            sums = errors.of(signal, named)
        return torch.cat([part for kind in errors.kinds for part in sums[kind]], dim=1).double().cpu()

    means = Means(2 * width * len(errors.kinds))
    table = np.full((len(opened.clips.runs), len(errors.kinds), width), np.nan)
    for rows in in_order(opened, compute):
        for place, row in zip(rows.run.tolist(), rows.values, strict=True):
            _put(table, means.take(place, row))
    _put(table, means.finish())
    seen = ~np.isnan(table).all(axis=(1, 2))
    columns: dict[str, Sequence[str | None]] = {
        name: [cell for cell, kept in zip(cells, seen, strict=True) if kept]
        for name, cells in run_columns(opened).items()
    }
    kinds = {kind: table[seen, place] for place, kind in enumerate(errors.kinds)}
    return RunErrors(places=errors.places, errors=kinds, about_runs=columns)


def ranked(found: RunErrors, references: Mapping[str, Reference]) -> list[dict[str, Any]]:
    """A row per run, the most conspicuous first: by the mean of its z over kinds."""
    kinds = list(found.errors)
    run_z = {kind: references[kind].run_z(found.errors[kind]) for kind in kinds}
    below = {kind: references[kind].below(found.errors[kind]) for kind in kinds}
    places_z = {kind: references[kind].z(found.errors[kind]) for kind in kinds}
    order = np.argsort(-np.mean([run_z[kind] for kind in kinds], axis=0), kind="stable")
    rows = []
    for rank, run in enumerate(order.tolist(), start=1):
        row: dict[str, Any] = {"rank": rank}
        row |= {name: cells[run] for name, cells in found.about_runs.items()}
        for kind in kinds:
            z = np.nan_to_num(places_z[kind][run], nan=-np.inf)
            worst = np.argsort(-z, kind="stable")[:_WORST]
            row |= {
                f"{kind}_error": float(np.nanmean(found.errors[kind][run])),
                f"{kind}_z": float(run_z[kind][run]),
                f"{kind}_share_of_reference_below": float(below[kind][run]),
                f"{kind}_worst_places": "; ".join(f"{found.places[one]} (z {z[one]:.1f})" for one in worst),
            }
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]], told: Sequence[str], *, url: str, reference: str) -> str:
    """Markdown: the most conspicuous runs."""
    kinds = [name.removesuffix("_z") for name in rows[0] if name.endswith("_z")] if rows else []
    head = ["rank", "run", *(f"{kind} z" for kind in kinds), *(f"worst places ({kind})" for kind in kinds)]
    lines = [
        f"# Runs of {display_url(url)} against {reference}",
        "",
        "z: log error against the median and MAD of the reference. High means unlike what the network learnt, not ill.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
    ]
    for row in rows[:_ROWS]:
        cells = [str(row["rank"]), str(row["run"]), *(f"{row[f'{kind}_z']:.2f}" for kind in kinds)]
        cells += [str(row[f"{kind}_worst_places"]) for kind in kinds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in told)]) + "\n"


def _told(trained: Trained, kinds: Iterable[str]) -> tuple[str, ...]:
    """Where forecasts are not honest."""
    own = (Voxelwise, Temporal, Range, Global, TwoChannels)
    steps = expand(trained.recipe.data.normalize)
    if "forecast" not in kinds or trained.recipe.data.stats != "run" or not any(isinstance(one, own) for one in steps):
        return ()
    return (
        "runs are normalised by statistics of the whole run, which know the frames that forecasts are held against",
    )


def _put(table: Floats, done: Any) -> None:
    """Errors of a run: the sum of squares over how many there were."""
    if done is not None:
        kinds = done.mean.reshape(table.shape[1], 2, table.shape[2])
        with np.errstate(invalid="ignore", divide="ignore"):
            table[done.of] = np.where(kinds[:, 1] > 0, kinds[:, 0] / kinds[:, 1], np.nan)


def _write_places(path: Path, found: RunErrors, references: Mapping[str, Reference]) -> None:
    vector = ColumnKind(kind="vector", width=len(found.places))
    names = [f"{kind}_{what}" for kind in found.errors for what in ("error", "z")]
    kinds = {"run": TEXT, "subject": TEXT, **dict.fromkeys(names, vector)}
    with write_rows(path, kinds, facts={"places": list(found.places)}) as table:
        values: dict[str, Any] = {"run": found.about_runs["run"], "subject": found.about_runs["subject"]}
        for kind, errors in found.errors.items():
            values |= {f"{kind}_error": errors, f"{kind}_z": references[kind].z(errors)}
        table.add(values)


def _reference_facts(
    references: Mapping[str, Reference], places: Sequence[str], split: str, known: RunErrors
) -> dict[str, Any]:
    kinds = {}
    for kind, one in references.items():
        quantiles = np.quantile(np.exp(one.means), _QUANTILES)
        kinds[kind] = {
            "quantiles_of_mean_error": dict(zip(map(str, _QUANTILES), quantiles.tolist(), strict=True)),
            "median_log_error": one.centre.tolist(),
            "spread_of_log_error": one.spread.tolist(),
        }
    return {"split": split, "runs": len(known.about_runs["run"]), "places": list(places), "kinds": kinds}


def _logs(errors: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(errors, np.finfo(np.float64).tiny)))


def _spread(logs: Floats, centre: Any) -> Floats:
    return np.asarray(_MAD_TO_SD * np.nanmedian(np.abs(logs - centre), axis=0))
