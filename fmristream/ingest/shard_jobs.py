"""One share of a conversion, for array jobs that know nothing of each other but the target.

Where masks are computed, a share is done in two visits. The first records what its runs add to the mask of each grid;
the second, once every share has done so, converts its runs. Neither commits anything: the plain `convert` that follows
finds the work done and does what is missing, so that no mistake here can cost more than time.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError
from fmristream.ingest import pending
from fmristream.ingest.execute import Engine, open_engine
from fmristream.ingest.options import ConvertOptions, ConvertReport, MaskChoice, Quarantined, Shard
from fmristream.ingest.plan import (
    RunMask,
    SpacePlan,
    Survey,
    find_masks,
    group_grids,
    plan_grayordinates,
    plan_spaces,
    survey,
    unpack_mask,
    volumes_of,
    whole_space,
)
from fmristream.ingest.sources import Listing, SourceRun
from fmristream.ingest.splitting import split_subjects
from fmristream.ingest.target import require_writable
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.generation import FOLDER as GENERATIONS
from fmristream.shards.spaces import Space, write_space
from fmristream.signal.grid import Grid
from fmristream.storage import Store

_IN_UNION, _WHOLE, _LEFT_OUT = 0, 1, 2


class Meter(Protocol):
    """Who is told of progress."""

    def start(self, stage: str, *, runs: int, frames: int) -> None: ...

    def run_done(self, count: int) -> None: ...

    def frames_done(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


class Done(Protocol):
    """What came of converting runs."""

    converted: list[Any]
    quarantined: list[Quarantined]
    resumed: int


ConvertRuns = Callable[[Survey, SpacePlan, Engine], Done]


def share_of(runs: Sequence[SourceRun], shard: Shard) -> list[SourceRun]:
    """The runs of one shard: dealt by a hash of their keys, so that each share has as many, long and short ones alike."""
    dealt = sorted(runs, key=lambda run: hashlib.sha256(run.key.encode("utf-8", "surrogateescape")).digest())
    return sorted(dealt[shard.index - 1 :: shard.count], key=lambda run: run.key)


def convert_shard(
    store: Store, listing: Listing, options: ConvertOptions, *, meter: Any, convert_runs: ConvertRuns
) -> ConvertReport:
    """Do the next stage of one shard that can be done.

    Args:
        store: the target; nothing becomes visible in it.
        listing: all of the source: every shard has to see the same.
        options: those of the conversion, the same for every shard but for `shard`.
        meter: told of progress.
        convert_runs: converts surveyed runs into planned spaces, as the whole conversion does.
    """
    assert options.shard is not None
    shard = Shard.parse(options.shard)
    report = ConvertReport(url=store.name, source_kind=listing.kind, shard=str(shard), warnings=listing.notes)
    if store.list(GENERATIONS):
        return replace(report, stage="committed")
    # Refused before the work of many machines, not after it.
    split_subjects(listing.runs, options)
    require_writable(store)
    own = replace(listing, runs=tuple(share_of(listing.runs, shard)), skipped=())
    choice = options.mask_choice
    with open_engine(options, meter.note) as engine:
        if choice.kind in ("none", "file"):
            # The first run of a grid gives it its affine, whichever shard that is in.
            found = _survey(listing, options, meter)
            plan = plan_spaces(found.runs, choice, engine)
            found = _only(found, own.runs)
        else:
            found = _survey(own, options, meter)
            names = _names(listing, choice, shard, options)
            if pending.read_record(store, names[shard.index - 1]) is None:
                meter.start("computing masks", runs=0, frames=sum(run.header.frames for run in found.runs))
                masks = find_masks(volumes_of(found.runs), choice, engine, meter.frames_done, store=store)
                found.quarantined += _record(store, names[shard.index - 1], masks)
            there = set(store.list(f"{pending.FOLDER}/{pending.SHARDS}"))
            if missing := sum(name not in there for name in names):
                return replace(_with_runs(report, found.runs, found.quarantined), stage="masks", missing_shards=missing)
            plan = _plan(store, names, listing, volumes_of(found.runs))
            plan_grayordinates(plan, found.runs, choice)
        for space in plan.spaces.values():
            write_space(store, space)
        done = convert_runs(found, plan, engine)
    mine = {run.name for run in own.runs}
    left_out = [one for one in (*found.quarantined, *plan.quarantined, *done.quarantined) if one.name in mine]
    report = _with_runs(report, [one.surveyed for one in done.converted], left_out)
    return replace(report, stage="runs", resumed=done.resumed, warnings=(*report.warnings, *plan.warnings))


def _survey(listing: Listing, options: ConvertOptions, meter: Meter) -> Survey:
    meter.start("reading headers", runs=len(listing.runs), frames=0)
    return survey(listing, options, meter.run_done)


def _only(found: Survey, runs: Sequence[SourceRun]) -> Survey:
    keys, names = {run.key for run in runs}, {run.name for run in runs}
    return Survey(
        runs=[run for run in found.runs if run.source.key in keys],
        quarantined=[one for one in found.quarantined if one.name in names],
    )


def _with_runs(report: ConvertReport, runs: Sequence[SurveyedRun], left_out: Sequence[Quarantined]) -> ConvertReport:
    return replace(
        report,
        runs=len(runs),
        subjects=len({run.source.subject for run in runs}),
        frames=sum(run.header.frames for run in runs),
        spaces=tuple(sorted({run.space for run in runs})),
        source_bytes=sum(run.source_bytes for run in runs),
        quarantined=tuple(left_out),
    )


def _names(listing: Listing, choice: MaskChoice, shard: Shard, options: ConvertOptions) -> list[str]:
    """Names of the records of all shards: of the same runs, dealt the same way, for the same kind of mask."""
    runs = [[run.key.encode("utf-8", "surrogateescape").hex(), run.mask_url is not None] for run in listing.runs]
    about: list[Any] = [choice.kind, choice.frames, shard.count, sorted(runs)]
    if options.resample is not None:
        about.append([options.resample.record, options.tr_s])
    return [pending.keyed(pending.SHARDS, [*about, index]) for index in range(1, shard.count + 1)]


def _run_id(key: str) -> str:
    return pending.keyed("run", key.encode("utf-8", "surrogateescape").hex()).rpartition("/")[2][:32]


def _record(store: Store, name: str, masks: Iterable[RunMask]) -> list[Quarantined]:
    """Record what the runs of a shard add to the mask of each grid; the record that names all others comes last."""
    grids: dict[Grid, int] = {}
    unions: dict[int, NDArray[np.uint8]] = {}
    runs: list[tuple[str, int, int]] = []
    left_out = []
    for one in masks:
        place = grids.setdefault(Grid(shape=one.run.header.shape, affine=one.run.affine), len(grids))
        verdict = _WHOLE
        if one.quarantined is not None:
            verdict = _LEFT_OUT
            left_out.append(one.quarantined)
        elif one.mask is not None:
            verdict = _IN_UNION
            bits = np.packbits(one.mask.reshape(-1))
            unions[place] = unions[place] | bits if place in unions else bits
        runs.append((_run_id(one.run.source.key), place, verdict))
    described = []
    for grid, place in grids.items():
        key = pending.keyed("masks", [name, place, sorted(runs)])
        if place in unions:
            pending.save_mask(store, key, unions[place])
        described.append({"affine": list(grid.affine), "mask": key, "shape": list(grid.shape)})
    pending.write_record(store, name, {"grids": described, "runs": sorted(runs)})
    return left_out


@dataclass(frozen=True, slots=True)
class _Said:
    """What some shard said of a run."""

    key: str
    mask: str  # name of the record of what its shard adds to the mask of its grid
    verdict: int


def _plan(store: Store, names: Sequence[str], listing: Listing, own: Sequence[SurveyedRun]) -> SpacePlan:
    """The spaces of these runs, from what all shards said: those that a whole conversion would find."""
    said = _gathered(store, names)
    known = [(said[run_id], run.key) for run in listing.runs if (run_id := _run_id(run.key)) in said]
    groups = group_grids(
        (grid, _Said(key, mask, verdict)) for (grid, mask, verdict), key in sorted(known, key=lambda one: one[1])
    )
    mine = {run.source.key: run for run in own}
    plan = SpacePlan()
    for grid, members in groups:
        here = [one for one in members if one.key in mine]
        masked = [mine[one.key] for one in here if one.verdict == _IN_UNION]
        if masked:
            plan.assign(masked, Space(grid=grid, mask=_union(store, grid, members)))
        plan.assign([mine[one.key] for one in here if one.verdict == _WHOLE], whole_space(grid))
        reason = "it was left out when masks were computed; the conversion that commits says why"
        plan.quarantined += [
            Quarantined(name=mine[one.key].source.name, reason=reason) for one in here if one.verdict == _LEFT_OUT
        ]
    return plan


def _gathered(store: Store, names: Sequence[str]) -> Mapping[str, tuple[Grid, str, int]]:
    said = {}
    for name in names:
        body = pending.read_record(store, name)
        if body is None:
            raise _damaged(store, name)
        for run_id, place, verdict in body["runs"]:
            about = body["grids"][place]
            x, y, z = about["shape"]
            said[run_id] = Grid(shape=(x, y, z), affine=tuple(about["affine"])), about["mask"], verdict
    return said


def _union(store: Store, grid: Grid, members: Sequence[_Said]) -> NDArray[np.bool_]:
    union = np.zeros(grid.shape, dtype=bool)
    for key in sorted({one.mask for one in members if one.verdict == _IN_UNION}):
        bits = pending.load_mask(store, key)
        if bits is None:
            raise _damaged(store, key)
        union |= unpack_mask(bits, grid.shape)
    return union


def _damaged(store: Store, key: str) -> CorruptDataError:
    return CorruptDataError(f"{store.name}/{key}: damaged; remove it, and run every shard again")
