"""Members of a zip archive, read where they lie: the directory is checked before it is believed, data against its crc32.

Nothing is ever extracted, and a member's name is never used as a path. APPNOTE.TXT of PKWARE is the format's standard.
"""

import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from fmristream.errors import SourceError

ReadRange = Callable[[int, int], bytes]

MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 64 * 2**20
# Above the longest runs by an order of magnitude (ingest's own limit is below).
MAX_MEMBER_BYTES = 2**40
# Deflate cannot do better; the constant is for a few bytes that hold nothing.
_MAX_RATIO, _MAX_EXCESS = 1032, 1024

STORED, DEFLATED = 0, 8
_METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 99: "AES"}
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_SIZES_FOLLOW = 0x8
_UTF8 = 0x800
_UNIX, _TYPE_BITS, _REGULAR, _LINK = 3, 0xF000, 0x8000, 0xA000

_END, _END64, _LOCATOR64, _ENTRY, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _ENTRY_BYTES, LOCAL_BYTES = 22, 56, 20, 46, 30
_MAX_COMMENT = 2**16 - 1
_FULL16, _FULL32 = 2**16 - 1, 2**32 - 1

_FEED_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipMember:
    """An entry of the directory; `problem` says why it is not read, "" where it is."""

    name: str
    raw_name: bytes
    size: int
    stored_bytes: int
    method: int
    crc: int
    flags: int
    offset: int  # of its local header
    limit: int = 0  # where the next one starts, or the directory
    problem: str = ""


def read_directory(read: ReadRange, size: int, archive: str) -> list[ZipMember]:
    """Every file in the archive, as the central directory lists them.

    Raises:
        SourceError: it is no zip archive, or its directory contradicts itself.
    """
    count, start, stop = _find_directory(read, size, archive)
    if count > MAX_MEMBERS or stop - start > MAX_DIRECTORY_BYTES:
        raise SourceError(
            f"{archive}: {count} members in a directory of {stop - start} bytes; at most {MAX_MEMBERS} and "
            f"{MAX_DIRECTORY_BYTES} are read"
        )
    data = read(start, stop)
    if len(data) != stop - start:
        raise SourceError(f"{archive}: the file is cut short in its directory")
    return _checked(_parse(data, count, archive), start, archive)


def _find_directory(read: ReadRange, size: int, archive: str) -> tuple[int, int, int]:
    """(members, first byte, end) of the central directory."""
    tail_start = max(0, size - _END_BYTES - _MAX_COMMENT)
    tail = read(tail_start, size)
    place = tail.rfind(_END)
    while place >= 0:  # a comment may hold the signature: the right record ends where the file does
        if place + _END_BYTES <= len(tail):
            comment_bytes = struct.unpack_from("<H", tail, place + 20)[0]
            if place + _END_BYTES + comment_bytes == len(tail):
                break
        place = tail.rfind(_END, 0, place)
    if place < 0:
        raise SourceError(f"{archive}: not a zip archive, or cut short: its directory is not at its end")
    disk, first_disk, here, count, directory_bytes, start = struct.unpack_from("<4H2I", tail, place + 4)
    end = tail_start + place
    has_locator = tail.startswith(_LOCATOR64, max(0, place - _LOCATOR_BYTES))  # some write it for small archives, too
    if has_locator or _FULL16 in (disk, first_disk, here, count) or _FULL32 in (directory_bytes, start):
        disk, first_disk, here, count, directory_bytes, start, end = _zip64_end(read, end, archive)
    if disk or first_disk or here != count:
        raise SourceError(f"{archive}: one part of a zip archive in several parts; join them first")
    if start + directory_bytes != end or count * _ENTRY_BYTES > directory_bytes:
        raise SourceError(
            f"{archive}: the zip directory lies: {count} members in {directory_bytes} bytes from byte {start}, it ends at "
            f"byte {end}"
        )
    return count, start, end


def _zip64_end(read: ReadRange, end: int, archive: str) -> tuple[int, int, int, int, int, int, int]:
    locator = read(max(0, end - _LOCATOR_BYTES), end)
    if len(locator) == _LOCATOR_BYTES and locator.startswith(_LOCATOR64):
        place = struct.unpack_from("<Q", locator, 8)[0]
        if place + _END64_BYTES + _LOCATOR_BYTES <= end:
            record = read(place, place + _END64_BYTES)
            if len(record) == _END64_BYTES and record.startswith(_END64):
                disk, first_disk, here, count, directory_bytes, start = struct.unpack_from("<2I4Q", record, 16)
                return disk, first_disk, here, count, directory_bytes, start, place
    raise SourceError(f"{archive}: the zip directory lies: its record for large archives is not where it should be")


def _parse(data: bytes, count: int, archive: str) -> list[ZipMember]:
    members: list[ZipMember] = []
    place = 0
    for _ in range(count):
        if data[place : place + 4] != _ENTRY or place + _ENTRY_BYTES > len(data):
            raise SourceError(f"{archive}: the zip directory lies: entry {len(members) + 1} of {count} is not one")
        (made_by, _, flags, method, _, _, crc, stored, size, name_bytes, extra_bytes, comment_bytes, disk, _, mode, offset) = (
            struct.unpack_from("<6H3I5H2I", data, place + 4)
        )  # fmt: skip
        name_end = place + _ENTRY_BYTES + name_bytes
        extra = data[name_end : name_end + extra_bytes]
        raw_name = data[place + _ENTRY_BYTES : name_end]
        place = name_end + extra_bytes + comment_bytes
        size, stored, offset = _large(extra, size, stored, offset, archive)
        member = ZipMember(
            name=raw_name.decode("utf-8" if flags & _UTF8 else "cp437", errors="replace"),
            raw_name=raw_name,
            size=size,
            stored_bytes=stored,
            method=method,
            crc=crc,
            flags=flags,
            offset=offset,
        )
        file_type = (mode >> 16) & _TYPE_BITS if made_by >> 8 == _UNIX else 0
        members.append(replace(member, problem=_problem(member, file_type, disk)))
    if place != len(data):
        raise SourceError(f"{archive}: the zip directory lies: {len(data) - place} bytes follow its {count} entries")
    return members


def _large(extra: bytes, size: int, stored: int, offset: int, archive: str) -> tuple[int, int, int]:
    """Sizes and place from the field for large files, where the entry itself has no room for them."""
    if _FULL32 not in (size, stored, offset):
        return size, stored, offset
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            numbers = list(struct.unpack_from(f"<{min(length, len(extra) - place - 4) // 8}Q", extra, place + 4))
            values = [size, stored, offset]
            if len(numbers) < values.count(_FULL32):
                break
            return tuple(numbers.pop(0) if value == _FULL32 else value for value in values)  # type: ignore[return-value]
        place += 4 + length
    raise SourceError(f"{archive}: the zip directory lies: a large member without its sizes")


def _problem(member: ZipMember, file_type: int, disk: int) -> str:
    if name_problem := unusable_name(member.name):
        return name_problem
    if file_type == _LINK:
        return "a link, not a file"
    if file_type not in (0, _REGULAR) and not member.name.endswith("/"):
        return "a device or another special file"
    if member.flags & _ENCRYPTED:
        return "encrypted; unpack it yourself"
    if member.method not in (STORED, DEFLATED):
        return f"packed with {_METHODS.get(member.method, f'method {member.method}')}; only deflate is read"
    lies = member.size != member.stored_bytes if member.method == STORED else (
        member.size > _MAX_RATIO * member.stored_bytes + _MAX_EXCESS
    )  # fmt: skip
    if lies or member.size > MAX_MEMBER_BYTES or disk:
        return f"its directory entry lies: {member.size} bytes from {member.stored_bytes} stored ones"
    return ""


def unusable_name(name: str) -> str:
    """Why a member's name is not one that an honest archive holds; "" where it is."""
    if not name or not name.isprintable() or "\N{REPLACEMENT CHARACTER}" in name:
        return "its name is no text"
    if unicodedata.normalize("NFC", name) != name:
        return "its name is not in Unicode's composed form (NFC)"
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":"):
        return "its name is an absolute path"
    if any(part in ("..", ".") for part in name.split("/")) or "//" in name:
        return "its name leads out of the archive"
    return ""


def _checked(members: list[ZipMember], directory: int, archive: str) -> list[ZipMember]:
    """Members with the place where each must end; two that share bytes, or a name, are not what they seem."""
    ordered = sorted(members, key=lambda member: member.offset)
    limits = [*(member.offset for member in ordered[1:]), directory]
    for member, limit in zip(ordered, limits, strict=True):
        if member.offset + LOCAL_BYTES + len(member.raw_name) + member.stored_bytes > limit:
            raise SourceError(f"{archive}: the zip directory lies: members overlap at byte {limit}")
    times = Counter(member.name for member in members)
    return [
        replace(
            member,
            limit=limit,
            problem=member.problem or ("its name stands twice in the archive" if times[member.name] > 1 else ""),
        )
        for member, limit in zip(ordered, limits, strict=True)
        if not member.name.endswith("/")
    ]


def data_offset(read: ReadRange, member: ZipMember, where: str) -> int:
    """Where a member's bytes start, after its local header was compared with the directory.

    Raises:
        SourceError: the two disagree.
    """
    head = read(member.offset, member.offset + LOCAL_BYTES + len(member.raw_name))
    if len(head) == LOCAL_BYTES + len(member.raw_name) and head.startswith(_LOCAL):
        _, flags, method, _, _, crc, stored, size, name_bytes, extra_bytes = struct.unpack_from("<5H3I2H", head, 4)
        sizes = (crc, _unless_large(stored), _unless_large(size))
        wanted = (member.crc, _unless_large(member.stored_bytes), _unless_large(member.size))
        # Written as a stream, the sizes stand behind the data; 0 stands here.
        is_same = bool(flags & _SIZES_FOLLOW) or stored == _FULL32 or size == _FULL32 or sizes == wanted
        start = member.offset + LOCAL_BYTES + name_bytes + extra_bytes
        if (
            is_same
            and (method, flags & _ENCRYPTED) == (member.method, 0)
            and name_bytes == len(member.raw_name)
            and head[LOCAL_BYTES:] == member.raw_name
            and start + member.stored_bytes <= member.limit
        ):
            return int(start)
    raise SourceError(f"{where}: the member's own header contradicts the archive's directory")


def _unless_large(size: int) -> int:
    return min(size, _FULL32)


class ZipReader:
    """A member from front to back; its last bytes are handed out only when crc32 and length of all were right."""

    def __init__(self, file: BinaryIO, member: ZipMember, where: str) -> None:
        self._file = file
        self._member = member
        self._where = where
        self._zlib = _zlib()
        self._inflater = self._zlib.decompressobj(wbits=-15) if member.method == DEFLATED else None
        self._stored_left = member.stored_bytes
        self._pending = b""
        self._produced = 0
        self._crc = 0

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        left = self._member.size - self._produced
        if left == 0 or size == 0:
            if self._produced == 0 and size:
                self._finish()
            return b""
        piece = self._next(min(size, left))
        self._crc = self._zlib.crc32(piece, self._crc)
        self._produced += len(piece)
        if self._produced == self._member.size:
            self._finish()
        return piece

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ZipReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _next(self, size: int) -> bytes:
        if self._inflater is None:
            return self._take(size)
        while not self._inflater.eof:
            feed = self._feed()
            if piece := self._inflate(feed, size):
                return piece
            if not feed:
                break
        raise SourceError(f"{self._where}: damaged: {self._produced} bytes are packed, {self._member.size} declared")

    def _feed(self) -> bytes:
        """Packed bytes; none at their end, where the inflater may still hold some output."""
        return self._pending or (self._take(_FEED_BYTES) if self._stored_left else b"")

    def _inflate(self, feed: bytes, size: int) -> bytes:
        assert self._inflater is not None
        try:
            piece: bytes = self._inflater.decompress(feed, size)
        except self._zlib.error as error:
            raise SourceError(f"{self._where}: the packed data are damaged, after {self._produced} bytes") from error
        self._pending = self._inflater.unconsumed_tail or self._inflater.unused_data
        return piece

    def _take(self, size: int) -> bytes:
        """The next stored bytes of the member, at least one."""
        piece = self._file.read(min(size, self._stored_left))
        if not piece:
            raise SourceError(f"{self._where}: the packed data end early, after {self._produced} bytes of the member")
        self._stored_left -= len(piece)
        return piece

    def _finish(self) -> None:
        inflater = self._inflater
        while inflater is not None and not inflater.eof:
            feed = self._feed()
            if self._inflate(feed, 1):
                raise SourceError(f"{self._where}: damaged: more is packed than the {self._member.size} bytes declared")
            if not feed:
                break
        if self._stored_left or (inflater is not None and (not inflater.eof or self._pending)):
            raise SourceError(f"{self._where}: damaged: the packed data do not end with the member")
        if self._crc != self._member.crc:
            raise SourceError(f"{self._where}: damaged: its crc32 is {self._crc:08x}, {self._member.crc:08x} expected")


def _zlib() -> Any:
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng
