"""BIDS datasets as a source, raw or derivative (fMRIPrep and its kin): which files are runs, and what belongs to them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fmristream.errors import SourceError, UsageError
from fmristream.ingest.sources.listing import (
    CIFTI_LEFT_OUT,
    VOLUME_LEFT_OUT,
    BidsName,
    Listing,
    Skipped,
    SourceRun,
    is_dense_series,
    is_hidden,
    parse_bids_name,
    takes_cifti,
)
from fmristream.ingest.sources.participants import Row, parse_participants
from fmristream.ingest.sources.side_files import SideFiles
from fmristream.ingest.sources.sidecars import applicable, index_sidecars, repetition_times
from fmristream.ingest.sources.texts import read_json_object, read_text
from fmristream.storage.urls import display_url, join_url

NATIVE = "native"  # a run in its own scanner space: voxels do not correspond between subjects
PARTICIPANTS = "participants.tsv"

_DESCRIPTION = "dataset_description.json"
_BOLD = re.compile(r"(^|/)sub-[^/]*_bold\.(nii|nii\.gz|dtseries\.nii)$")
_FUNC_BOLD = re.compile(r"^(?:sub-[^/]+/)(?:ses-[^/]+/)?func/sub-[^/_]+_(?:[^/]+_)?bold\.(?:dtseries\.)?nii(?:\.gz)?$")
_OTHER_FOLDERS = frozenset({"derivatives", "sourcedata", "code"})
_NOT_MAGNITUDE = frozenset({"phase", "real", "imag"})
_PREPROCESSED = "preproc"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bold:
    """A candidate: a file named like a run."""

    key: str
    name: BidsName

    def label(self, entity: str) -> str:
        return self.name.entities.get(entity, "")

    @property
    def is_cifti(self) -> bool:
        return is_dense_series(self.key)

    @property
    def chosen_by(self) -> dict[str, str]:
        return {"space": self.label("space") or NATIVE, "den": self.label("den"), "desc": self.label("desc")}


def is_bids(keys: Sequence[str]) -> bool:
    """Whether a folder's files form a BIDS dataset."""
    return _DESCRIPTION in keys or any(_FUNC_BOLD.match(key) for key in keys)


def find_bids_runs(
    root: str,
    keys: Sequence[str],
    *,
    space: str | None,
    cifti: bool = False,
    wanted: Mapping[str, Sequence[str]] | None = None,
) -> Listing:
    """The runs of a BIDS dataset.

    A derivative says the space of each file: `space` then selects. Elsewhere it declares. Of a derivative's forms of a
    run, desc-preproc is taken where there is one, unless another one is asked for. Volumes are taken, or, by `cifti`,
    grayordinates; see `takes_cifti`. `wanted` are the labels that were asked for.

    Raises:
        UsageError: no run is there, or none in the wanted space.
        StorageError: a text file cannot be read.
    """
    own = [key for key in keys if not _is_elsewhere(key)]
    bolds = [_Bold(key=key, name=parse_bids_name(key)) for key in own if _BOLD.search(key)]
    is_derivative, notes = _is_derivative(root, own, bolds)
    wanted = wanted or {}
    bolds, others = _one_kind(bolds, cifti, {**wanted, "space": (space,) if space else wanted.get("space", ())})
    taken, skipped = _take(bolds, is_derivative=is_derivative and not wanted.get("desc"))
    skipped += others
    taken, skipped, declared = _select_space(root, taken, skipped, space=space, is_derivative=is_derivative)
    if not taken:
        raise UsageError(_nothing_found(root, keys, skipped))
    sidecars = index_sidecars(own)
    applied = [applicable(sidecars, bold.key, bold.name) for bold in taken]
    times, time_notes = repetition_times(root, applied)
    masks = _masks(own) if is_derivative else {}
    runs = [
        _source_run(
            root,
            bold,
            tr_s=tr_s,
            space=declared or bold.label("space") or ("" if bold.is_cifti else NATIVE),  # meshes may tell
            mask=None if bold.is_cifti else _mask_of(bold, masks),
            sidecars=keys,
        )
        for bold, tr_s, keys in zip(taken, times, applied, strict=True)
    ]
    side = SideFiles(own, runs=(key for key in own if _BOLD.search(key)))
    runs = [replace(run, side=side.of(root, run.key)) for run in runs]
    participants, participant_notes = read_participants(root, own)
    return Listing(
        kind="fmriprep" if is_derivative else "bids",
        root=root,
        runs=tuple(sorted(runs, key=lambda run: run.key)),
        participants=participants,
        skipped=tuple(sorted(skipped, key=lambda file: file.key)),
        notes=(*notes, *time_notes, *participant_notes),
    )


def read_participants(root: str, keys: Sequence[str]) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Rows of participants.tsv in the root, if there is one."""
    if PARTICIPANTS not in keys:
        return (), ()
    try:
        return parse_participants(read_text(root, PARTICIPANTS))
    except SourceError as error:
        return (), (f"{error}; it is not used",)


def _is_elsewhere(key: str) -> bool:
    return is_hidden(key) or not _OTHER_FOLDERS.isdisjoint(key.split("/")[:-1])


def _is_derivative(root: str, keys: Sequence[str], bolds: Sequence[_Bold]) -> tuple[bool, tuple[str, ...]]:
    # Raw file names may not have these entities, so they tell even where the description does not.
    by_name = any(bold.label("space") or bold.label("desc") for bold in bolds)
    if _DESCRIPTION not in keys:
        return by_name, (f"there is no {_DESCRIPTION}",)
    try:
        description = read_json_object(root, _DESCRIPTION)
    except SourceError as error:
        return by_name, (f"{error}; it is not used",)
    declared = str(description.get("DatasetType", "")).lower() == "derivative" or "PipelineDescription" in description
    return by_name or declared, ()


def _one_kind(
    bolds: Sequence[_Bold], cifti: bool, wanted: Mapping[str, Sequence[str]]
) -> tuple[list[_Bold], list[Skipped]]:
    """Volumes, or grayordinates; the others are left out by choice."""
    parts = {kind: [bold for bold in bolds if bold.is_cifti is kind] for kind in (False, True)}
    labels = {kind: [bold.chosen_by for bold in part] for kind, part in parts.items()}
    chosen = takes_cifti(cifti, labels[False], labels[True], wanted)
    reason = VOLUME_LEFT_OUT if chosen else CIFTI_LEFT_OUT
    return parts[chosen], [Skipped(key=bold.key, reason=reason, by_choice=True) for bold in parts[not chosen]]


def _take(bolds: Sequence[_Bold], *, is_derivative: bool) -> tuple[list[_Bold], list[Skipped]]:
    """Candidates that are runs; the others with the reason."""
    only_preprocessed = is_derivative and any(bold.label("desc") == _PREPROCESSED for bold in bolds)
    taken: dict[str, _Bold] = {}
    skipped = []
    for bold in sorted(bolds, key=lambda bold: bold.key):
        choice = _why_not_chosen(bold, only_preprocessed=only_preprocessed)
        reason = choice or _why_not(bold)
        stem = _stem(bold.key)
        if not reason and stem in taken:
            reason = f"has the same BIDS name as {taken[stem].key}"
        if reason:
            skipped.append(Skipped(key=bold.key, reason=reason, by_choice=bool(choice)))
        else:
            taken[stem] = bold
    return list(taken.values()), skipped


def _why_not_chosen(bold: _Bold, *, only_preprocessed: bool) -> str:
    """Why another form of this run is taken instead; "" where this one is."""
    if bold.label("part") in _NOT_MAGNITUDE:
        return f"part-{bold.label('part')} of a complex run, not its magnitude"
    if only_preprocessed and bold.label("desc") != _PREPROCESSED:
        return f"desc-{bold.label('desc')}, not desc-{_PREPROCESSED}" if bold.label("desc") else "not desc-preproc"
    return ""


def _why_not(bold: _Bold) -> str:
    """What is wrong with the file's name or place; "" where nothing is."""
    if not _FUNC_BOLD.match(bold.key):
        return "not at sub-<label>/[ses-<label>/]func/sub-<label>_…_bold.nii[.gz], where BIDS has its runs"
    folder = bold.key.partition("/")[0].removeprefix("sub-")
    if bold.label("sub") != folder:
        return f"its name says subject {bold.label('sub') or 'nobody'}, its folder {folder}"
    return ""


def _select_space(
    root: str, taken: list[_Bold], skipped: list[Skipped], *, space: str | None, is_derivative: bool
) -> tuple[list[_Bold], list[Skipped], str]:
    """Keep the wanted space where files say theirs; else the wanted space is what the user declares."""
    said = {bold.label("space") or NATIVE for bold in taken}
    if space is None or not is_derivative or said == {NATIVE}:
        return taken, skipped, space or ""
    if space not in said:
        raise UsageError(f"{display_url(root)}: no run in space {space!r}; there are {', '.join(sorted(said))}")
    kept, others = [], list(skipped)
    for bold in taken:
        if (own := bold.label("space") or NATIVE) == space:
            kept.append(bold)
        else:
            others.append(Skipped(key=bold.key, reason=f"in space {own}, not in {space}", by_choice=True))
    return kept, others, ""


def _source_run(
    root: str, bold: _Bold, *, tr_s: float | None, space: str, mask: str | None, sidecars: Sequence[str]
) -> SourceRun:
    return SourceRun(
        key=bold.key,
        name=_stem(bold.key),
        url=join_url(root, bold.key),
        subject=bold.label("sub"),
        **bold.name.labels(),
        space=space,
        tr_s=tr_s,
        mask_url=join_url(root, mask) if mask else None,
        sidecar_urls=tuple(join_url(root, key) for key in sidecars),
        side=(),
    )


def _stem(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


_Place = tuple[str, frozenset[tuple[str, str]]]


def _masks(keys: Sequence[str]) -> dict[_Place, str]:
    """Brain masks by folder and entities."""
    masks = {}
    for key in keys:
        if "_mask.nii" not in key:
            continue
        name = parse_bids_name(key)
        if name.suffix == "mask" and name.entities.get("desc") == "brain" and name.extension in (".nii", ".nii.gz"):
            masks[_place(key, name, without=("desc",))] = key
    return masks


def _mask_of(bold: _Bold, masks: dict[_Place, str]) -> str | None:
    """The mask of the same entities; the echoes of a run share one."""
    exact = masks.get(_place(bold.key, bold.name, without=("desc",)))
    return exact or masks.get(_place(bold.key, bold.name, without=("desc", "echo", "part")))


def _place(key: str, name: BidsName, *, without: tuple[str, ...]) -> _Place:
    entities = frozenset((entity, label) for entity, label in name.entities.items() if entity not in without)
    return key.rpartition("/")[0], entities


def _nothing_found(root: str, keys: Sequence[str], skipped: Sequence[Skipped]) -> str:
    where = f"{display_url(root)}: a BIDS dataset without runs; expected sub-<label>/[ses-<label>/]func/*_bold.nii[.gz]"
    if skipped:
        return f"{where}; {len(skipped)} files were passed over, the first: {skipped[0].key}: {skipped[0].reason}"
    nested = sorted(
        {"/".join(key.split("/")[:2]) for key in keys if key.startswith("derivatives/") and _BOLD.search(key)}
    )
    if nested:
        return f"{where}; there are some in {', '.join(nested)}: give the path of one of these"
    return where
