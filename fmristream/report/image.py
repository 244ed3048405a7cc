"""The NIfTI image that a run becomes: what it begins with, then its frames, one after the other; nothing is written here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, SourceError, UsageError
from fmristream.ingest.header_bytes import header_of, is_big_endian, make_prefix
from fmristream.ingest.nifti_header import parse_header
from fmristream.report.blocks import frame_blocks
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import RunDigest, run_header
from fmristream.shards.run_reader import RunReader
from fmristream.signal.grid import fortran_positions, in_byte_order
from fmristream.signal.measure import background_value

HeaderKind = Literal["original", "scrubbed", "made"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A NIfTI image about to be written: what it begins with, its frames, and what to say of it."""

    prefix: bytes
    header: HeaderKind
    frames: Iterator[memoryview]  # in the order and byte order of the file; raises at the end if they are not right
    stream_sha256: str = ""  # what it must come to; "" where the frames are checked by themselves
    notes: tuple[str, ...] = ()


def image_of(dataset: Dataset, run: Run) -> Image:
    """The NIfTI image that a run becomes."""
    reader = dataset.reader(run)
    prefix = reader.nifti_prefix
    if prefix is None or not reader.is_volume:
        return _made(dataset, reader)
    _require_same(run, prefix, where=dataset.store.name)
    told = reader.attributes.get("nifti", {})
    digest, is_kept = str(told.get("stream_sha256", "")), told.get("headers") == "keep"
    if not digest:
        raise CorruptDataError(f"{dataset.store.name}: run {run.name}: its group does not say what its image comes to")
    removed = ", ".join(map(str, told.get("removed", ())))
    return Image(
        prefix=prefix,
        header="original" if is_kept else "scrubbed",
        frames=_volumes(reader, big_endian=is_big_endian(prefix)),
        stream_sha256=digest,
        notes=() if is_kept else (f"the header was scrubbed; removed: {removed or 'nothing, it held nothing else'}",),
    )


def _volumes(reader: RunReader, *, big_endian: bool) -> Iterator[memoryview]:
    """Frames of a run that is stored as volumes."""
    for start, stop in frame_blocks(reader.run):
        for volume in reader.read_volumes(start, stop):
            yield in_byte_order(volume, big_endian=big_endian).reshape(-1).view(np.uint8).data


def _made(dataset: Dataset, reader: RunReader) -> Image:
    """An image from stored voxels: a header made of what the tables say, and zeros outside the mask."""
    if dataset.is_grayordinates(reader.run):
        raise UsageError(
            f"{dataset.store.name}: run {reader.run.name} holds grayordinates (CIFTI-2), which no NIfTI image of volumes can "
            "hold; read them: fmristream.open(url).read(run, packed=True)"
        )
    run, mask = reader.run, dataset.space(reader.run).mask
    dtype, slope, inter = run.numpy_dtype, run.slope, run.inter
    fill, has_zero = background_value(dtype, slope, inter)
    notes = ["the header was made anew"]
    if not mask.all():
        notes.append(f"{mask.size - run.voxels} of {mask.size} voxels lie outside the stored mask and are 0")
    is_scaled = not (mask.all() or has_zero)
    if is_scaled:  # no stored value means 0
        dtype = np.dtype("<f8" if dtype.itemsize > 2 and dtype != np.dtype("<f4") else "<f4")
        fill, slope, inter = 0, 1.0, 0.0
        notes.append(f"values are scaled and {dtype.name}, because no stored value means 0")
    prefix = make_prefix(
        shape=run.shape,
        frames=run.frames,
        dtype=dtype,
        slope=slope,
        inter=inter,
        affine=run.affine,
        tr_s=run.tr_s,
        space=run.space,
    )
    frames = _placed(dataset, reader, np.full(mask.size, fill, dtype=dtype), is_scaled=is_scaled)
    return Image(prefix=prefix, header="made", frames=frames, notes=tuple(notes))


def _placed(dataset: Dataset, reader: RunReader, volume: NDArray[Any], *, is_scaled: bool) -> Iterator[memoryview]:
    """Frames of a run that is stored as voxels, each put into `volume`; the run digest is compared at the end."""
    run = reader.run
    positions = fortran_positions(dataset.space(run).mask)
    header = run_header(
        frames=run.frames, shape=run.shape, dtype=run.dtype, slope=run.slope, inter=run.inter, affine=run.affine,
        tr_s=run.tr_s,
    )  # fmt: skip
    digest = RunDigest(header=header, space_digest=run.space_digest, bulk_digest=dataset.bulk_digest)
    for start, stop in frame_blocks(run):
        for values in reader.read_stored(start, stop):
            digest.add(values.data)
            with np.errstate(invalid="ignore", over="ignore"):
                volume[positions] = values.astype(np.float64) * run.slope + run.inter if is_scaled else values
            yield volume.view(np.uint8).data
    if digest.hexdigest() != run.digest:
        raise CorruptDataError(
            f"{dataset.store.name}: run {run.name}: its stored values have digest {digest.hexdigest()[:12]}, its row says "
            f"{run.digest[:12]}; restore its objects from a copy or convert it again"
        )


def _require_same(run: Run, prefix: bytes, *, where: str) -> None:
    """The stored header speaks of this run."""
    try:
        said = parse_header(header_of(prefix, run.name), run.name)
    except SourceError as error:
        raise CorruptDataError(f"{where}: the stored header is none: {error}; convert the run again") from error
    found = (said.dims, said.dtype.newbyteorder("<").str, said.data_offset, said.slope, said.inter)
    if found != ((*run.shape, run.frames), run.dtype, len(prefix), run.slope, run.inter):
        raise CorruptDataError(
            f"{where}: run {run.name}: the stored header is of another image ({found}); convert the run again"
        )
