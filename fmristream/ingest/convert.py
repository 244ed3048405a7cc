"""Convert a collection of NIfTI runs into a dataset: plan, do the runs, commit. Interrupt it anywhere and run it again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fmristream.catalog.tables import Participant
from fmristream.errors import ConflictError, SourceError, UsageError
from fmristream.ingest import pending
from fmristream.ingest.atlas import GivenAtlas, ParcelPlan, atlas_record, plan_parcels, read_atlases
from fmristream.ingest.commit import Addition, Converted, commit_addition
from fmristream.ingest.execute import Engine, open_engine
from fmristream.ingest.options import (
    ConvertOptions,
    ConvertReport,
    Progress,
    ProgressCallback,
    Quarantined,
)
from fmristream.ingest.plan import SpacePlan, Survey, plan_spaces, spaces_by_runs, survey
from fmristream.ingest.present import (
    Changes,
    compare,
    mask_record,
    may_tables_differ,
    open_present,
    present_parts,
    report_present,
    require_allowed,
    unheard_of,
    winner_of,
)
from fmristream.ingest.pseudonyms import Labels, labelled
from fmristream.ingest.shard_jobs import convert_shard
from fmristream.ingest.side import SideTask, grouped_notes
from fmristream.ingest.sources import Listing, find_runs
from fmristream.ingest.splitting import extended_split, split_subjects
from fmristream.ingest.summary import (
    codec_record,
    describe_dataset,
    estimate,
    headers_record,
    not_chosen,
    participant_warnings,
)
from fmristream.ingest.target import require_readable_mask, require_writable
from fmristream.ingest.tasks import Resumed, RunTask, convert_run
from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import repair_hint
from fmristream.shards.hashing import NEW_BULK_DIGEST
from fmristream.shards.parcels import parcel_document, write_parcels
from fmristream.shards.spaces import Space, space_document, write_space
from fmristream.shards.withdrawn import is_withdrawn
from fmristream.storage import Store, open_store
from fmristream.storage.urls import display_url, scheme_of

# How often a commit is tried again on top of another writer's.
_COMMIT_ATTEMPTS = 20


def convert(
    source: str,
    url: str,
    *,
    options: ConvertOptions | None = None,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """Convert `source` into a dataset at `url`.

    Args:
        source: a BIDS dataset or fMRIPrep derivative, a known collection, a folder, a glob, a file, an archive, a table
            of runs, or `synth://...`.
        url: a new folder, `s3://bucket/prefix`, or `memory://name`.
        options: masks, splits, workers; see ConvertOptions.
        dry_run: read headers, say what would be done, write nothing.
        progress: called as work proceeds.

    Returns:
        A report; `report.quarantined` names every input that was left out, with the reason.

    Raises:
        UsageError: nothing to convert, or the target holds another dataset.
        SplitError: a part of the split would be empty.
        SourceError: not one of the inputs could be converted.
        StorageError: the target failed; run the same command again to go on.
    """
    report = convert_into(source, open_store(url), options=options, dry_run=dry_run, progress=progress)
    return replace(report, url=url)


def convert_into(
    source: str,
    store: Store,
    *,
    options: ConvertOptions | None = None,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """The same into an open store."""
    options = options or ConvertOptions()
    if options.needs_shared_target and scheme_of(store.name) == "memory":
        raise UsageError(f"{store.name}: lies in this process's memory, where no other can write; use --workers 1")
    require_readable_mask(options)
    open_engine(options)  # what is wrong with its options is told before headers are read
    atlases = read_atlases(options.atlases)
    listing, options, labels = labelled(find_runs(source, **options.sources), options, target=store.name)
    meter = _Meter(progress)
    if options.shard is not None and not dry_run:

        def convert_runs(found: Survey, plan: SpacePlan, engine: Engine) -> _Done:
            return _convert_runs(_Job(store, listing, found, options, meter, labels, atlases), None, plan, engine)

        report = convert_shard(store, listing, options, meter=meter, convert_runs=convert_runs)
        return replace(report, quarantined=tuple(labels.clean(report.quarantined)))
    meter.start("reading headers", runs=len(listing.runs), frames=0)
    found = survey(listing, options, meter.run_done)
    found.quarantined = labels.clean(found.quarantined)
    _require_some(found.runs, found.quarantined, source)
    # An empty part is refused before the work, not after it.
    split_subjects((run.source for run in found.runs), options)
    present = open_present(store)
    if present is None:
        if dry_run:
            return estimate(store.name, listing, found, options)
        require_writable(store)
        return _convert(_Job(store, listing, found, options, meter, labels, atlases))
    labels.require_same(present.generation.document, store.name)
    return _update(present, _Job(store, listing, found, options, meter, labels, atlases), dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class _Job:
    """What a conversion is about."""

    store: Store
    listing: Listing
    found: Survey  # runs that were found, or those of them that are to be converted
    options: ConvertOptions
    meter: "_Meter"
    labels: Labels
    atlases: Sequence[GivenAtlas] = ()


def _update(present: Dataset, job: _Job, *, dry_run: bool) -> ConvertReport:
    """Bring a dataset up to its source, as far as that is allowed."""
    changes = compare(
        present, job.found, job.options, job.listing.participants, contents=contents_record(job.options, job.atlases)
    )
    require_allowed(changes, present, job.options)
    wanted = changes.wanted(job.options.update)
    unheard = unheard_of(present, job.found.quarantined)
    notes = tuple(_update_notes(changes, job.options))
    todo = replace(job, found=replace(job.found, runs=list(wanted)))
    is_all = job.options.update == "all"
    if dry_run:
        report = estimate(job.store.name, job.listing, todo.found, job.options)
    elif wanted or (is_all and changes.participants) or (job.options.update and unheard):
        report = _convert(todo, present, is_needed=is_all and changes.participants)
    else:
        # Whoever committed it may have been killed before this.
        pending.clear(job.store, set(present.runs.column("object")))
        repair_hint(job.store, present.generation.number)
        report = report_present(present, job.listing)
        report = replace(report, quarantined=(*report.quarantined, *unheard))
    if job.options.update == "all" and wanted and not dry_run and may_tables_differ(present, job.listing):
        notes = (*notes, "tables beside runs whose image did not change were not compared; they stay as they are")
    return replace(report, warnings=(*report.warnings, *notes))


def _update_notes(changes: Changes, options: ConvertOptions) -> Iterator[str]:
    if changes.gone:
        yield f"{changes.gone} runs of the dataset are not in the source; they stay"
    if changes.withdrawn:
        yield f"{len(changes.withdrawn)} runs belong to subjects that were withdrawn from the dataset; they are left out"
    if changes.participants and options.update == "new":
        yield "rows of the participants table differ from the dataset's; only new subjects' rows are taken (--update all)"


def _convert(job: _Job, base: Dataset | None = None, *, is_needed: bool = False) -> ConvertReport:
    """Convert what was found and commit it; without a new run only what was broken before, unless it `is_needed`."""
    store, found, options = job.store, job.found, job.options
    choice = options.mask_choice
    with open_engine(options, job.meter.note) as engine:
        job.meter.start("computing masks", runs=0, frames=sum(run.header.frames for run in found.runs))
        existing = spaces_by_runs(base)
        plan = plan_spaces(found.runs, choice, engine, job.meter.frames_done, store=store, existing=existing)
        for space in plan.spaces.values():
            write_space(store, space)
        done = _convert_runs(job, base, plan, engine)
    quarantined = job.labels.clean((*found.quarantined, *plan.quarantined, *done.quarantined))
    if base is None:
        _require_some(done.converted, quarantined, job.listing.root)
    elif not done.converted and not is_needed and not unheard_of(base, quarantined):
        return replace(
            report_present(base, job.listing), warnings=tuple(plan.warnings)
        )  # what was broken is broken still
    present = _commit(job, base, done, plan, quarantined)
    pending.clear_runs(store, (one.finished for one in done.converted))
    report = describe_dataset(present, job.listing.kind)
    held = set() if base is None else set(base.runs.column("name"))
    replaced = sum(one.surveyed.source.name in held for one in done.converted)
    subjects = set(present.runs.column("subject"))
    return replace(
        report,
        resumed=done.resumed,
        added=len(done.converted) - replaced,
        replaced=replaced,
        quarantined=tuple(quarantined),
        not_chosen=not_chosen(job.listing),
        warnings=(
            *job.listing.notes,
            *found.warnings,
            *plan.warnings,
            *done.parcels.warnings,
            *grouped_notes([(one.surveyed.source.name, one.finished.notes) for one in done.converted]),
            *report.warnings,
            *participant_warnings(job.listing.participants, subjects),
        ),
    )


def _commit(
    job: _Job, base: Dataset | None, done: "_Done", plan: SpacePlan, quarantined: Sequence[Quarantined]
) -> Dataset:
    """Commit what was converted, on top of whatever another writer may have committed meanwhile."""
    store, converted = job.store, list(done.converted)
    contents = contents_record(job.options, job.atlases)
    started = base
    for attempts_left in reversed(range(_COMMIT_ATTEMPTS)):
        subjects = {one.surveyed.source.subject for one in converted}
        there = [] if base is None else present_parts(base)
        parts, how = extended_split((one.surveyed.source for one in converted), there, job.options)
        addition = Addition(
            converted=converted,
            parts=parts,
            spaces=plan.spaces,
            parcels=done.parcels.spaces,
            contents=contents,
            participants=_participants(job, base, subjects),
            quarantined=quarantined,
            split=how,
            mask=mask_record(job.options.mask_choice),
            parameters=job.options.parameters,
            codec=codec_record(
                job.options,
                [one.finished.quantization for one in converted],
                {} if base is None else base.generation.document,
            ),
            headers=headers_record(
                job.options,
                [one.finished.removed for one in converted],
                {} if base is None else base.generation.document,
            ),
            pseudonyms=job.labels.record,
            bulk_digest=_bulk_digest(started),
        )
        try:
            return Dataset(store.name, store, commit_addition(store, base, addition))
        except ConflictError:
            if not attempts_left:
                raise
            base = winner_of(store, [one.surveyed for one in converted], started, job.options, contents=contents)
            job.labels.require_same(base.generation.document, store.name)
            held = set(base.runs.column("name")) - (set() if started is None else set(started.runs.column("name")))
            left = [
                one
                for one in converted
                if one.surveyed.source.name not in held
                and not is_withdrawn(base.generation, one.surveyed.source.subject)  # withdrawn in the meantime
            ]
            if converted and not left:
                return base
            converted = left
    raise AssertionError("the last attempt returns or raises")


def _bulk_digest(base: Dataset | None) -> str:
    """Of runs that are converted now: the dataset's own."""
    return NEW_BULK_DIGEST if base is None else base.bulk_digest


def contents_record(options: ConvertOptions, atlases: Sequence[GivenAtlas]) -> dict[str, Any]:
    """What a generation records of what is stored beside the voxels."""
    return {"atlases": atlas_record(atlases), "sketch": options.sketch, "tables": options.side}


def _participants(job: _Job, base: Dataset | None, subjects: set[str]) -> list[Participant]:
    """Rows of the subjects that come in; of all that the dataset holds where it is brought up to date."""
    held = set() if base is None else set(base.runs.column("subject"))
    wanted = subjects | held if job.options.update == "all" else subjects - held
    return [row for row in job.listing.participants if row["subject"] in wanted]


@dataclass(slots=True)
class _Done:
    """Results of the runs, as they came in."""

    converted: list[Converted] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    resumed: int = 0
    parcels: ParcelPlan = field(default_factory=ParcelPlan)


def _convert_runs(job: _Job, base: Dataset | None, plan: SpacePlan, engine: Engine) -> _Done:
    meter = job.meter
    wanted = [run for run in job.found.runs if run.source.key in plan.of_run]
    parcels = plan_parcels(job.atlases, wanted, plan.spaces, plan.of_run)
    for made in parcels.spaces.values():
        write_parcels(job.store, made)
    documents = {digest: parcel_document(made) for digest, made in parcels.spaces.items()}
    made_after, barrier = (0, 0) if base is None else (base.generation.number, base.barrier)
    tasks = [
        RunTask(
            run=run,
            store=job.store,
            space_digest=digest,
            space_document=space_document(plan.spaces[digest]),
            made_after=made_after,
            barrier=barrier,
            bulk_digest=_bulk_digest(base),
            computed_outside=plan.outside.get(run.source.key, 0),
            layout=job.options.layout,
            header=job.options.header,
            codec=job.options.codec,
            threads=job.options.threads_per_worker,
            side=SideTask(
                parcels={chosen: documents[chosen] for chosen in parcels.of_run(run, digest)},
                tables=job.options.side,
                sketch=job.options.sketch and isinstance(plan.spaces[digest], Space),  # blocks are those of a volume
            ),
        )
        for run in wanted
        for digest in [plan.of_run[run.source.key]]
    ]
    meter.start("converting", runs=len(tasks), frames=sum(run.header.frames for run in wanted))
    done = _Done(parcels=parcels)
    for position, result in engine.run(convert_run, tasks, on_frame=meter.frames_done):
        if isinstance(result, Quarantined):
            done.quarantined.append(result)
        else:
            finished = result.finished if isinstance(result, Resumed) else result
            done.resumed += isinstance(result, Resumed)
            done.converted.append(Converted(surveyed=wanted[position], finished=finished))
        meter.run_done(1, frames=wanted[position].header.frames)
    return done


def _require_some(kept: Sequence[object], quarantined: Sequence[Quarantined], source: str) -> None:
    if kept:
        return
    shown = "; ".join(q.reason for q in quarantined[:3])
    more = f"; and {len(quarantined) - 3} more" if len(quarantined) > 3 else ""
    raise SourceError(f"{display_url(source)}: none of {len(quarantined)} inputs can be converted: {shown}{more}")


class _Meter:
    """Counts what is done and tells whoever listens."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._now = Progress(stage="", runs_done=0, runs=0, frames_done=0, frames=0)
        self._within = 0  # frames counted of the run in work, where one process does all

    def start(self, stage: str, *, runs: int, frames: int) -> None:
        self._within = 0
        self._tell(Progress(stage=stage, runs_done=0, runs=runs, frames_done=0, frames=frames))

    def frames_done(self, count: int) -> None:
        self._within += count
        self._tell(replace(self._now, frames_done=self._now.frames_done + count))

    def note(self, text: str) -> None:
        """Something that people should know."""
        if self._callback is not None:
            self._callback(replace(self._now, note=text))

    def run_done(self, count: int, *, frames: int = 0) -> None:
        """A run is finished; its frames count once, whether they were counted one by one or not."""
        done = self._now.frames_done + frames - min(self._within, frames)
        self._within = 0
        self._tell(replace(self._now, runs_done=self._now.runs_done + count, frames_done=done))

    def _tell(self, now: Progress) -> None:
        self._now = now
        if self._callback is not None:
            self._callback(now)
