"""Archives among the files of a source: looked into, never unpacked; their members become paths like any other."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fmristream.errors import SourceError
from fmristream.ingest.sources.listing import Skipped, imaging_suffix
from fmristream.storage.sources import is_sequential, list_refused, list_source
from fmristream.storage.urls import join_url

# A look costs one or two waits for a disk or a server, and waits overlap.
_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What archives hold: paths of members (`a.zip!/x.nii`), what is refused, and what to know."""

    keys: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def look_into(root: str, archives: Sequence[str]) -> Opened:
    """List the members of archives, given by their paths below the root.

    Raises:
        StorageError: an archive cannot be read.
    """
    if not archives:
        return Opened()
    with ThreadPoolExecutor(min(_READERS, len(archives)), thread_name_prefix="archive") as readers:
        found = list(readers.map(lambda key: _members(root, key), archives))
    return Opened(
        keys=tuple(f"{key}!/{name}" for key, (names, _) in zip(archives, found, strict=True) for name in names),
        skipped=tuple(file for _, skipped in found for file in skipped),
        notes=_costs(archives),
    )


def _costs(archives: Sequence[str]) -> tuple[str, ...]:
    packed = sum(map(is_sequential, archives))
    if not packed:
        return ()
    return (
        f"{packed} archives are .tar.gz, which have no way in but from the front: each of their runs costs reading its "
        "archive whole, three or four times; gunzip them to .tar to spare that",
    )


def _members(root: str, key: str) -> tuple[list[str], list[Skipped]]:
    url = f"{join_url(root, key)}!"
    try:
        names, refused = list_source(url), list_refused(url)
    except SourceError as error:
        return [], [Skipped(key=key, reason=str(error))]
    return names, refused_runs(key, refused)


def refused_runs(archive: str, refused: Sequence[tuple[str, str]]) -> list[Skipped]:
    """Of the members that are refused, those that may have been runs. A name that is no path is shown, never used."""
    return [
        Skipped(key=f"{archive}!/{name}".encode("unicode_escape").decode("ascii"), reason=reason)
        for name, reason in refused
        if imaging_suffix(name)
    ]
