"""Where each frame lies: one block per run of chunk lengths in frame order, little-endian u32, closed by a crc32c.

Lengths include the chunk's own 4 checksum bytes. Offsets are prefix sums that start at 0 in each shard, so a window of
frames is one byte range, or two where it crosses into the next shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError
from fmristream.shards import codec


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Consecutive frames in one shard: bytes [start, stop) hold `lengths` one after the other."""

    shard: int
    start: int
    stop: int
    lengths: tuple[int, ...]


def encode_block(lengths: Sequence[int] | NDArray[np.unsignedinteger[Any]]) -> bytes:
    """The index block of one array."""
    data = np.asarray(lengths, dtype="<u4").tobytes()
    return data + codec.checksum(data)


def decode_block(data: bytes, *, frames: int, what: str) -> NDArray[np.int64]:
    """Chunk lengths of one array, (frames,).

    Raises:
        CorruptDataError: the block does not have its length or its checksum.
    """
    if (
        len(data) != 4 * frames + codec.CRC_BYTES
        or codec.checksum(data[: -codec.CRC_BYTES]) != data[-codec.CRC_BYTES :]
    ):
        raise CorruptDataError(f"{what}: the index block is damaged; restore the index object from a copy")
    return np.frombuffer(data, dtype="<u4", count=frames).astype(np.int64)


def ranges_of(lengths: NDArray[np.int64], *, start: int, stop: int, frames_per_shard: int) -> list[ByteRange]:
    """Byte ranges that hold frames [start, stop), at most one per shard."""
    ranges = []
    while start < stop:
        shard = start // frames_per_shard
        first = shard * frames_per_shard
        end = min(stop, first + frames_per_shard)
        offset = int(lengths[first:start].sum())
        wanted = lengths[start:end]
        ranges.append(
            ByteRange(shard=shard, start=offset, stop=offset + int(wanted.sum()), lengths=tuple(wanted.tolist()))
        )
        start = end
    return ranges
