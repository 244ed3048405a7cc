"""From what the user names, a path, glob or URL, to the runs that it holds."""

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fmristream.errors import ObjectMissingError, UsageError
from fmristream.ingest.sources.bids import find_bids_runs, is_bids
from fmristream.ingest.sources.folder import find_folder_runs
from fmristream.ingest.sources.listing import Listing, Skipped, printable, unreadable_names
from fmristream.ingest.sources.synth import find_synth_runs, is_synth
from fmristream.storage.sources import is_folder, list_source, source_size
from fmristream.storage.urls import display_url, local_path, scheme_of

_MAGIC = re.compile(r"[*?[]")


def find_runs(source: str, *, space: str | None = None, subject_pattern: str | None = None) -> Listing:
    """List the runs of a BIDS dataset, a plain folder, a glob, one file, or a synthetic cohort (`synth://`).

    Args:
        source: path or URL; `*`, `?`, `[…]` and `**` make it a glob, which may name files or folders.
        space: the space that the runs are in, for files that do not say it; where they do (`space-…` of a derivative),
            only these are taken.
        subject_pattern: for plain folders: a regular expression over the relative path, whose group `subject`, or else
            the first one, is the subject. Without it: `sub-<label>` in the path, else the first folder, else the file's stem.

    Raises:
        UsageError: there is nothing to convert, and where was looked for what.
        StorageError: the source cannot be listed or read.
    """
    if not source.strip():
        raise UsageError("the source is empty; give a BIDS dataset, a folder, a glob, a file or synth://...")
    if is_synth(source):
        _refuse_pattern(source, subject_pattern, "a synthetic cohort")
        return find_synth_runs(source, space=space)
    source = local_path(source) if scheme_of(source) == "file" else source
    if whole_folder := is_folder(source):
        root = source.rstrip("/") or "/"
        listed = list_source(root)
    else:
        root, listed = _listed(source)
    unreadable = unreadable_names(listed)
    keys = sorted(set(listed) - set(unreadable))
    if whole_folder and is_bids(keys):
        _refuse_pattern(source, subject_pattern, "a BIDS dataset, whose file names say the subject")
        listing = find_bids_runs(root, keys, space=space)
    else:
        listing = find_folder_runs(root, keys, space=space, subject_pattern=subject_pattern, searched=source)
    lost = [Skipped(key=printable(key), reason="its name is not UTF-8 text") for key in unreadable]
    return replace(listing, skipped=tuple(sorted((*listing.skipped, *lost), key=lambda file: file.key)))


def _listed(source: str) -> tuple[str, list[str]]:
    """Root and relative paths of one file or a glob."""
    parent, _, file_name = source.rpartition("/")
    try:
        source_size(source)
    except ObjectMissingError as error:
        if not _MAGIC.search(source):
            raise UsageError(
                f"{display_url(source)}: there is no such file or folder; give a BIDS dataset, a folder, a glob or a file"
            ) from error
    else:
        return parent or "/", [file_name]
    root, pattern = split_glob(source)
    if not is_folder(root):
        raise UsageError(f"{display_url(source)}: there is no folder {display_url(root)} to look in")
    found = [key for key in list_source(root) if glob_matches(pattern, key)]
    if not found:
        raise UsageError(f"{display_url(source)}: no file in {display_url(root)} matches {pattern}")
    return root, found


def split_glob(source: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the pattern below it."""
    parts = source.split("/")
    first = next(place for place, part in enumerate(parts) if _MAGIC.search(part))
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def glob_matches(pattern: str, path: str) -> bool:
    """Whether a path fits a glob: `**` stands for any number of folders, and a folder that fits for all in it."""
    return _parts_match(pattern.split("/"), path.split("/"))


def _parts_match(parts: Sequence[str], names: Sequence[str]) -> bool:
    if not parts:
        return True
    if parts[0] == "**":
        return any(_parts_match(parts[1:], names[start:]) for start in range(len(names)))
    return bool(names) and fnmatchcase(names[0], parts[0]) and _parts_match(parts[1:], names[1:])


def _refuse_pattern(source: str, subject_pattern: str | None, what: str) -> None:
    if subject_pattern is not None:
        raise UsageError(f"{display_url(source)}: {what}: a subject pattern is for plain folders; leave it out")
