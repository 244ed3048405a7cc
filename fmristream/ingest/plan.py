"""Decide before any voxel is stored: which inputs are runs, which grids they share, which voxels of each grid are kept."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import ObjectMissingError, SourceError
from fmristream.ingest.execute import Engine
from fmristream.ingest.mask_file import read_mask
from fmristream.ingest.options import ConvertOptions, MaskChoice, Quarantined
from fmristream.ingest.run_stream import open_run
from fmristream.ingest.sources import Listing, SourceRun
from fmristream.ingest.sources.synth import is_synth
from fmristream.ingest.tasks import MaskTask, SurveyedRun, find_run_mask
from fmristream.shards.dataset import Dataset
from fmristream.shards.grayordinates import BrainModels
from fmristream.shards.spaces import AnySpace, Space, read_space
from fmristream.signal.grid import SAME_GRID_MM, Grid, Shape3, is_believable, same_grid
from fmristream.storage import Store
from fmristream.storage.sources import source_size
from fmristream.storage.urls import scheme_of

T = TypeVar("T")
R = TypeVar("R")
Step = Callable[[int], None]

# Opening a file waits for the disk or the network, the rest of reading a header is a millisecond of Python.
LOCAL_HEADERS_AT_ONCE = 4
REMOTE_HEADERS_AT_ONCE = 16


@dataclass(slots=True, kw_only=True)
class Survey:
    """The listed inputs, sorted into those whose headers are good and those that are not."""

    runs: list[SurveyedRun] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SpacePlan:
    """Which space each run is stored in."""

    spaces: dict[str, AnySpace] = field(default_factory=dict)  # by digest
    of_run: dict[str, str] = field(default_factory=dict)  # source key -> space digest
    outside: dict[str, int] = field(
        default_factory=dict
    )  # source key -> voxels of its computed mask that are not stored
    quarantined: list[Quarantined] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def assign(self, runs: Iterable[SurveyedRun], space: AnySpace) -> None:
        """Store these runs in this space."""
        digest = space.digest
        for run in runs:
            self.spaces[digest] = space
            self.of_run[run.source.key] = digest


def survey(listing: Listing, options: ConvertOptions, on_run: Step | None = None) -> Survey:
    """Read every header, several at a time; nothing is allocated by what headers say.

    What comes out is in the listing's order, whoever answered first.
    """
    wrong = [file for file in listing.skipped if not file.by_choice]
    found = Survey(quarantined=[Quarantined(name=file.key, reason=file.reason) for file in wrong])
    is_local = all(scheme_of(run.url) == "file" for run in listing.runs if not is_synth(run.url))
    threads = LOCAL_HEADERS_AT_ONCE if is_local else REMOTE_HEADERS_AT_ONCE
    for run in in_order(lambda source: _surveyed(source, options), listing.runs, threads=threads):
        if isinstance(run, Quarantined):
            found.quarantined.append(run)
        else:
            found.runs.append(run)
            found.warnings += [f"{run.source.name}: {note}" for note in run.header.notes]
        if on_run is not None:
            on_run(1)
    untouched = sum(run.resampling is None for run in found.runs)
    if options.resample is not None and untouched:
        found.warnings.append(
            f"{untouched} of {len(found.runs)} runs have that repetition time and grid already and are stored as they are"
        )
    return found


def in_order(function: Callable[[T], R], items: Sequence[T], *, threads: int) -> Iterator[R]:
    """`map`, a few items ahead of whoever takes the results; the first error ends it."""
    with ThreadPoolExecutor(threads, thread_name_prefix="fmristream-plan") as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _surveyed(source: SourceRun, options: ConvertOptions) -> SurveyedRun | Quarantined:
    try:
        with open_run(source) as stream:
            header = stream.header
        size = 0 if is_synth(source.url) else source_size(source.url)
        tr_s = options.tr_s or source.tr_s or header.tr_s
        wanted = options.resample
        resampling = None if wanted is None else wanted.of(header, tr_s, name=source.key)
    except (SourceError, ObjectMissingError) as error:
        return Quarantined(name=source.name, reason=str(error))
    if header.models and options.layout == "volume":
        reason = f"{source.key}: grayordinates are no volumes; convert them without --layout volume"
        return Quarantined(name=source.name, reason=reason)
    return SurveyedRun(
        source=source,
        header=header if resampling is None else resampling.header,
        space=options.space or source.space or header.space,
        tr_s=tr_s if resampling is None else resampling.header.tr_s,
        resampling=resampling,
        source_bytes=size,
    )


def group_by_grid(runs: Sequence[SurveyedRun]) -> list[tuple[Grid, list[SurveyedRun]]]:
    """Runs that share a grid, in the order of their keys; a group's grid is that of its first run."""
    ordered = sorted(runs, key=lambda run: run.source.key)
    return group_grids((Grid(shape=run.header.shape, affine=run.affine), run) for run in ordered)


def group_grids(items: Iterable[tuple[Grid, T]]) -> list[tuple[Grid, list[T]]]:
    """Items whose grids are the same as that of the first of their group, in the order given."""
    groups: list[tuple[Grid, list[T]]] = []
    # Where x begins tells most grids apart: native space has as many as there are runs, and not every pair is compared.
    near: dict[tuple[Shape3, int], list[int]] = defaultdict(list)
    for grid, item in items:
        place = math.floor(grid.affine[3] / SAME_GRID_MM)
        candidates = sorted(group for step in range(-2, 3) for group in near.get((grid.shape, place + step), ()))
        home = next((group for group in candidates if same_grid(groups[group][0], grid)), None)
        if home is None:
            near[grid.shape, place].append(len(groups))
            groups.append((grid, [item]))
        else:
            groups[home][1].append(item)
    return groups


def plan_spaces(
    runs: Sequence[SurveyedRun],
    choice: MaskChoice,
    engine: Engine,
    on_frame: Step | None = None,
    *,
    store: Store | None = None,
    existing: Sequence[AnySpace] = (),
) -> SpacePlan:
    """Find the mask of every grid, reading what has to be read.

    Args:
        runs: of which each is on some grid.
        choice: how masks are found.
        engine: computes those that have to be computed.
        on_frame: counts the frames read for it.
        store: where computed masks are recorded, and those of an interrupted conversion found again.
        existing: spaces that a dataset has already: runs that join it are stored in the mask of their grid.
    """
    plan = SpacePlan()
    plan_grayordinates(plan, runs, choice)
    runs = volumes_of(runs)
    masked = [space for space in existing if isinstance(space, Space)]
    groups = group_by_grid(runs)
    if choice.kind in ("none", "file"):
        for grid, members in groups:
            present = [space for space in masked if same_grid(space.grid, grid)]
            if choice.kind == "none":
                plan.assign(members, _whole_of(present, grid))
            else:
                _use_given_mask(plan, grid, members, choice.path, present)
        return plan
    _use_unions(plan, groups, find_masks(runs, choice, engine, on_frame, store=store), masked)
    return plan


def volumes_of(runs: Iterable[SurveyedRun]) -> list[SurveyedRun]:
    """Those runs that need a mask: all but grayordinates."""
    return [run for run in runs if not run.header.models]


def plan_grayordinates(plan: SpacePlan, runs: Iterable[SurveyedRun], choice: MaskChoice) -> None:
    """Store each run of grayordinates in the space that its own file describes; one file of each kind is read for that."""
    listed: dict[str, list[SurveyedRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.source.key):
        if run.header.models:
            listed[run.header.models].append(run)
    for digest, members in listed.items():
        while members:
            try:
                plan.assign(members, _models_of(members[0], digest))
                break
            except SourceError as error:
                plan.quarantined.append(Quarantined(name=members.pop(0).source.name, reason=str(error)))
    if choice.kind in ("first", "file") and listed:
        count = sum(map(len, listed.values()))
        plan.warnings.append(f"--mask is for volumes: {count} runs of grayordinates are stored whole")


def _models_of(run: SurveyedRun, digest: str) -> BrainModels:
    with open_run(run.source) as stream:
        models = stream.models
    if models is None or models.digest != digest:
        raise SourceError(f"{run.source.key}: its header changed while the conversion ran; convert it again")
    return models


def spaces_by_runs(dataset: Dataset | None) -> list[AnySpace]:
    """The spaces of a dataset, the one that most of its runs are stored in first."""
    if dataset is None:
        return []
    documents = dataset.generation.document["spaces"]
    digests = list(dataset.runs.counts("space_digest"))
    return [read_space(dataset.store, digest=digest, document=documents[digest]) for digest in digests]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMask:
    """What a run adds to the mask of its grid: its voxels, or None where it has none that are believed."""

    run: SurveyedRun
    mask: NDArray[np.bool_] | None = None
    quarantined: Quarantined | None = None
    warning: str = ""


def find_masks(
    runs: Sequence[SurveyedRun],
    choice: MaskChoice,
    engine: Engine,
    on_frame: Step | None = None,
    *,
    store: Store | None = None,
) -> Iterator[RunMask]:
    """The masks of these runs as they are found, computed where a run brings none: one at a time, not gigabytes of them."""
    tasks = [MaskTask(run=run, frames=choice.frames, is_computed=choice.kind == "first", store=store) for run in runs]
    for position, result in engine.run(find_run_mask, tasks, on_frame=on_frame):
        run = runs[position]
        if not engine.counts_frames and on_frame is not None and tasks[position].has_to_compute:
            on_frame(run.header.frames)
        if isinstance(result, Quarantined):
            yield RunMask(run=run, quarantined=result)
            continue
        mask = unpack_mask(result, run.header.shape)
        if is_believable(mask) or not tasks[position].has_to_compute:
            yield RunMask(run=run, mask=mask)
        else:
            yield RunMask(
                run=run,
                warning=f"{run.source.name}: the computed brain mask holds {int(mask.sum())} of {mask.size} voxels and is "
                "not believed; the whole volume is stored (give --mask PATH for a better one)",
            )


def unpack_mask(bits: NDArray[np.uint8], shape: Shape3) -> NDArray[np.bool_]:
    """The mask (x, y, z) behind its packed bits in C order."""
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)


def whole_space(grid: Grid) -> Space:
    """Every voxel of the grid."""
    return Space(grid=grid, mask=np.ones(grid.shape, dtype=bool))


def _whole_of(present: Sequence[Space], grid: Grid) -> Space:
    return next((space for space in present if space.mask.all()), whole_space(grid))


def _use_given_mask(
    plan: SpacePlan, grid: Grid, members: list[SurveyedRun], path: str, present: Sequence[Space]
) -> None:
    try:
        mask = read_mask(path, grid.shape, _rows(grid))
    except SourceError as error:
        plan.quarantined += [
            Quarantined(name=run.source.name, reason=f"the given mask does not fit: {error}") for run in members
        ]
        return
    if not mask.any():
        reason = "the given mask holds no voxel; give another one, or --mask none"
        plan.quarantined += [Quarantined(name=run.source.name, reason=reason) for run in members]
        return
    same = (space for space in present if np.array_equal(space.mask, mask))
    plan.assign(members, next(same, Space(grid=grid, mask=mask)))


def _use_unions(
    plan: SpacePlan,
    groups: Sequence[tuple[Grid, list[SurveyedRun]]],
    found: Iterable[RunMask],
    existing: Sequence[Space],
) -> None:
    """One mask for each grid: the one that is there, else the union of its runs' masks; not believed, stored whole."""
    present = [[space for space in existing if same_grid(space.grid, grid)] for grid, _ in groups]
    home = {run.source.key: group for group, (_, members) in enumerate(groups) for run in members}
    unions: dict[int, NDArray[np.uint8]] = {}  # packed: in native space there is one for every run
    masked: dict[int, list[SurveyedRun]] = defaultdict(list)
    for one in found:
        group = home[one.run.source.key]
        if one.quarantined is not None:
            plan.quarantined.append(one.quarantined)
        elif one.mask is not None:
            bits = np.packbits(one.mask.reshape(-1))
            unions[group] = unions[group] | bits if group in unions else bits
            masked[group].append(one.run)
            outside = (one.mask & ~present[group][0].mask).sum() if present[group] else 0
            plan.outside[one.run.source.key] = int(outside)
        else:
            plan.warnings.append(one.warning)
            plan.assign([one.run], _whole_of(present[group], groups[group][0]))
    for group, bits in unions.items():
        grid = groups[group][0]
        union = present[group][0] if present[group] else Space(grid=grid, mask=unpack_mask(bits, grid.shape))
        plan.assign(masked[group], union)


def _rows(grid: Grid) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in grid.matrix().tolist())
