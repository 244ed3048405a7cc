"""What a target holds already, and what of a source is not in it: nothing is replaced that nobody asked to replace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fmristream.catalog.tables import Participant, decode_participants, encode_participants
from fmristream.errors import ConflictError, UsageError
from fmristream.ingest.execute import Engine
from fmristream.ingest.fingerprint import quick_fingerprint
from fmristream.ingest.options import ConvertOptions, ConvertReport, MaskChoice, Quarantined, UpdateKind
from fmristream.ingest.plan import Survey, plan_spaces, spaces_by_runs
from fmristream.ingest.sources import Listing, SourceRun
from fmristream.ingest.splitting import split_kind, split_record, split_subjects
from fmristream.ingest.summary import describe_dataset, headers_mode
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.dataset import Dataset
from fmristream.shards.generation import FOLDER, newest_generation
from fmristream.shards.notes import codec_of, headers_of
from fmristream.shards.side import TABLE_ENCODING
from fmristream.shards.withdrawn import is_withdrawn, names_withdrawn, without_withdrawn
from fmristream.storage import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How a source differs from what was converted before.

    Attributes:
        new: runs that the dataset does not hold.
        changed: runs that it holds with another content of the file.
        gone: how many of its runs the source does not have; they stay.
        withdrawn: runs of subjects that were withdrawn from the dataset: they are not taken again.
        participants: whether rows of its subjects differ.
        options: what was decided otherwise then, in words.
    """

    new: tuple[SurveyedRun, ...]
    changed: tuple[SurveyedRun, ...]
    gone: int
    withdrawn: tuple[SurveyedRun, ...]
    participants: bool
    options: tuple[str, ...]

    def wanted(self, update: UpdateKind | None) -> tuple[SurveyedRun, ...]:
        """The runs to convert."""
        return (*self.new, *self.changed) if update == "all" else self.new


def open_present(store: Store) -> Dataset | None:
    """The dataset that the store holds, None where nothing was committed.

    Raises:
        FormatError: it needs a newer reader.
        CorruptDataError: it is damaged.
    """
    if not store.list(FOLDER):
        return None
    return Dataset(store.name, store, newest_generation(store))


def compare(
    present: Dataset,
    found: Survey,
    options: ConvertOptions,
    participants: Sequence[Participant],
    *,
    contents: Mapping[str, object] | None = None,
) -> Changes:
    """What of a source is not in the dataset, or is there otherwise; `contents` says what is stored beside the voxels."""
    held = _held(present)
    skipped = {name for name, _ in present.skipped}
    withdrawn = tuple(run for run in found.runs if is_withdrawn(present.generation, run.source.subject))
    excluded = {run.source.name for run in withdrawn}
    offered = [run for run in found.runs if run.source.name not in excluded]
    known = [run for run in offered if run.source.name in held]
    new = [run for run in offered if run.source.name not in held and (run.source.name not in skipped or options.update)]
    names = {run.source.name for run in offered}
    return Changes(
        new=tuple(new),
        changed=tuple(run for run in known if _differs(run, held[run.source.name])),
        gone=sum(name not in names for name in held),
        withdrawn=withdrawn,
        participants=_other_participants(present, participants),
        options=(*_other_options(present, found, options), *_other_contents(present, contents)),
    )


def require_allowed(changes: Changes, present: Dataset, options: ConvertOptions) -> None:
    """Raise UsageError unless these changes may be made to the dataset."""
    wrong = list(changes.options)
    counted = {"new": len(changes.new), "changed": len(changes.changed), "missing in the source": changes.gone}
    is_other = any(counted.values()) if options.update is None else bool(changes.changed) and options.update == "new"
    if is_other:
        shown = ", ".join(f"{count} {what}" for what, count in counted.items())
        wrong.insert(0, f"other runs ({shown})")
    if changes.participants and options.update is None:
        wrong.append("another participants table")
    if not wrong:
        return
    remedy = "convert into a new folder"
    if not changes.options:
        remedy = "give --update all to replace what changed as well" if options.update else (
            "give --update new to add what is new, --update all to replace what changed as well, "
            "or convert into a new folder"
        )  # fmt: skip
    raise UsageError(f"{present.store.name}: holds a dataset already, with {' and '.join(wrong)}; {remedy}")


def winner_of(
    store: Store,
    ours: Sequence[SurveyedRun],
    base: Dataset | None,
    options: ConvertOptions,
    *,
    contents: Mapping[str, object] | None = None,
) -> Dataset:
    """The dataset that another writer committed while `ours` were converted, if ours may be added to it.

    Raises:
        ConflictError: it holds something that does not go together with ours, or objects were removed meanwhile.
    """
    present = open_present(store)
    assert present is not None, "the commit failed because there is one"
    started = 0 if base is None else base.generation.number
    remedy = "nothing of it was changed; run the command again to see what is there"
    if int(present.generation.document.get("barrier", 0)) > started:
        raise ConflictError(f"{store.name}: unused objects were removed while this conversion ran; {remedy}")
    held = _held(present)
    before = {} if base is None else _held(base)
    theirs = [run for run in ours if run.source.name in held and held[run.source.name] != before.get(run.source.name)]
    if any(_differs(run, held[run.source.name]) for run in theirs):
        raise ConflictError(f"{store.name}: another writer committed other versions of the same runs; {remedy}")
    others = [*_other_options(present, Survey(runs=list(ours)), options), *_other_contents(present, contents)]
    if others:
        raise ConflictError(f"{store.name}: another writer committed a dataset with {' and '.join(others)}; {remedy}")
    if base is None and options.update is None and len(theirs) < len(ours):
        raise ConflictError(f"{store.name}: another writer committed other runs meanwhile; {remedy}")
    return present


def unheard_of(present: Dataset, quarantined: Sequence[Quarantined]) -> tuple[Quarantined, ...]:
    """Inputs that cannot be converted and that the dataset does not list as such; none of withdrawn subjects."""
    known = set(present.skipped)
    return tuple(
        one
        for one in quarantined
        if (one.name, one.reason) not in known and not names_withdrawn(present.generation, f"{one.name} {one.reason}")
    )


def report_present(present: Dataset, listing: Listing) -> ConvertReport:
    """The report of a conversion that found its work done."""
    return replace(
        describe_dataset(present, listing.kind),
        already_there=True,
        tables_not_compared=may_tables_differ(present, listing),
        quarantined=tuple(Quarantined(name=name, reason=reason) for name, reason in present.skipped),
    )


def may_tables_differ(present: Dataset, listing: Listing) -> bool:
    """Whether tables beside runs could differ, which nobody looks at where the run itself is the same."""
    stores = present.generation.document.get("contents", {}).get("tables", False)
    is_offered = any(file.url for run in listing.runs for file in run.side)
    return bool(stores) and (is_offered or any(TABLE_ENCODING in table.encodings for table in present.array_tables))


def mask_record(choice: MaskChoice) -> dict[str, str | int]:
    """What a generation records of how its masks were chosen: no path, the mask itself is in the space."""
    return {"frames": choice.frames, "kind": choice.kind}


def present_parts(present: Dataset) -> list[tuple[str, str, str]]:
    """(subject, group, part) of everybody; nobody where the dataset is not split."""
    return [who for who in present.runs.counts("subject", "group", "split") if who[2]]


_Held = Mapping[str, tuple[int, str]]  # run name -> size and checksum of its source


def _held(present: Dataset) -> _Held:
    columns = (present.runs.column(name) for name in ("name", "source_bytes", "source_crc"))
    return {name: (size, crc) for name, size, crc in zip(*columns, strict=True)}


def _differs(run: SurveyedRun, held: tuple[int, str]) -> bool:
    size, crc = held
    is_file = run.source_bytes > 0  # a synthetic run has no size before it is made
    if is_file and run.source_bytes != size:
        return True
    found = quick_fingerprint(run.source)
    return (found.size, found.crc) != (size, crc)


def _other_participants(present: Dataset, participants: Sequence[Participant]) -> bool:
    subjects = set(present.runs.column("subject"))
    rows = [without_withdrawn(present.generation, row) for row in participants if row["subject"] in subjects]
    now = decode_participants(encode_participants(rows)) if rows else []
    return {row["subject"]: row for row in now} != {row["subject"]: row for row in present.participants}


def _other_options(present: Dataset, found: Survey, options: ConvertOptions) -> list[str]:
    """Each option that would have given other samples, named."""
    held = set(present.runs.column("name"))
    rows = {run.source.name: present.run(run.source.name) for run in found.runs if run.source.name in held}
    kept = [run for run in found.runs if run.source.name in held]
    choice = options.mask_choice
    document = present.generation.document
    differs = {
        "another space": any(rows[run.source.name].space != run.space for run in kept),
        "another tr": any(rows[run.source.name].tr_s != run.tr_s for run in kept),
        "other groups": any(rows[run.source.name].group != (run.source.group or run.source.subject) for run in kept),
        "another split": _is_split_otherwise(present, [run.source for run in found.runs], options),
        "another layout": present.parameters["layout"] != options.layout,
        "another resampling": present.parameters.get("resampling") != options.parameters.get("resampling"),
        "another codec": codec_of(document) != options.codec,
        "other headers": headers_of(document) != headers_mode(options),
        "another mask": document["mask"] != mask_record(choice),
    }
    brings_masks = choice.kind == "auto" and all(run.source.mask_url for run in found.runs)
    # The union of other runs' masks would be another one, and is not what new runs are stored in.
    is_whole = len(kept) == len(held) == len(found.runs) and len(document["segments"]) == 1
    existing = spaces_by_runs(present) if choice.kind == "file" else []
    if (choice.kind == "file" or (brings_masks and is_whole)) and not differs["another mask"]:
        with Engine(workers=1) as engine:
            plan = plan_spaces(found.runs, choice, engine, existing=existing)  # reads mask files, computes nothing
        differs["another mask"] = any(
            plan.of_run.get(run.source.key) != rows[run.source.name].space_digest for run in kept
        )
    return [name for name, is_so in differs.items() if is_so]


def _other_contents(present: Dataset, contents: Mapping[str, object] | None) -> list[str]:
    """What is stored beside the voxels and was not, or the other way round; releases that stored none said nothing."""
    told = present.generation.document.get("contents")
    if contents is None or told is None:
        return []
    words = {
        "atlases": "other atlases or names of parcels",
        "sketch": "sketches on or off",
        "tables": "side tables on or off",
    }
    return [words[name] for name, value in contents.items() if told.get(name) != value]


def _is_split_otherwise(present: Dataset, runs: Sequence[SourceRun], options: ConvertOptions) -> bool:
    """Whether the split was made in another way, or the given one puts a subject elsewhere than he is."""
    kind, recorded = split_kind(runs, options), present.generation.document["split"]
    if recorded != split_record(kind, options):
        return True
    if kind != "file":
        return False
    here = {subject: part for subject, _, part in present_parts(present)}
    listed, _ = split_subjects(runs, options)
    return any(here[subject] != part for subject, part in listed.items() if subject in here)
