"""Decide before any voxel is stored: which inputs are runs, which grids they share, which voxels of each grid are kept."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import ObjectMissingError, SourceError
from fmristream.ingest.execute import Engine
from fmristream.ingest.mask_file import read_mask
from fmristream.ingest.options import ConvertOptions, MaskChoice, Quarantined
from fmristream.ingest.run_stream import open_run
from fmristream.ingest.sources import Listing
from fmristream.ingest.tasks import MaskTask, SurveyedRun, compute_run_mask
from fmristream.shards.dataset import Dataset
from fmristream.shards.spaces import Space, read_space
from fmristream.signal.grid import Grid, is_believable, same_grid
from fmristream.storage.sources import source_size

Step = Callable[[int], None]


@dataclass(slots=True, kw_only=True)
class Survey:
    """The listed inputs, sorted into those whose headers are good and those that are not."""

    runs: list[SurveyedRun] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SpacePlan:
    """Which space each run is stored in."""

    spaces: dict[str, Space] = field(default_factory=dict)  # by digest
    of_run: dict[str, str] = field(default_factory=dict)  # source key -> space digest
    outside: dict[str, int] = field(
        default_factory=dict
    )  # source key -> voxels of its computed mask that are not stored
    quarantined: list[Quarantined] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def assign(self, runs: Iterable[SurveyedRun], space: Space) -> None:
        """Store these runs in this space."""
        digest = space.digest
        for run in runs:
            self.spaces[digest] = space
            self.of_run[run.source.key] = digest


def survey(listing: Listing, options: ConvertOptions, on_run: Step | None = None) -> Survey:
    """Read every header; nothing is allocated by what headers say."""
    wrong = [file for file in listing.skipped if not file.by_choice]
    found = Survey(quarantined=[Quarantined(name=file.key, reason=file.reason) for file in wrong])
    for source in listing.runs:
        try:
            with open_run(source) as stream:
                header = stream.header
            size = 0 if source.url.startswith("synth") else source_size(source.url)
        except (SourceError, ObjectMissingError) as error:
            found.quarantined.append(Quarantined(name=source.name, reason=str(error)))
        else:
            found.runs.append(
                SurveyedRun(
                    source=source,
                    header=header,
                    space=options.space or source.space or header.space,
                    tr_s=options.tr_s or source.tr_s or header.tr_s,
                    source_bytes=size,
                )
            )
            found.warnings += [f"{source.name}: {note}" for note in header.notes]
        if on_run is not None:
            on_run(1)
    return found


def group_by_grid(runs: Sequence[SurveyedRun]) -> list[tuple[Grid, list[SurveyedRun]]]:
    """Runs that share a grid, in the order of their keys; a group's grid is that of its first run."""
    groups: list[tuple[Grid, list[SurveyedRun]]] = []
    by_shape: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.source.key):
        grid = Grid(shape=run.header.shape, affine=run.affine)
        home = next((i for i in by_shape[grid.shape] if same_grid(groups[i][0], grid)), None)
        if home is None:
            by_shape[grid.shape].append(len(groups))
            groups.append((grid, [run]))
        else:
            groups[home][1].append(run)
    return groups


def plan_spaces(
    runs: Sequence[SurveyedRun],
    choice: MaskChoice,
    engine: Engine,
    on_frame: Step | None = None,
    existing: Sequence[Space] = (),
) -> SpacePlan:
    """Find the mask of every grid, reading what has to be read.

    Args:
        runs: what is to be converted.
        choice: how masks are found.
        engine: who computes them.
        on_frame: called for every frame that was read.
        existing: spaces that a dataset has already: runs that join it are stored in the mask of their grid.
    """
    plan = SpacePlan()
    for grid, members in group_by_grid(runs):
        present = [space for space in existing if same_grid(space.grid, grid)]
        if choice.kind == "none":
            plan.assign(members, next((space for space in present if space.mask.all()), _whole(grid)))
        elif choice.kind == "file":
            _use_given_mask(plan, grid, members, choice.path, present)
        else:
            _use_union(plan, grid, members, choice, engine, on_frame, present)
    return plan


def spaces_by_runs(dataset: Dataset | None) -> list[Space]:
    """The spaces of a dataset, the one that most of its runs are stored in first."""
    if dataset is None:
        return []
    documents = dataset.generation.document["spaces"]
    digests = list(dataset.runs.counts("space_digest"))
    return [read_space(dataset.store, digest=digest, document=documents[digest]) for digest in digests]


def _whole(grid: Grid) -> Space:
    return Space(grid=grid, mask=np.ones(grid.shape, dtype=bool))


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


def _use_union(
    plan: SpacePlan,
    grid: Grid,
    members: list[SurveyedRun],
    choice: MaskChoice,
    engine: Engine,
    on_frame: Step | None,
    present: Sequence[Space],
) -> None:
    """One mask for the grid: the one that is there, else the union of its runs' own masks, computed where a run has none."""
    union = np.zeros(grid.shape, dtype=bool)
    masked: list[SurveyedRun] = []
    to_compute: list[SurveyedRun] = []
    for run in members:
        if run.source.mask_url is None or choice.kind == "first":
            to_compute.append(run)
            continue
        try:
            own = read_mask(run.source.mask_url, run.header.shape, run.header.affine)
            _require_voxels(own, run.source.key)
        except SourceError as error:
            plan.quarantined.append(Quarantined(name=run.source.name, reason=f"its brain mask is unusable: {error}"))
        else:
            union |= own
            masked.append(run)
    for run, mask in _computed(plan, to_compute, choice.frames, engine, on_frame):
        if is_believable(mask):
            union |= mask
            masked.append(run)
            plan.outside[run.source.key] = int((mask & ~present[0].mask).sum()) if present else 0
        else:
            plan.warnings.append(
                f"{run.source.name}: the computed brain mask holds {int(mask.sum())} of {mask.size} voxels and is not "
                "believed; the whole volume is stored (give --mask PATH for a better one)"
            )
            plan.assign([run], next((space for space in present if space.mask.all()), _whole(grid)))
    if masked:
        plan.assign(masked, present[0] if present else Space(grid=grid, mask=union))


def _computed(
    plan: SpacePlan, runs: list[SurveyedRun], frames: int, engine: Engine, on_frame: Step | None
) -> Iterator[tuple[SurveyedRun, NDArray[np.bool_]]]:
    """The masks of these runs as they are found: one at a time, because all at once would be gigabytes."""
    tasks = [MaskTask(run=run, frames=frames) for run in runs]
    for position, result in engine.run(compute_run_mask, tasks, on_frame=on_frame):
        run = runs[position]
        if isinstance(result, Quarantined):
            plan.quarantined.append(result)
            continue
        shape = run.header.shape
        bits = np.unpackbits(result, count=int(np.prod(shape)))
        yield run, bits.astype(bool).reshape(shape)


def _require_voxels(mask: NDArray[np.bool_], name: str) -> None:
    if not mask.any():
        raise SourceError(f"{name}: the mask holds no voxel; make a new one, or give --mask none")


def _rows(grid: Grid) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in grid.matrix().tolist())
