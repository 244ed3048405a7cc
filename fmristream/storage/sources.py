"""Read what is to be converted, wherever it lies: files, and members of zip and tar archives (`archive.zip!/member`)."""

from typing import BinaryIO

from fmristream.errors import SourceError, UsageError
from fmristream.storage import files, members
from fmristream.storage.members import MemberUrl, is_archive, is_sequential
from fmristream.storage.urls import display_url, scheme_of

__all__ = [
    "MemberUrl",
    "is_archive",
    "is_folder",
    "is_sequential",
    "known_checksum",
    "list_refused",
    "list_source",
    "open_source",
    "read_source_range",
    "source_size",
]


def open_source(url: str) -> BinaryIO:
    """Open a file for reading from front to back; only `read(n)`, which may give less than n, and `close()` are promised.

    Raises:
        ObjectMissingError: there is no such file.
        StorageError: it cannot be read.
        SourceError: a member of an archive that is damaged or refused; where it has a checksum, its last bytes are handed
            out only after the check of all.
    """
    member = _member(url)
    return files.open_file(url) if member is None else members.open_member(member)


def source_size(url: str) -> int:
    """Size of a file in bytes; of a member, unpacked."""
    member = _member(url)
    return files.file_size(url) if member is None else members.member_size(member)


def read_source_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; fewer where it ends earlier."""
    member = _member(url)
    if member is None:
        return files.read_file_range(url, start, stop)
    return members.read_member_range(member, start, stop)


def known_checksum(url: str) -> str:
    """A checksum that costs nothing and is checked whenever the whole file is read; "" where there is none."""
    member = _member(url)
    return "" if member is None else members.member_checksum(member)


def list_source(url: str) -> list[str]:
    """Every file below a folder or in an archive (`archive.zip!`), as sorted '/'-separated paths relative to it.

    Links to folders are followed once; folders whose name starts with a dot are not entered.
    """
    member = _member(url)
    if member is None:
        return files.list_files(url)
    good, _ = members.list_members(member.archive)
    prefix = f"{member.name.rstrip('/')}/" if member.name else ""
    return [name[len(prefix) :] for name in good if name.startswith(prefix)]


def list_refused(url: str) -> list[tuple[str, str]]:
    """Members of an archive (`archive.zip!`) that are not read, each with the reason."""
    member = _member(url)
    return [] if member is None else members.list_members(member.archive)[1]


def is_folder(url: str) -> bool:
    """Whether the URL names a folder, a bucket prefix that holds something, or a folder in an archive."""
    member = _member(url)
    if member is None:
        return files.is_folder(url)
    try:
        return not member.name or bool(list_source(url))
    except SourceError:
        return False


def _member(url: str) -> MemberUrl | None:
    """The member that a URL means; its archive lies somewhere that is opened.

    Raises:
        UsageError: an archive within an archive, or a scheme that is not opened.
    """
    scheme_of(url)
    member = MemberUrl.parse(url)
    if member is not None and MemberUrl.parse(member.name) is not None:
        raise UsageError(f"{display_url(url)}: archives within archives are not opened; unpack the outer one")
    return member
