"""Read a CIFTI-2 dense series as a run: frames of grayordinates, though the file has one time series after the other.

A frame is spread over all of the file. Each grayordinate's series is read once, front to back, turned tile by tile, and
put into a temporary file without a name, from which frames come in order. Memory is two tiles, whatever the run's size;
the temporary file is as large as the run's values.
"""

import struct
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import SourceError, StorageError
from fmristream.ingest.cifti_xml import MAX_XML_BYTES, Axes, parse_axes
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.header_bytes import CIFTI_CODE, is_big_endian
from fmristream.ingest.inflate import SourceBytes
from fmristream.ingest.nifti_header import NiftiHeader
from fmristream.ingest.run_stream import Closing, Frame, RunHeader
from fmristream.shards.grayordinates import NO_AFFINE, BrainModels

# What is turned at a time, and what is held of frames.
TILE_BYTES = 16 * 2**20
# A grayordinate's series is held whole: two million frames of float64.
MAX_SERIES_BYTES = TILE_BYTES

_EXTENSION_HEAD_BYTES = 8
_BLOCK = 64  # turned in pieces that stay in the cache


class CiftiStream(Closing):
    """An open CIFTI-2 dense series (a `RunStream`); a frame is (grayordinates, 1, 1)."""

    prefix = b""  # no part of the header is stored: what the XML says of the axes is, as a space

    def __init__(self, source: SourceBytes, nifti: NiftiHeader, axes: Axes, *, name: str) -> None:
        self.content_bytes = nifti.data_offset + nifti.data_bytes
        self.models: BrainModels = axes.models
        self._source = source
        self._name = name
        self._is_swapped = not nifti.dtype.isnative
        self._is_started = False
        self._is_complete = False
        self._header = RunHeader(
            shape=axes.models.frame_shape,
            frames=nifti.dims[4],
            dtype=nifti.dtype.newbyteorder("<"),
            slope=nifti.slope,
            inter=nifti.inter,
            affine=tuple(NO_AFFINE[row : row + 4] for row in range(0, 16, 4)),
            tr_s=axes.tr_s,
            space=axes.space,
            notes=(*nifti.notes, *axes.notes),
            models=axes.models.digest,
        )

    @property
    def header(self) -> RunHeader:
        return self._header

    def frames(self, ring: int = 1) -> Iterator[Frame]:
        """Every frame, once; all of the file is read before the first one comes.

        Raises:
            SourceError: the data are damaged, too short or too long.
            StorageError: the folder for temporary files has no room.
        """
        assert not self._is_started, "frames() reads the file from front to back and can be called once"
        self._is_started = True
        header = self._header
        bits = np.dtype(f"u{header.dtype.itemsize}")  # moved as bits: NaN keeps its payload
        buffers = [np.empty(header.shape[0], dtype=bits) for _ in range(min(ring, header.frames))]
        with tempfile.SpooledTemporaryFile(max_size=TILE_BYTES) as spool:
            self._source.expect(self.content_bytes)
            self._turn(spool, bits)
            self._source.finish()
            for number, values in enumerate(self._turned(spool, bits)):
                frame = buffers[number % ring]
                frame[:] = values
                yield frame.view(header.dtype).reshape(header.shape, order="F")
        self._is_complete = True

    def fingerprint(self) -> Fingerprint:
        """Size and checksum of the file."""
        assert self._is_complete, "the checksum is known once frames() is exhausted"
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()

    @property
    def _tile_rows(self) -> int:
        """Grayordinates of a tile."""
        series_bytes = self._header.frames * self._header.dtype.itemsize
        return min(max(1, TILE_BYTES // series_bytes), self._header.shape[0])

    def _turn(self, spool: IO[bytes], bits: "np.dtype[Any]") -> None:
        """Read tiles of (grayordinates, frames) and write them as (frames, grayordinates)."""
        total, frames = self._header.shape[0], self._header.frames
        # Memory is touched only as data come.
        stored = np.empty(self._tile_rows * frames * bits.itemsize, dtype=np.uint8)
        turned = np.empty(self._tile_rows * frames, dtype=bits)
        for first in range(0, total, self._tile_rows):
            count = min(self._tile_rows, total - first)
            wanted = stored[: count * frames * bits.itemsize]
            found = self._source.read_into(wanted.data)
            if found < len(wanted):
                raise SourceError(
                    f"{self._name}: the data end in the series of grayordinate {first + found // (frames * bits.itemsize)} "
                    f"of the {total} that the header declares"
                )
            tile = wanted.view(bits).reshape(count, frames)
            if self._is_swapped:
                tile.byteswap(inplace=True)
            target = turned[: count * frames].reshape(frames, count)
            _transpose(tile, target)
            self._write(spool, target)

    def _write(self, spool: IO[bytes], target: NDArray[Any]) -> None:
        try:
            spool.write(target.data.cast("B"))
        except OSError as error:
            size = self._header.frame_bytes * self._header.frames
            raise StorageError(
                f"{self._name}: its {size} bytes have to be turned from series into frames in {tempfile.gettempdir()}, which "
                f"cannot be written: {error.strerror or error}; set TMPDIR to a folder with room for it"
            ) from error

    def _turned(self, spool: IO[bytes], bits: "np.dtype[Any]") -> Iterator[NDArray[Any]]:
        """Frames in order: a stretch of each tile for a few frames at a time."""
        total, frames = self._header.shape[0], self._header.frames
        at_once = min(max(1, TILE_BYTES // self._header.frame_bytes), frames)
        block = np.empty((at_once, total), dtype=bits)
        piece = np.empty(at_once * self._tile_rows, dtype=bits)
        for start in range(0, frames, at_once):
            stop = min(start + at_once, frames)
            for first in range(0, total, self._tile_rows):
                count = min(self._tile_rows, total - first)
                wanted = piece[: (stop - start) * count]
                spool.seek((first * frames + start * count) * bits.itemsize)
                data = spool.read(wanted.nbytes)
                if len(data) < wanted.nbytes:
                    raise StorageError(
                        f"{self._name}: its temporary file in {tempfile.gettempdir()} lost bytes; try again"
                    )
                wanted.view(np.uint8)[:] = np.frombuffer(data, dtype=np.uint8)
                block[: stop - start, first : first + count] = wanted.reshape(stop - start, count)
            yield from block[: stop - start]


def read_axes(nifti: NiftiHeader, prefix: bytes, name: str) -> Axes:
    """The axes of a dense series, from everything that stands before its values.

    Raises:
        SourceError: there is no CIFTI XML, or it describes something else.
    """
    frames, grayordinates = nifti.dims[4:6]
    if frames * nifti.dtype.itemsize > MAX_SERIES_BYTES:
        raise SourceError(f"{name}: {frames} frames of one grayordinate are more than are believed")
    order = ">" if is_big_endian(prefix) else "<"
    xml = _find_xml(prefix[nifti.header_bytes :], order)
    if xml is None:
        raise SourceError(
            f"{name}: a CIFTI-2 file without its XML (a header extension of code {CIFTI_CODE}), or with two"
        )
    return parse_axes(xml, name, frames=frames, grayordinates=grayordinates)


def require_small_xml(nifti: NiftiHeader, name: str) -> None:
    """Raise SourceError where the header says that more XML comes than is read."""
    if nifti.data_offset > MAX_XML_BYTES:
        raise SourceError(
            f"{name}: the header says that values start at byte {nifti.data_offset}; more than {MAX_XML_BYTES} bytes of CIFTI "
            "XML are not believed"
        )


def _find_xml(extensions: bytes, order: str) -> bytes | None:
    """The one extension with XML; None where there is none, or more than one."""
    place, found = 4, []
    while extensions[:1] not in (b"", b"\0") and place + _EXTENSION_HEAD_BYTES <= len(extensions):
        size, code = struct.unpack_from(order + "2i", extensions, place)
        if size < _EXTENSION_HEAD_BYTES or place + size > len(extensions):
            break
        if code == CIFTI_CODE:
            found.append(extensions[place + _EXTENSION_HEAD_BYTES : place + size].rstrip(b"\0"))
        place += size
    return found[0] if len(found) == 1 else None


def _transpose(tile: NDArray[Any], target: NDArray[Any]) -> None:
    """`target` = tile.T, by blocks that stay in the cache."""
    rows, columns = tile.shape
    for row in range(0, rows, _BLOCK * 8):
        for column in range(0, columns, _BLOCK):
            part = tile[row : row + _BLOCK * 8, column : column + _BLOCK]
            target[column : column + _BLOCK, row : row + _BLOCK * 8] = part.T
