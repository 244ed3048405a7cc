"""A run's frames as shards: written one frame at a time in bounded memory, byte for byte what zarr-python would write.

A shard is its chunks in frame order, then (offset, length) of each as little-endian u64, then the crc32c of that index.
zarr-python itself rewrites the whole shard for every frame; here the next frame is appended and 16 bytes are kept.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import StoredFile
from fmristream.errors import SourceError
from fmristream.shards import codec
from fmristream.shards.hashing import Hash, bulk_hash
from fmristream.storage import NewObject, Store

# Uncompressed size that a shard may reach; its length in frames follows from the header, before the first byte.
SHARD_BYTES = 512 * 2**20

# Entry of a chunk that does not exist: beyond the last frame of the last shard.
ABSENT = 2**64 - 1

# blosc's frame header counts bytes in a signed 32-bit number.
MAX_CHUNK_BYTES = 2**31 - 17


def frames_per_shard(*, frames: int, voxels: int, itemsize: int) -> int:
    """How many frames a shard holds.

    Raises:
        SourceError: one frame is larger than a chunk can be.
    """
    frame_bytes = codec.padded_length(voxels) * itemsize
    if frame_bytes > MAX_CHUNK_BYTES:
        raise SourceError(
            f"one frame takes {frame_bytes} bytes, a chunk holds {MAX_CHUNK_BYTES}; give a smaller --mask"
        )
    return max(1, min(frames, SHARD_BYTES // frame_bytes))


@dataclass(slots=True)
class _Shard:
    """What is known of the shard being written."""

    object: NewObject
    name: str
    digest: Hash
    size: int = 0
    entries: list[tuple[int, int]] = field(default_factory=list)

    def append(self, data: bytes | memoryview) -> None:
        self.object.write(data)
        self.digest.update(data)
        self.size += len(data)


class FramesWriter:
    """Writes (v,) frames of one array into shards; a context manager that discards what was not finished.

    Args:
        store: the dataset.
        folder: key of the array, such as `runs/<id>.zarr/residual`.
        frames: how many frames will come; fewer or more is an error of the caller.
        voxels: length of a frame.
        dtype: little-endian stored dtype.
        bulk_digest: which digest shards get.
        chunk_shape: axes of a frame where it has more than one; such frames are not padded.
        is_raw: frames are stored as they are, not compressed.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        *,
        frames: int,
        voxels: int,
        dtype: "np.dtype[Any]",
        bulk_digest: str,
        chunk_shape: tuple[int, ...] | None = None,
        is_raw: bool = False,
    ) -> None:
        self.frames_per_shard = frames_per_shard(frames=frames, voxels=voxels, itemsize=dtype.itemsize)
        self._store = store
        self._folder = folder
        self._frames, self._bulk_digest = frames, bulk_digest
        elements = codec.padded_length(voxels) if chunk_shape is None else voxels
        self._place = "/0" * (1 if chunk_shape is None else len(chunk_shape))  # of a shard along the axes of a frame
        self._chunk = np.full(elements, codec.fill_value(dtype), dtype=dtype)
        self.frame: NDArray[Any] = self._chunk[:voxels]  # fill this, then call append()
        self._shard: _Shard | None = None
        self._encode = codec.raw_parts if is_raw else codec.encode_parts
        self._lengths: list[int] = []
        self.checks: list[int] = []  # the last 4 bytes of every chunk, or of what follows it, in frame order
        self._files: list[StoredFile] = []

    def append(self, *, escapes: tuple[NDArray[np.uint32], NDArray[Any]] | None = None) -> None:
        """Encode and write what stands in `frame`; `escapes`: positions and values that its codes cannot say."""
        if self._shard is None:
            name = f"c/{len(self._files)}{self._place}"
            new = self._store.stream_new(f"{self._folder}/{name}")
            self._shard = _Shard(new, name, bulk_hash(self._bulk_digest))
        start = self._shard.size
        packed, checksum = self._encode(self._chunk)
        self._shard.append(packed)
        self._shard.append(checksum)
        self._shard.entries.append((start, self._shard.size - start))
        if escapes is not None:
            # Behind the chunk, where one range reads both; Zarr's own index does not count it.
            checksum = codec.escape_block(*escapes, chunk_check=checksum)
            self._shard.append(checksum)
        self.checks.append(int.from_bytes(checksum[-codec.CRC_BYTES :], "little"))
        self._lengths.append(self._shard.size - start)
        if len(self._shard.entries) == self.frames_per_shard:
            self._close_shard()

    def finish(self) -> tuple[list[int], tuple[StoredFile, ...]]:
        """Publish the last shard; returns every chunk's length in frame order, and the shards."""
        assert len(self._lengths) == self._frames, "the source checks its length before"
        if self._shard is not None:
            self._close_shard()
        return self._lengths, tuple(self._files)

    @property
    def published(self) -> list[str]:
        """Keys of the shards that are complete already."""
        return [f"{self._folder}/{file.name}" for file in self._files]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shard is not None:
            self._shard.object.__exit__(*exc)
            self._shard = None

    def _close_shard(self) -> None:
        shard = self._shard
        assert shard is not None
        missing = self.frames_per_shard - len(shard.entries)
        index = np.array(shard.entries + [(ABSENT, ABSENT)] * missing, dtype="<u8").tobytes()
        shard.append(index)
        shard.append(codec.checksum(index))
        with shard.object as new:
            new.commit()
        self._files.append(StoredFile(name=shard.name, bytes=shard.size, digest=shard.digest.hexdigest()))
        self._shard = None
