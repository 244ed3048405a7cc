"""From what the user names, a path, glob or URL, to the runs that it holds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from fmristream.errors import ObjectMissingError, UsageError
from fmristream.ingest.sources.archives import look_into, refused_runs
from fmristream.ingest.sources.bids import find_bids_runs, is_bids
from fmristream.ingest.sources.cells import is_table
from fmristream.ingest.sources.choose import EntityFilter, choose
from fmristream.ingest.sources.collection import Collection, known_collections, read_collection, recognised
from fmristream.ingest.sources.folder import find_folder_runs
from fmristream.ingest.sources.listing import Listing, Skipped, imaging_suffix, printable, unreadable_names
from fmristream.ingest.sources.phenotypes import Phenotypes, with_phenotypes
from fmristream.ingest.sources.synth import find_synth_runs, is_synth
from fmristream.ingest.sources.table import find_table_runs
from fmristream.ingest.sources.tree import find_tree_runs, qualified
from fmristream.storage.sources import MemberUrl, is_archive, is_folder, list_refused, list_source, source_size
from fmristream.storage.urls import display_url, join_url, local_path, scheme_of

_MAGIC = re.compile(r"[*?[]")


_BIDS, _FOLDER = "bids", "folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a source was looked for, and every path that is there."""

    root: str
    keys: tuple[str, ...]
    is_tree: bool  # a whole folder or archive, whose layout says something; not a file or a glob of files
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def find_runs(
    source: str,
    *,
    space: str | None = None,
    subject_pattern: str | None = None,
    kind: str | None = None,
    entities: EntityFilter | None = None,
    phenotypes: Phenotypes | None = None,
    cifti: bool = False,
) -> Listing:
    """List the runs of a dataset, a collection, a plain folder, a glob, one file or archive, a table, or `synth://...`.

    Args:
        source: path or URL; `*`, `?`, `[…]` and `**` make it a glob, which may name files, folders or archives.
        space: the space that the runs are in, for files that do not say it; where they do (`space-…` of a derivative),
            only these are taken.
        subject_pattern: for plain folders: a regular expression over the relative path, whose group `subject`, or else
            the first one, is the subject. Without it: `sub-<label>` in the path, else the first folder, else the file's stem.
        kind: what the source is, where its layout does not tell: `bids`, `folder`, the name of a known collection or the
            path of a TOML file that describes one.
        entities: which runs are wanted, by their labels.
        phenotypes: a table of subjects, and which of its columns' groups a split does not divide.
        cifti: take CIFTI-2 dense series (`.dtseries.nii`) where volumes are there as well. A table says itself.

    Raises:
        UsageError: there is nothing to convert, and where was looked for what.
        StorageError: the source cannot be listed or read.
    """
    if not source.strip():
        raise UsageError("the source is empty; give a BIDS dataset, a folder, a glob, a file or synth://...")
    entities, phenotypes = entities or EntityFilter(), phenotypes or Phenotypes()
    if kind is not None and (is_synth(source) or is_table(source)):
        raise UsageError(f"--kind {kind}: {display_url(source)} says itself what it is; leave --kind out")
    if cifti and (is_synth(source) or is_table(source)):
        raise UsageError(f"--cifti: {display_url(source)} says itself which files are meant; leave --cifti out")
    wanted = {"space": entities.space, "den": entities.den, "desc": entities.desc}
    if is_synth(source):
        _refuse_pattern(source, subject_pattern, "a synthetic cohort")
        listing, collection = find_synth_runs(source, space=space), None
    else:
        source = local_path(source) if scheme_of(source) == "file" else source
        if is_table(source):
            _refuse_pattern(source, subject_pattern, "a table, whose column says the subject")
            listing, collection = find_table_runs(source, space=space, wanted=wanted), None
        else:
            listing, collection = _find_in_files(
                source, space=space, subject_pattern=subject_pattern, kind=kind, cifti=cifti, wanted=wanted
            )
    return with_phenotypes(choose(listing, entities), phenotypes, collection)


def _find_in_files(
    source: str,
    *,
    space: str | None,
    subject_pattern: str | None,
    kind: str | None,
    cifti: bool,
    wanted: Mapping[str, Sequence[str]],
) -> tuple[Listing, Collection | None]:
    forced = read_collection(kind) if kind not in (None, _BIDS, _FOLDER) else None
    place = _place(source, forced)
    unreadable = unreadable_names(list(place.keys))
    keys = sorted(set(place.keys) - set(unreadable))
    place, keys, collection = _recognised(place, keys, kind, forced)
    if collection is not None and collection.layout == "paths":
        _refuse_pattern(source, subject_pattern, f"{collection.kind}, whose paths say the subject")
        listing = find_tree_runs(place.root, keys, collection, space=space, cifti=cifti, wanted=wanted)
    elif kind == _BIDS or collection is not None or (kind != _FOLDER and place.is_tree and is_bids(keys)):
        _refuse_pattern(source, subject_pattern, "a BIDS dataset, whose file names say the subject")
        listing = find_bids_runs(place.root, keys, space=space, cifti=cifti, wanted=wanted)
        listing = listing if collection is None else replace(listing, kind=collection.kind)
    else:
        listing = find_folder_runs(
            place.root, keys, space=space, subject_pattern=subject_pattern, searched=source, cifti=cifti
        )
        if scheme_of(source) in ("http", "https") and not MemberUrl.parse(listing.runs[0].url):
            # Its query is not part of its name, and has to be asked for all the same.
            listing = replace(listing, runs=tuple(replace(run, url=source) for run in listing.runs))
    lost = [Skipped(key=printable(key), reason="its name is not UTF-8 text") for key in unreadable]
    skipped = tuple(sorted((*listing.skipped, *lost, *place.skipped), key=lambda file: file.key))
    return replace(listing, skipped=skipped, notes=(*place.notes, *listing.notes)), collection


def _recognised(
    place: _Place, keys: list[str], kind: str | None, forced: Collection | None
) -> tuple[_Place, list[str], Collection | None]:
    """Which collection it is: what the user says, else the one whose layout it has. Keys of one archive lose its name."""
    if forced is None and kind is None and place.is_tree:
        inner = _inner(place, keys)[1]
        is_plain_bids = is_bids(inner)
        images = [key for key in (inner if is_plain_bids else keys) if imaging_suffix(key)]
        candidates = recognised(images, layout="bids" if is_plain_bids else "paths")
        if not candidates and not is_plain_bids:
            candidates = recognised(images, layout="paths", as_path=lambda key: qualified(place.root, key))
        if len(candidates) > 1:
            names = ", ".join(one.kind for one in candidates)
            raise UsageError(f"{display_url(place.root)}: may be {names}; say which with --kind")
        forced = candidates[0] if candidates else None
    if forced is not None and forced.layout == "paths":
        return place, keys, forced
    return *_inner(place, keys), forced


def _inner(place: _Place, keys: list[str]) -> tuple[_Place, list[str]]:
    """The same seen from within, where all of it is one archive."""
    archives = {key.partition("!/")[0] for key in keys}
    if len(archives) != 1 or not all("!/" in key and is_archive(key.partition("!/")[0]) for key in keys):
        return place, keys
    root = f"{join_url(place.root, archives.pop())}!"
    return replace(place, root=root), [key.partition("!/")[2] for key in keys]


def _place(source: str, forced: Collection | None) -> _Place:
    """Root and relative paths of what a source names: a folder, a file, an archive, or a glob of these."""
    if is_folder(source):
        return _folder(source, forced)
    name = display_url(source).rpartition("/")[2]
    parent = display_url(source).rpartition("/")[0] or "/"
    try:
        source_size(source)
    except ObjectMissingError as error:
        if not _MAGIC.search(source) or scheme_of(source) in ("http", "https"):
            raise UsageError(
                f"{display_url(source)}: there is no such file or folder; give a BIDS dataset, a folder, a glob or a file"
            ) from error
    else:
        if not is_archive(source):
            return _Place(root=parent, keys=(name,), is_tree=False)
        return _one_archive(source, parent, name)
    root, pattern = split_glob(source)
    if not is_folder(root):
        raise UsageError(f"{display_url(source)}: there is no folder {display_url(root)} to look in")
    found = [key for key in list_source(root) if glob_matches(pattern, key)]
    if not found:
        raise UsageError(f"{display_url(source)}: no file in {display_url(root)} matches {pattern}")
    named = [key for key in found if is_archive(key)]
    opened = look_into(root, named)
    keys = (*(key for key in found if not is_archive(key)), *opened.keys)
    return _Place(root=root, keys=keys, is_tree=bool(named), skipped=opened.skipped, notes=opened.notes)


def _one_archive(source: str, parent: str, name: str) -> _Place:
    """An archive that the user names: seen from its folder, because its own name may say whose runs it holds."""
    if scheme_of(source) in ("http", "https"):  # with a query, perhaps, that must stay beside the name
        return _folder(f"{source}!", None)
    opened = look_into(parent, [name])
    if not opened.keys:
        reasons = "; ".join(file.reason for file in opened.skipped[:3])
        raise UsageError(f"{display_url(source)}: holds nothing that can be read{f': {reasons}' if reasons else ''}")
    return _Place(root=parent, keys=opened.keys, is_tree=True, skipped=opened.skipped, notes=opened.notes)


def _folder(source: str, forced: Collection | None) -> _Place:
    root = source.rstrip("/") or "/"
    listed = list_source(root)
    kinds = [forced] if forced is not None else list(known_collections().values())
    archives = [key for key in listed if is_archive(key)]
    named = [key for key in archives if any(kind.looks_into(key) for kind in kinds)]
    opened = look_into(root, named)
    notes = list(opened.notes)
    if len(archives) > len(named):
        notes.append(
            f"{len(archives) - len(named)} archives are not looked into; give their names (or '*.zip') as the source for that"
        )
    member = MemberUrl.parse(root)
    refused = [] if member is None else refused_runs(display_url(member.archive).rpartition("/")[2], list_refused(root))
    return _Place(
        root=root,
        keys=(*listed, *opened.keys),
        is_tree=True,
        skipped=(*opened.skipped, *refused),
        notes=tuple(notes),
    )


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
