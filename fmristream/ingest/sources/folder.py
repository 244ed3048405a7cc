"""Plain folders, globs and single files as a source: every imaging file is a run until its header says otherwise."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fmristream.errors import UsageError
from fmristream.ingest.sources.bids import read_participants
from fmristream.ingest.sources.listing import (
    CIFTI_LEFT_OUT,
    IMAGING_SUFFIXES,
    VOLUME_LEFT_OUT,
    Listing,
    Skipped,
    SourceRun,
    header_of_pair,
    imaging_suffix,
    is_cifti,
    is_dense_series,
    is_hidden,
    parse_bids_name,
    takes_cifti,
    without_archive_suffix,
    without_suffix,
)
from fmristream.ingest.sources.side_files import NamedAfter
from fmristream.storage.sources import is_archive
from fmristream.storage.urls import display_url, join_url

_SUBJECT = re.compile(r"(?:^|[/_])sub-([A-Za-z0-9]+)")


def find_folder_runs(
    root: str,
    keys: Sequence[str],
    *,
    space: str | None,
    subject_pattern: str | None,
    searched: str,
    cifti: bool = False,
) -> Listing:
    """A run for every imaging file among `keys`; `searched` is what the user asked for, for messages.

    Of volumes and dense CIFTI series, where both are there, the volumes are taken, or, by `cifti`, the others.

    Raises:
        UsageError: there is none, or the pattern is no regular expression with a group.
    """
    images = sorted(key for key in keys if imaging_suffix(key) and not is_hidden(key))
    if not images:
        archives = sum(is_archive(key) for key in keys)
        hint = f"; {archives} archives are there: name them, as in '{display_url(root)}/*.zip'" if archives else ""
        raise UsageError(
            f"{display_url(searched)}: no imaging file among {len(keys)} files; expected names that end in "
            f"{', '.join(IMAGING_SUFFIXES)}{hint}"
        )
    images, of_other_kind = _one_kind(images, cifti)
    pattern = _compiled(subject_pattern)
    subjects = {key: _subject(key, pattern) for key in images}
    taken = [key for key in images if subjects[key]]
    skipped = [
        Skipped(key=key, reason="the subject pattern does not match", by_choice=True)
        for key in images
        if not subjects[key]
    ]
    if not taken:
        raise UsageError(f"subject pattern {subject_pattern!r} matches no path, such as {images[0]}; adapt it")
    skipped += [*of_other_kind, *_orphans(keys)]
    stems = Counter(without_suffix(key) for key in taken)
    tables = NamedAfter(keys)
    participants, notes = read_participants(root, keys)
    return Listing(
        kind="folder",
        root=root,
        runs=tuple(
            replace(
                _source_run(root, key, subjects[key], space=space, stems=stems),
                side=tables.of(root, key),
            )
            for key in taken
        ),
        participants=participants,
        skipped=tuple(sorted(skipped, key=lambda file: file.key)),
        notes=notes,
    )


def _one_kind(images: list[str], cifti: bool) -> tuple[list[str], list[Skipped]]:
    """The images without those of the other kind, and these; CIFTI files of which nothing is made stay, to be told of."""
    volumes, series = [key for key in images if not is_cifti(key)], [key for key in images if is_dense_series(key)]
    if not series and not cifti:
        return images, []
    chosen = takes_cifti(cifti, [{} for _ in volumes], [{} for _ in series], {})
    others, reason = (volumes, VOLUME_LEFT_OUT) if chosen else (series, CIFTI_LEFT_OUT)
    left_out = set(others)
    return (
        [key for key in images if key not in left_out],
        [Skipped(key=key, reason=reason, by_choice=True) for key in others],
    )


def _source_run(root: str, key: str, subject: str, *, space: str | None, stems: Counter[str]) -> SourceRun:
    stem = without_suffix(key)
    name = parse_bids_name(key)
    labels = name.labels() if "sub" in name.entities else {}
    return SourceRun(
        key=key,
        name=stem if stems[stem] == 1 else key,  # a.nii beside a.nii.gz
        url=join_url(root, key),
        subject=subject,
        **labels,
        space=space or name.entities.get("space", ""),
        tr_s=None,
        sidecar_urls=(),
        side=(),
    )


def _subject(key: str, pattern: re.Pattern[str] | None) -> str:
    """Whose file it is; "" where a given pattern does not match."""
    if pattern is not None:
        match = pattern.search(key)
        found = match.group("subject" if "subject" in pattern.groupindex else 1) if match else None
        return (found or "").removeprefix("sub-")
    if match := _SUBJECT.search(key):
        return match.group(1)
    first, slash, _ = key.partition("/")
    return without_archive_suffix(first) if slash else without_suffix(key)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"subject pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups == 0:
        raise UsageError(f"subject pattern {pattern!r} has no group; put the subject's part in (…) or (?P<subject>…)")
    return compiled


def _orphans(keys: Sequence[str]) -> list[Skipped]:
    present = {key.lower() for key in keys}
    headers = {key: header_of_pair(key) for key in keys if not is_hidden(key)}
    return [
        Skipped(key=key, reason="an .img file without its .hdr")
        for key, header in headers.items()
        if header and header.lower() not in present
    ]
