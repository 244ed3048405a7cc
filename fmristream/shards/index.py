"""Where each frame lies: one block per run of chunk lengths in frame order, little-endian u32, closed by a crc32c.

Lengths include the chunk's own 4 checksum bytes. Offsets are prefix sums that start at 0 in each shard, so a window of
frames is one byte range, or two where it crosses into the next shard.

Lengths also tell a chunk from that of another frame or run. Where all have one length, the block holds the last 4 bytes
of each in their place: its checksum; where lengths may be equal by chance, both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError
from fmristream.shards import QUANTIZED_ENCODING, RAW_ENCODING, codec


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkIndex:
    """What a block says: (t,) length of each chunk in bytes, and its last 4 bytes as u32 where these are told."""

    lengths: NDArray[np.int64]
    checks: NDArray[np.int64] | None = None


def words_of(encoding: str, *, lengths: Sequence[int], checks: Sequence[int]) -> list[int]:
    """What a block holds for an array in this encoding."""
    if encoding == RAW_ENCODING:
        return list(checks)
    return [*lengths, *checks] if encoding == QUANTIZED_ENCODING else list(lengths)


def decode_index(data: bytes, *, encoding: str, frames: int, chunk_bytes: int, what: str) -> ChunkIndex:
    """The index block of an array in this encoding.

    Args:
        data: the block.
        encoding: of the array.
        frames: how many chunks there are.
        chunk_bytes: length of a chunk that is not compressed.
        what: for messages.

    Raises:
        CorruptDataError: the block does not have its length or its checksum.
    """
    if encoding == RAW_ENCODING:
        return ChunkIndex(
            lengths=np.full(frames, chunk_bytes, dtype=np.int64), checks=decode_block(data, frames=frames, what=what)
        )
    if encoding == QUANTIZED_ENCODING:
        words = decode_block(data, frames=2 * frames, what=what)
        return ChunkIndex(lengths=words[:frames], checks=words[frames:])
    return ChunkIndex(lengths=decode_block(data, frames=frames, what=what))


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
