"""Convert a collection of NIfTI runs into a dataset: plan, do the runs, commit. Interrupt it anywhere and run it again."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fmristream.errors import SourceError, UsageError
from fmristream.ingest import pending
from fmristream.ingest.commit import Converted, commit_dataset
from fmristream.ingest.execute import Engine
from fmristream.ingest.options import (
    ConvertOptions,
    ConvertReport,
    MaskChoice,
    Progress,
    ProgressCallback,
    Quarantined,
)
from fmristream.ingest.plan import SpacePlan, Survey, plan_spaces, survey
from fmristream.ingest.present import mask_record, open_present, report_present, require_same
from fmristream.ingest.sources import Listing, find_runs
from fmristream.ingest.splitting import split_subjects
from fmristream.ingest.summary import describe_runs, estimate, not_chosen, participant_warnings, stored_bytes
from fmristream.ingest.target import require_readable_mask, require_writable
from fmristream.ingest.tasks import Resumed, RunTask, SurveyedRun, convert_run
from fmristream.shards.generation import repair_hint
from fmristream.shards.spaces import space_document, write_space
from fmristream.storage import Store, open_store
from fmristream.storage.urls import display_url, scheme_of


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
    if options.workers > 1 and scheme_of(store.name) == "memory":
        raise UsageError(f"{store.name}: lies in this process's memory, where no other can write; use --workers 1")
    require_readable_mask(options)
    listing = find_runs(source, **options.sources)
    meter = _Meter(progress)
    meter.start("reading headers", runs=len(listing.runs), frames=0)
    found = survey(listing, options, meter.run_done)
    _require_some(found.runs, found.quarantined, source)
    # An empty part is refused before the work, not after it.
    split_subjects((run.source for run in found.runs), options)
    if dry_run:
        return estimate(store.name, listing, found, options)
    present = open_present(store)
    if present is not None:
        require_same(present, found, options, listing.participants)
        pending.clear(store)  # whoever committed it may have been killed before this
        repair_hint(store, present.generation.number)
        return report_present(present, source_kind=listing.kind)
    require_writable(store)
    return _convert(store, listing, found, options, meter)


def _convert(store: Store, listing: Listing, found: Survey, options: ConvertOptions, meter: "_Meter") -> ConvertReport:
    choice = MaskChoice.parse(options.mask)
    with Engine(options.workers) as engine:
        meter.start("computing masks", runs=0, frames=sum(run.header.frames for run in found.runs))
        plan = plan_spaces(found.runs, choice, engine, meter.frames_done)
        for space in plan.spaces.values():
            write_space(store, space)
        done = _convert_runs(store, found.runs, plan, engine, meter)
    quarantined = (*found.quarantined, *plan.quarantined, *done.quarantined)
    _require_some(done.converted, quarantined, listing.root)
    subjects = {one.surveyed.source.subject for one in done.converted}
    parts, how = split_subjects((one.surveyed.source for one in done.converted), options)
    generation, runs = commit_dataset(
        store,
        done.converted,
        parts=parts,
        spaces=plan.spaces,
        participants=[row for row in listing.participants if row["subject"] in subjects],
        quarantined=quarantined,
        split=how,
        mask=mask_record(choice),
    )
    pending.clear(store)
    report = describe_runs(store.name, listing.kind, runs, parts, stored_bytes(done.converted))
    return replace(
        report,
        content_digest=str(generation.document["content_digest"]),
        generation_digest=generation.digest,
        resumed=done.resumed,
        quarantined=quarantined,
        not_chosen=not_chosen(listing),
        warnings=(
            *listing.notes,
            *found.warnings,
            *plan.warnings,
            *report.warnings,
            *participant_warnings(listing.participants, subjects),
        ),
    )


@dataclass(slots=True)
class _Done:
    """Results of the runs, as they came in."""

    converted: list[Converted] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    resumed: int = 0


def _convert_runs(store: Store, runs: Sequence[SurveyedRun], plan: SpacePlan, engine: Engine, meter: "_Meter") -> _Done:
    wanted = [run for run in runs if run.source.key in plan.of_run]
    tasks = [
        RunTask(run=run, store=store, space_digest=digest, space_document=space_document(plan.spaces[digest]))
        for run in wanted
        for digest in [plan.of_run[run.source.key]]
    ]
    meter.start("converting", runs=len(tasks), frames=sum(run.header.frames for run in wanted))
    done = _Done()
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

    def run_done(self, count: int, *, frames: int = 0) -> None:
        """A run is finished; its frames count once, whether they were counted one by one or not."""
        done = self._now.frames_done + frames - min(self._within, frames)
        self._within = 0
        self._tell(replace(self._now, runs_done=self._now.runs_done + count, frames_done=done))

    def _tell(self, now: Progress) -> None:
        self._now = now
        if self._callback is not None:
            self._callback(now)
