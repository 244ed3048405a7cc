"""Members of archives, named `path/to/archive.zip!/inner/path`: listed, measured and read without unpacking anything.

| archive         | to reach a member                | what proves its bytes                       |
|-----------------|----------------------------------|---------------------------------------------|
| .zip            | one seek                         | the crc32 in the archive's directory        |
| .tar            | one pass over the headers        | nothing (a .nii.gz inside has its own)      |
| .tar.gz, .tgz   | unpack everything before it      | the archive's crc32, so it is read to its end |
"""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, cast

from fmristream.errors import ObjectMissingError, SourceError
from fmristream.storage.files import file_version, open_file, read_file_range
from fmristream.storage.tar_archive import GzipTape, GzipTarReader, RangeTape, TarMember, read_headers
from fmristream.storage.urls import display_url
from fmristream.storage.zip_archive import STORED, ZipMember, ZipReader, data_offset, read_directory

_ARCHIVE = r"\.(?:zip|tar|tar\.gz|tgz)(?:[?#][^!]*)?"
_MEMBER = re.compile(rf"^(?P<archive>.*?{_ARCHIVE})!(?:/(?P<name>.*))?$", re.IGNORECASE | re.DOTALL)
_IS_ARCHIVE = re.compile(rf"^.+{_ARCHIVE}$", re.IGNORECASE | re.DOTALL)
_READ_BYTES = 2**20
_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class MemberUrl:
    """Which archive, and which of its members; no name means the archive as a folder."""

    archive: str
    name: str = ""

    @classmethod
    def parse(cls, url: str) -> "MemberUrl | None":
        """Take `archive.zip!/name` apart; None for any other URL."""
        match = _MEMBER.match(url)
        return cls(match["archive"], match["name"] or "") if match else None

    def __str__(self) -> str:
        return f"{self.archive}!/{self.name}" if self.name else f"{self.archive}!"

    @property
    def shown(self) -> str:
        """For messages: the archive's own name and the member, neither folders nor queries."""
        return f"{display_url(self.archive).rpartition('/')[2]}!/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """What an archive holds. `crc` is that of a whole `.tar.gz`."""

    members: dict[str, ZipMember | TarMember]
    crc: int = 0


def is_archive(path: str) -> bool:
    """Whether a path ends like an archive that is looked into."""
    return _IS_ARCHIVE.match(path) is not None


def is_sequential(archive: str) -> bool:
    """Whether every member costs reading the archive from its front."""
    return display_url(archive).lower().endswith((".tar.gz", ".tgz"))


def list_members(archive: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(names that can be read, in order; names that are refused, each with the reason).

    Raises:
        SourceError: it is no archive, is damaged, or contradicts itself.
    """
    members = _index(archive).members.values()
    good = sorted(member.name for member in members if not member.problem)
    return good, sorted((member.name, member.problem) for member in members if member.problem)


def member_size(url: MemberUrl) -> int:
    """Size of a member in bytes, unpacked."""
    return _find(url)[1].size


def member_checksum(url: MemberUrl) -> str:
    """What identifies a member's bytes and is checked whenever all of them are read; "" where nothing does."""
    archive, member = _find(url)
    if isinstance(member, ZipMember):
        return f"zip:{member.crc:08x}:{member.size}"
    return f"tgz:{archive.crc:08x}:{member.offset}" if is_sequential(url.archive) else ""


def open_member(url: MemberUrl) -> BinaryIO:
    """Open a member from front to back; its last bytes come only after the check of all of them.

    Raises:
        ObjectMissingError: the archive has no such member.
        SourceError: the member is not read (encrypted, a link, ...), or damaged.
        StorageError: the archive cannot be read.
    """
    archive, member = _find(url)
    if isinstance(member, ZipMember):
        start = data_offset(partial(read_file_range, url.archive), member, url.shown)
        return cast(BinaryIO, ZipReader(open_file(url.archive, start, start + member.stored_bytes), member, url.shown))
    if not is_sequential(url.archive):
        return open_file(url.archive, member.offset, member.offset + member.size)
    file = open_file(url.archive)
    try:
        tape = GzipTape(file, url.shown)
        return cast(BinaryIO, GzipTarReader(tape, member, url.shown, crc=archive.crc, close=file.close))
    except BaseException:
        file.close()
        raise


def read_member_range(url: MemberUrl, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a member; fewer where it ends earlier.

    What is asked for from its first to its last byte is checked; a part of packed data is not.
    """
    _, member = _find(url)
    stop = min(stop, member.size)
    if start >= stop:
        return b""
    if isinstance(member, ZipMember) and member.method == STORED and stop - start < member.size:
        offset = data_offset(partial(read_file_range, url.archive), member, url.shown)
        return read_file_range(url.archive, offset + start, offset + stop)
    if isinstance(member, TarMember) and not is_sequential(url.archive):
        return read_file_range(url.archive, member.offset + start, member.offset + stop)
    pieces = []
    place = 0
    with open_member(url) as file:
        while place < stop and (piece := file.read(min(_READ_BYTES, stop - place))):
            pieces.append(piece[max(0, start - place) :])
            place += len(piece)
    return b"".join(pieces)


def _find(url: MemberUrl) -> tuple[Archive, ZipMember | TarMember]:
    archive = _index(url.archive)
    member = archive.members.get(url.name)
    if member is None:
        raise ObjectMissingError(f"{display_url(str(url))}: the archive has no such member")
    if member.problem:
        raise SourceError(f"{url.shown}: {member.problem}")
    return archive, member


# The last few archives, because every member costs several looks. A version that changed is read again, and whatever is
# remembered is compared with what the member's own header and checksum say before a byte is believed.
_remembered: OrderedDict[tuple[str, int, str], Archive] = OrderedDict()
_lock = threading.Lock()


def _index(archive: str) -> Archive:
    size, version = file_version(archive)
    key = (archive, size, version)
    with _lock:
        if key in _remembered:
            _remembered.move_to_end(key)
            return _remembered[key]
    found = _read_index(archive, size)
    with _lock:
        _remembered[key] = found
        while len(_remembered) > _REMEMBERED:
            _remembered.popitem(last=False)
    return found


def _read_index(archive: str, size: int) -> Archive:
    name = display_url(archive).rpartition("/")[2]
    read = partial(read_file_range, archive)
    if name.lower().endswith(".zip"):
        return _by_name(read_directory(read, size, name))
    if not is_sequential(archive):
        return _by_name(read_headers(RangeTape(read, size), name, size=size))
    with open_file(archive) as file:
        tape = GzipTape(file, name)
        members = read_headers(tape, name)
        return _by_name(members, crc=tape.crc)


def _by_name(members: "list[ZipMember] | list[TarMember]", crc: int = 0) -> Archive:
    found: dict[str, ZipMember | TarMember] = {}
    for member in members:
        # Of two with one name both are refused; whichever stands here has its problem.
        found[member.name] = member
    return Archive(members=found, crc=crc)
