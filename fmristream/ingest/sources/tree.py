"""Runs of a collection with a layout of its own, found by its description: HCP, UK Biobank, INDI, or one of the user's."""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fmristream.errors import SourceError, UsageError
from fmristream.ingest.sources.collection import Collection, RunPattern
from fmristream.ingest.sources.listing import (
    CIFTI_LEFT_OUT,
    VOLUME_LEFT_OUT,
    Listing,
    SideFile,
    Skipped,
    SourceRun,
    imaging_suffix,
    is_dense_series,
    is_hidden,
    label_of,
    parse_bids_name,
    takes_cifti,
    unique_names,
    without_archive_suffix,
)
from fmristream.ingest.sources.participants import Row, parse_participants
from fmristream.ingest.sources.side_files import OF_ANOTHER_RUN, NamedAfter
from fmristream.ingest.sources.sidecars import applicable, index_sidecars, repetition_times
from fmristream.ingest.sources.texts import read_text
from fmristream.storage.urls import display_url, join_url

_FIELDS = ("session", "task", "acq", "run", "echo", "space", "den", "desc")
# How much of the root's own path may belong to the layout, where the user names a folder inside it.
_ROOT_PARTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A path that a pattern fits, and what it means."""

    key: str
    pattern: RunPattern
    labels: Mapping[str, str]

    @property
    def desc(self) -> str:
        return self.labels.get("desc", "")


def qualified(root: str, key: str) -> str:
    """A path with the last folders of its root before it, for a root that lies inside the layout."""
    return "/".join([*display_url(root).rstrip("/").split("/")[-_ROOT_PARTS:], key])


def find_tree_runs(
    root: str,
    keys: Sequence[str],
    collection: Collection,
    *,
    space: str | None,
    cifti: bool,
    wanted: Mapping[str, Sequence[str]],
) -> Listing:
    """The runs among `keys`; `space` declares, over what the description says; `wanted` are labels that were asked for.

    Volumes are taken, or, by `cifti`, grayordinates; see `takes_cifti`.

    Raises:
        UsageError: there is no run, or several forms of runs and nothing says which.
        StorageError: a text file cannot be read.
    """
    images = [key for key in keys if imaging_suffix(key) and not is_hidden(key)]
    found = _matching(root, images, collection)
    if not found:
        raise UsageError(
            f"{display_url(root)}: no run of {collection.kind} among {len(keys)} files; expected {collection.title}"
        )
    spaces = (space,) if space else wanted.get("space", ())
    kept, of_other_kind = _one_kind(found, collection, cifti, {**wanted, "space": spaces})
    taken, skipped, notes = _one_form(kept, collection, wanted.get("desc", ()))
    skipped += of_other_kind
    present, tables = set(keys), NamedAfter(keys)
    runs, site_of = [], defaultdict(set)
    for one, tr_s in zip(taken, _times(root, keys, taken, notes), strict=True):
        run = _source_run(root, one, collection, present, space=space, tr_s=tr_s)
        runs.append(replace(run, side=_tables(root, one, present, tables)))
        site_of[run.subject].add(one.labels.get("site", ""))
    participants = _participants(root, keys, collection, site_of, notes)
    notes += _odd(keys, found, runs)
    matched = {one.key for one in found}
    others = [key for key in images if key not in matched]
    skipped += _left_out(root, others, collection)
    return Listing(
        kind=collection.kind,
        root=root,
        runs=tuple(sorted(unique_names(runs), key=lambda run: run.key)),
        participants=participants,
        skipped=tuple(sorted(skipped, key=lambda file: file.key)),
        notes=tuple(notes),
    )


def _matching(root: str, images: Sequence[str], collection: Collection) -> list[_Found]:
    for place in (lambda key: key, lambda key: qualified(root, key)):
        matches = ((key, collection.match(place(key))) for key in images)
        found = [_Found(key=key, pattern=match[0], labels=_cleaned(match[1])) for key, match in matches if match]
        if found:
            return found
    return []


def _cleaned(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Where each site is an archive, its name is the site's."""
    return {**labels, "site": without_archive_suffix(labels["site"])} if "site" in labels else labels


def _one_kind(
    found: Sequence[_Found], collection: Collection, cifti: bool, wanted: Mapping[str, Sequence[str]]
) -> tuple[list[_Found], list[Skipped]]:
    """Volumes, or grayordinates; the others are left out by choice."""
    parts = {kind: [one for one in found if is_dense_series(one.key) is kind] for kind in (False, True)}
    labels = {kind: [{"space": collection.space, **one.labels} for one in part] for kind, part in parts.items()}
    chosen = takes_cifti(cifti, labels[False], labels[True], wanted)
    reason = VOLUME_LEFT_OUT if chosen else CIFTI_LEFT_OUT
    return parts[chosen], [Skipped(key=one.key, reason=reason, by_choice=True) for one in parts[not chosen]]


def _one_form(
    found: Sequence[_Found], collection: Collection, descs: Sequence[str]
) -> tuple[list[_Found], list[Skipped], list[str]]:
    """One of the forms in which the same runs are there; the others are left out by choice."""
    there = sorted({one.desc for one in found})
    if descs or len(there) == 1:  # what was asked for is chosen later, like every other label
        return list(found), [], []
    wanted = next((desc for desc in collection.prefer if desc in there), None)
    if wanted is None:
        raise UsageError(
            f"{collection.kind}: the runs are there in {len(there)} forms; choose one with --desc: {', '.join(there)}"
        )
    taken = [one for one in found if one.desc == wanted]
    others = [one for one in found if one.desc != wanted]
    skipped = [
        Skipped(key=one.key, reason=f"desc {one.desc}, not {wanted} (--desc chooses)", by_choice=True) for one in others
    ]
    have = {_identity(one) for one in taken}
    alone = sum(_identity(one) not in have for one in others)
    notes = (
        [f"{alone} files are of runs that are not there as {wanted}; --desc takes another form, or several"]
        if alone
        else []
    )
    return taken, skipped, notes


def _identity(one: _Found) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, text) for name, text in one.labels.items() if name != "desc"))


def _times(root: str, keys: Sequence[str], taken: Sequence[_Found], notes: list[str]) -> list[float | None]:
    """The runs' repetition times from BIDS sidecars, where there are any."""
    sidecars = index_sidecars(keys)
    if not sidecars:
        return [None] * len(taken)
    times, found_notes = repetition_times(
        root, [applicable(sidecars, one.key, parse_bids_name(one.key)) for one in taken]
    )
    notes += found_notes
    return times


def _source_run(
    root: str, one: _Found, collection: Collection, present: set[str], *, space: str | None, tr_s: float | None
) -> SourceRun:
    labels = {name: one.labels.get(name, "") for name in _FIELDS}
    labels["space"] = space or labels["space"] or collection.space
    subject = collection.subject.format_map(one.labels)
    run = SourceRun(
        key=one.key,
        name="",
        url=join_url(root, one.key),
        subject=subject,
        tr_s=tr_s,
        mask_url=_mask(root, one, present),
        sidecar_urls=(),
        side=(),
        **labels,
    )
    return replace(run, name=label_of(run))


def _mask(root: str, one: _Found, present: set[str]) -> str | None:
    key = _first_there(one, one.pattern.masks, present)
    return join_url(root, key) if key else None


def _tables(root: str, one: _Found, present: set[str], named_after: NamedAfter) -> tuple[SideFile, ...]:
    found = named_after.of(root, one.key)
    key = _first_there(one, one.pattern.confounds, present)
    others = tuple(file for file in found if file.name != "confounds")
    if not key or any(file.name == "confounds" and file.reason != OF_ANOTHER_RUN for file in found):
        return found
    return (SideFile(name="confounds", url=join_url(root, key), columns=one.pattern.confounds_columns), *others)


def _first_there(one: _Found, templates: Sequence[str], present: set[str]) -> str:
    folder = one.key.rpartition("/")[0]
    for template in templates:
        # Joined first: `..` in a template leads up within the tree, a label cannot lead anywhere (it holds no slash alone).
        key = posixpath.normpath(template.format_map({**one.labels, "folder": folder})).lstrip("/")
        if key in present:
            return key
    return ""


def _odd(keys: Sequence[str], found: Sequence[_Found], runs: Sequence[SourceRun]) -> list[str]:
    """What would otherwise be lost, or stored twice, without a word."""
    notes = []
    empty = {key.partition("!/")[0] for key in keys if "!/" in key} - {one.key.partition("!/")[0] for one in found}
    if empty:
        notes.append(f"{len(empty)} archives hold no run, the first: {min(empty)}")
    repeated = sum(count - 1 for count in Counter(run.name for run in runs).values())
    if repeated:
        notes.append(f"{repeated} runs have the same labels as another run: the same scan from two places?")
    return notes


def _participants(
    root: str,
    keys: Sequence[str],
    collection: Collection,
    site_of: Mapping[str, set[str]],
    notes: list[str],
) -> tuple[Row, ...]:
    """Rows of the tables in the tree, and the site of every subject where paths tell it."""
    rows: dict[str, Row] = {}
    for key in keys:
        match = next((found for pattern in collection.participants if (found := pattern.search(key))), None)
        if match is None and (key != "participants.tsv" or collection.participants):
            continue
        try:
            read, found_notes = parse_participants(read_text(root, key))
        except SourceError as error:
            notes.append(f"{error}; it is not used")
            continue
        notes += [f"{key}: {note}" for note in found_notes]
        for row in read:
            rows.setdefault(str(row["subject"]), {**row})
    travelled = [subject for subject, sites in site_of.items() if len(sites) > 1]
    if travelled:
        notes.append(
            f"{len(travelled)} subjects have runs at several sites: one person, or two with one number? their site is "
            "left empty"
        )
    for subject, sites in site_of.items():
        site = next(iter(sites)) if len(sites) == 1 else ""
        if any(sites):
            row = rows.setdefault(subject, {"subject": subject})
            row.setdefault("site", site or None)
    return tuple(rows[subject] for subject in sorted(rows))


def _left_out(root: str, others: Sequence[str], collection: Collection) -> list[Skipped]:
    """Images that the description names as none of its runs; what it does not name is anatomy, references, masks."""
    if not collection.left_out:
        return []
    skipped = []
    for key in others:
        reason = next((why for pattern, why in collection.left_out if pattern.search(qualified(root, key))), None)
        if reason is not None:
            skipped.append(Skipped(key=key, reason=reason, by_choice=True))
    return skipped
