"""What a target holds already: nothing, exactly what is asked for, or something else, which is never touched."""

from collections.abc import Sequence
from dataclasses import replace

from fmristream.catalog.tables import Participant, decode_participants, encode_participants
from fmristream.errors import UsageError
from fmristream.ingest.execute import Engine
from fmristream.ingest.fingerprint import quick_fingerprint
from fmristream.ingest.options import ConvertOptions, ConvertReport, MaskChoice, Quarantined
from fmristream.ingest.plan import Survey, plan_spaces
from fmristream.ingest.splitting import split_subjects
from fmristream.ingest.summary import describe_runs
from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import FOLDER, newest_generation
from fmristream.storage import Store


def open_present(store: Store) -> Dataset | None:
    """The dataset that the store holds, None where nothing was committed.

    Raises:
        FormatError: it needs a newer reader.
        CorruptDataError: it is damaged.
    """
    if not store.list(FOLDER):
        return None
    return Dataset(store.name, store, newest_generation(store))


def require_same(present: Dataset, found: Survey, options: ConvertOptions, participants: Sequence[Participant]) -> None:
    """Raise UsageError unless the dataset holds these sources, converted with these options."""
    differences = (
        _other_runs(present, found)
        or _other_options(present, found, options)
        or _other_participants(present, participants)
    )
    if differences:
        raise UsageError(
            f"{present.store.name}: holds a dataset already, with {' and '.join(differences)}; convert into a new folder"
        )


def report_present(present: Dataset, *, source_kind: str) -> ConvertReport:
    """The report of a conversion that found its work done."""
    parts = {run.subject: run.split for run in present.runs if run.split}
    return replace(
        describe_runs(present.url, source_kind, present.runs, parts, stored_bytes=0),
        already_there=True,
        content_digest=present.content_digest,
        generation_digest=present.generation_digest,
        quarantined=tuple(Quarantined(name=name, reason=reason) for name, reason in present.skipped),
    )


def mask_record(choice: MaskChoice) -> dict[str, str | int]:
    """What a generation records of how its masks were chosen: no path, the mask itself is in the space."""
    return {"frames": choice.frames, "kind": choice.kind}


def _other_runs(present: Dataset, found: Survey) -> list[str]:
    held = {run.name: (run.source_bytes, run.source_crc) for run in present.runs}
    skipped = {name for name, _ in present.skipped}
    offered = {run.source.name: run.source for run in found.runs if run.source.name not in skipped}
    new, gone = set(offered) - set(held), set(held) - set(offered)
    prints = {name: quick_fingerprint(source) for name, source in offered.items() if name in held}
    changed = [name for name, print_ in prints.items() if held[name] != (print_.size, print_.crc)]
    if not (new or gone or changed):
        return []
    return [f"other runs ({len(new)} new, {len(changed)} changed, {len(gone)} missing in the source)"]


def _other_participants(present: Dataset, participants: Sequence[Participant]) -> list[str]:
    subjects = {run.subject for run in present.runs}
    rows = [row for row in participants if row["subject"] in subjects]
    now = decode_participants(encode_participants(rows)) if rows else []
    return [] if now == list(present.participants) else ["another participants table"]


def _other_options(present: Dataset, found: Survey, options: ConvertOptions) -> list[str]:
    """Each option that would have given other samples, named."""
    rows = {run.name: run for run in present.runs}
    kept = [run for run in found.runs if run.source.name in rows]
    choice = MaskChoice.parse(options.mask)
    parts, _ = split_subjects((run.source for run in kept), options)
    differs = {
        "another space": any(rows[run.source.name].space != run.space for run in kept),
        "another tr": any(rows[run.source.name].tr_s != run.tr_s for run in kept),
        "other groups": any(rows[run.source.name].group != (run.source.group or run.source.subject) for run in kept),
        "another split": any(run.split != parts.get(run.subject, "") for run in present.runs),
        "another mask": present.generation.document["mask"] != mask_record(choice),
    }
    brings_masks = choice.kind == "auto" and all(run.source.mask_url for run in found.runs)
    if (choice.kind == "file" or brings_masks) and not differs["another mask"]:
        with Engine(workers=1) as engine:
            plan = plan_spaces(found.runs, choice, engine)  # reads the mask files, computes nothing
        differs["another mask"] = any(
            plan.of_run.get(run.source.key) != rows[run.source.name].space_digest for run in kept
        )
    return [name for name, is_so in differs.items() if is_so]
