"""Event files as TensorBoard reads them, written record by record without its package.

A record is length (8 bytes), masked crc32c of that, an `Event` message of TensorBoard's event.proto, masked crc32c of it;
numbers little-endian. Of `Event` are used: wall_time (field 1, double), step (2, int64), file_version (3, string), summary
(5: of each value, field 1, tag 1 and simple_value 2) and session_log (7: status 1), which says where a run began anew.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path

import google_crc32c

_VERSION = "brain.Event:2"
_SESSION_START = 1
_FLOAT_MAX = float.fromhex("0x1.fffffep127")
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5


class EventFile:
    """One attempt's scalars; every record is with the operating system when `add` returns.

    Args:
        folder: of the run's event files, of which this is one more.
        first_step: of this attempt; TensorBoard forgets what earlier attempts wrote from there on.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names; the usual ones have time and machine in them.
        numbers = [int(path.name.rpartition(".")[2]) for path in folder.glob("events.out.tfevents.[0-9]*")]
        self._file = open(folder / f"events.out.tfevents.{max(numbers, default=0) + 1:010d}", "xb", buffering=0)  # noqa: SIM115
        self._write(_text(3, _VERSION))
        self._write(_number(2, first_step) + _message(7, _number(1, _SESSION_START)))

    def add(self, step: int, numbers: Mapping[str, float], *, wall_time_s: float | None = None) -> None:
        """Scalars of a step, by name; rounded to float32, as TensorBoard keeps them, and left out where that cannot hold them."""
        values = b"".join(
            _message(1, _text(1, name) + _key(2, _FLOAT) + struct.pack("<f", value))
            for name, value in numbers.items()
            if abs(value) <= _FLOAT_MAX
        )
        self._write(_number(2, step) + _message(5, values), wall_time_s)

    def close(self) -> None:
        """No more."""
        self._file.close()

    def _write(self, fields: bytes, wall_time_s: float | None = None) -> None:
        event = _key(1, _DOUBLE) + struct.pack("<d", time.time() if wall_time_s is None else wall_time_s) + fields
        length = struct.pack("<Q", len(event))
        record = length + _masked(length) + event + _masked(event)
        if self._file.write(record) != len(record):
            raise OSError(f"{self._file.name}: the disk took a part of a record only")


def _masked(data: bytes) -> bytes:
    checksum = int(google_crc32c.value(data))
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    assert value >= 0, "negative numbers are written otherwise"
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
