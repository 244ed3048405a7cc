"""Members of a tar archive: their headers in one pass over the archive, read where they lie. Nothing is ever extracted.

POSIX.1 (ustar and pax) and GNU's long names are understood. A tar holds no checksum of its data; a `.tar.gz` has one for
all of it, at its end, and no way in but from its front.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol

from fmristream.errors import SourceError
from fmristream.storage.zip_archive import MAX_MEMBERS, ReadRange, unusable_name

_BLOCK = 512
_AHEAD_BYTES = 64 * 2**10
_REGULAR, _FOLDER = frozenset(b"0\x007"), ord("5")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = ord("L"), ord("K"), ord("x"), ord("g")
_KINDS = {"1": "a link, not a file", "2": "a link, not a file", "S": "a sparse file"}
_MAX_EXTENDED_BYTES = 2**20
# Writers pad to records of 10 KiB, some to more.
_MAX_PADDING_BYTES = 16 * 2**20
_MAGIC = b"\x1f\x8b"
_MAX_EMPTY_MEMBERS = 64
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """A file in the archive; `problem` says why it is not read, "" where it is."""

    name: str
    size: int
    offset: int  # of its first byte, in the archive (for .tar.gz: in what it unpacks to)
    problem: str = ""


class Tape(Protocol):
    """Bytes that are asked for in ascending order."""

    def at(self, offset: int, count: int) -> bytes:
        """Bytes from `offset` on; fewer only where the archive ends."""
        ...


class RangeTape:
    """A plain archive of known size: small headers close to each other cost one request."""

    def __init__(self, read: ReadRange, size: int) -> None:
        self._read = read
        self._size = size
        self._start = 0
        self._data = b""

    def at(self, offset: int, count: int) -> bytes:
        if not (self._start <= offset and offset + count <= self._start + len(self._data)):
            self._start = offset
            stop = min(self._size, offset + max(count, _AHEAD_BYTES))
            self._data = self._read(offset, stop) if offset < stop else b""
        return self._data[offset - self._start : offset - self._start + count]


class GzipTape:
    """What a `.tar.gz` unpacks to, from front to back; zlib checks every gzip member's checksum on the way."""

    def __init__(self, file: BinaryIO, archive: str) -> None:
        self._file = file
        self._archive = archive
        self._zlib = _zlib()
        self._inflater = self._zlib.decompressobj(wbits=31)
        self._empty_members = 0
        self._is_empty = True  # nothing came of this gzip member yet
        self._input = b""
        self._output = b""
        self._place = 0
        self.crc = 0  # of the archive's own bytes, as far as they were read

    def at(self, offset: int, count: int) -> bytes:
        assert offset >= self._place, "a tape runs forwards"
        while self._place < offset and self.read(min(_READ_BYTES, offset - self._place)):
            pass
        pieces = []
        while count and (piece := self.read(count)):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        while not self._output:
            if self._inflater.eof and not self._next_member():
                return b""
            feed = self._input or self._fill()
            try:
                self._output = self._inflater.decompress(feed, _READ_BYTES)
            except self._zlib.error as error:
                raise SourceError(f"{self._archive}: the gzip data are damaged, after {self._place} bytes") from error
            self._input = self._inflater.unconsumed_tail or self._inflater.unused_data
            if not self._output and not feed and not self._inflater.eof:
                raise SourceError(f"{self._archive}: the gzip stream ends early: the archive is cut short")
        self._is_empty = False
        piece, self._output = self._output[:size], self._output[size:]
        self._place += len(piece)
        return piece

    def _fill(self) -> bytes:
        piece = self._file.read(_AHEAD_BYTES)
        self.crc = zlib.crc32(piece, self.crc)
        return piece

    def _next_member(self) -> bool:
        while len(self._input) < len(_MAGIC) and (piece := self._fill()):
            self._input += piece
        if not self._input:
            return False
        if not self._input.startswith(_MAGIC):
            raise SourceError(f"{self._archive}: bytes that are not gzip follow its gzip stream")
        self._empty_members += self._is_empty
        if self._empty_members > _MAX_EMPTY_MEMBERS:
            raise SourceError(f"{self._archive}: more than {_MAX_EMPTY_MEMBERS} gzip members that hold nothing")
        self._is_empty = True
        self._inflater = self._zlib.decompressobj(wbits=31)
        return True


def read_headers(tape: Tape, archive: str, *, size: int | None = None) -> list[TarMember]:
    """Every file in the archive.

    Args:
        tape: the archive's bytes.
        archive: its name, for messages.
        size: bytes of a plain archive; a member that reaches over its end is refused.

    Raises:
        SourceError: it is no tar archive, or cut short.
    """
    members: list[TarMember] = []
    place = 0
    told: dict[str, str] = {}
    while True:
        head = tape.at(place, _BLOCK)
        if len(head) < _BLOCK:
            raise SourceError(f"{archive}: the end of a tar archive is missing: it is cut short, or no tar archive")
        if not any(head):
            break
        kind, length = _kind_and_size(head, archive, place)
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL):
            told |= _extended(tape, place, kind, length, archive)
        else:
            length = _told_size(told, length, archive)
            if kind != _FOLDER:
                members.append(_member(head, kind, length, place + _BLOCK, told, size))
            told = {}
        if len(members) > MAX_MEMBERS:
            raise SourceError(f"{archive}: more than {MAX_MEMBERS} members; unpack it")
        has_data = kind in _REGULAR or kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL) or chr(kind) in "S"
        place += _BLOCK + (-(-length // _BLOCK) * _BLOCK if has_data else 0)
    _require_end(tape, place + _BLOCK, archive, size)
    times = Counter(member.name for member in members)
    twice = "its name stands twice in the archive"
    return [replace(m, problem=m.problem or (twice if times[m.name] > 1 else "")) for m in members]


def _require_end(tape: Tape, place: int, archive: str, size: int | None) -> None:
    """Nothing but zeros behind the end: members of a second archive glued on would be lost without a word."""
    if size is not None and size - place > _MAX_PADDING_BYTES:
        raise SourceError(f"{archive}: {size - place} bytes follow the tar archive's end")
    for step in range(0, _MAX_PADDING_BYTES + 1, _AHEAD_BYTES):
        piece = tape.at(place + step, _AHEAD_BYTES)
        if any(piece):
            raise SourceError(f"{archive}: more bytes follow the tar archive's end: several archives in one file?")
        if len(piece) < _AHEAD_BYTES:
            return
    raise SourceError(f"{archive}: more than {_MAX_PADDING_BYTES} bytes follow the tar archive's end")


def _member(
    head: bytes, kind: int, size: int, offset: int, told: dict[str, str], archive_bytes: int | None
) -> TarMember:
    prefix = _text(head[345:500]) if head[257:262] == b"ustar" and head[257:265] != b"ustar  \0" else ""
    name = told.get("path") or (f"{prefix}/" if prefix else "") + _text(head[:100])
    name = name.removeprefix("./")
    problem = unusable_name(name)
    if kind not in _REGULAR:
        problem = _KINDS.get(chr(kind), "a device or another special file")
    elif any(key.startswith("GNU.sparse") for key in told):
        problem = "a sparse file"
    elif archive_bytes is not None and offset + size > archive_bytes:
        problem = "the archive is cut short within it"
    return TarMember(name=name, size=size, offset=offset, problem=problem)


def _kind_and_size(head: bytes, archive: str, place: int) -> tuple[int, int]:
    claimed = _number(head[148:156])
    if claimed != sum(head[:148]) + 8 * 32 + sum(head[156:]):
        raise SourceError(f"{archive}: no tar header, or a damaged one, at byte {place}")
    size = _number(head[124:136])
    if size is None or size < 0:
        raise SourceError(f"{archive}: the tar header at byte {place} has no size")
    return head[156], size


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's binary form for large numbers."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit < 56 for digit in digits) else None


def _extended(tape: Tape, place: int, kind: int, length: int, archive: str) -> dict[str, str]:
    """What an extended header tells about the next member."""
    if length > _MAX_EXTENDED_BYTES:
        raise SourceError(f"{archive}: an extended tar header of {length} bytes at byte {place}")
    data = tape.at(place + _BLOCK, length)
    if len(data) < length:
        raise SourceError(f"{archive}: the tar archive is cut short in a header")
    if kind == _LONG_NAME:
        return {"path": _text(data)}
    return _pax(data, archive) if kind == _PAX else {}


def _pax(data: bytes, archive: str) -> dict[str, str]:
    found = {}
    while data.strip(b"\0"):
        length_text, _, _ = data.partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 9 else 0
        record = data[len(length_text) + 1 : length]
        if length <= len(length_text) + 1 or not record.endswith(b"\n") or b"=" not in record:
            raise SourceError(f"{archive}: a damaged extended tar header")
        key, _, value = record[:-1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[length:]
    return found


def _told_size(told: dict[str, str], length: int, archive: str) -> int:
    text = told.get("size")
    if text is None:
        return length
    if not text.isdecimal():
        raise SourceError(f"{archive}: an extended tar header with a size that is no number")
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _zlib() -> Any:
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng


class GzipTarReader:
    """A member of a `.tar.gz`; its last bytes are handed out only when all of the archive was read and found whole."""

    def __init__(self, tape: GzipTape, member: TarMember, where: str, *, crc: int, close: Callable[[], None]) -> None:
        self._tape = tape
        self._where = where
        self._left = member.size
        self._crc = crc
        self._close = close
        self._is_checked = False
        tape.at(member.offset, 0)

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        piece = self._tape.read(min(size, self._left)) if self._left and size else b""
        if self._left and size and not piece:
            raise SourceError(f"{self._where}: the archive is cut short within it")
        self._left -= len(piece)
        if not self._left and not self._is_checked:
            while self._tape.read(_READ_BYTES):
                pass
            if self._tape.crc != self._crc:
                raise SourceError(f"{self._where}: its archive was changed while it was read; convert it again")
            self._is_checked = True
        return piece

    def close(self) -> None:
        self._close()

    def __enter__(self) -> "GzipTarReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
