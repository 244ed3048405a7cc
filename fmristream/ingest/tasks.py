"""What one worker does with one run: find its mask, or convert it. Values in, values out, so that any engine can carry it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, SourceError
from fmristream.ingest import pending
from fmristream.ingest.epi_mask import compute_mask
from fmristream.ingest.fingerprint import quick_fingerprint
from fmristream.ingest.mask_file import read_mask
from fmristream.ingest.options import Quarantined
from fmristream.ingest.pending import FinishedRun
from fmristream.ingest.read_ahead import RING, ReadAhead
from fmristream.ingest.run_stream import Frame, RunHeader, RunStream, open_run
from fmristream.ingest.sources import SourceRun
from fmristream.shards.digest import sha256
from fmristream.shards.run_writer import RunWriter
from fmristream.shards.spaces import Space, read_space
from fmristream.signal import kernels
from fmristream.signal.grid import gather_order
from fmristream.storage import Store

FrameCallback = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedRun:
    """A run whose header was read and found good, with what the options said put in its place."""

    source: SourceRun
    header: RunHeader
    space: str
    tr_s: float | None
    source_bytes: int

    @property
    def affine(self) -> tuple[float, ...]:
        """16 numbers, row by row."""
        return tuple(float(number) for row in self.header.affine for number in row)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTask:
    """Compute the brain mask of a run from the mean of its first frames (0 = all of them)."""

    run: SurveyedRun
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTask:
    """Convert a run into a dataset, storing the voxels of a space that lies there already."""

    run: SurveyedRun
    store: Store
    space_digest: str
    space_document: dict[str, object]
    threads: int = 1  # 2: the source is read and decompressed by a thread of its own; the result is the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A run that an earlier attempt had finished."""

    finished: FinishedRun


def compute_run_mask(task: MaskTask, on_frame: FrameCallback | None = None) -> NDArray[np.uint8] | Quarantined:
    """The run's brain mask as packed bits in C order, or why the run cannot be read.

    The whole file is read even for `first:K`, so that a damaged one is found before anything is stored.
    """
    name = task.run.source.name
    header = task.run.header
    total = np.zeros(header.shape, dtype=np.float64, order="F")
    counted = 0
    try:
        with open_run(task.run.source) as stream:
            for number, volume in enumerate(stream.frames()):
                if task.frames == 0 or number < task.frames:
                    total += np.where(np.isfinite(volume), volume, 0) if volume.dtype.kind == "f" else volume
                    counted += 1
                if on_frame is not None:
                    on_frame(1)
    except (SourceError, CorruptDataError) as error:
        return Quarantined(name=name, reason=str(error))
    mean = total / counted * header.slope + header.inter
    return np.packbits(compute_mask(mean, task.run.affine).reshape(-1))


def convert_run(task: RunTask, on_frame: FrameCallback | None = None) -> FinishedRun | Resumed | Quarantined:
    """Convert one run, unless a record says that it was done; what is wrong with the source is its result.

    Raises:
        StorageError: the target failed; the conversion stops and can be run again.
    """
    store, source = task.store, task.run.source
    try:
        own_mask = _own_mask(task.run)
        decided = {
            "own_mask": None if own_mask is None else sha256(np.packbits(own_mask).tobytes()),
            "space": task.space_digest,
            "tr_s": task.run.tr_s,
        }
        found = pending.load(store, pending.record_key(source.key, quick_fingerprint(source), decided=decided))
        if found is not None:
            return Resumed(finished=found)
        space = read_space(store, digest=task.space_digest, document=task.space_document)
        finished = _convert(task, space, own_mask, on_frame)
        # The content that was read is what is recorded, should the file have changed meanwhile.
        pending.save(store, pending.record_key(source.key, finished.source, decided=decided), finished)
        return finished
    except SourceError as error:
        return Quarantined(name=source.name, reason=str(error))


def _convert(
    task: RunTask, space: Space, own_mask: NDArray[np.bool_] | None, on_frame: FrameCallback | None
) -> FinishedRun:
    run = task.run
    header = run.header
    order = gather_order(space.mask)
    with (
        open_run(run.source) as stream,
        RunWriter(
            task.store,
            space,
            frames=header.frames,
            dtype=header.dtype,
            slope=header.slope,
            inter=header.inter,
            affine=run.affine,
            tr_s=run.tr_s,
        ) as writer,
    ):
        if stream.header != header:
            raise SourceError(f"{run.source.key}: its header changed while the conversion ran; convert it again")
        with _frames(stream, threads=task.threads) as frames:
            for volume in frames:
                kernels.gather(volume.reshape(-1, order="F"), order, writer.values)
                writer.append()
                if on_frame is not None:
                    on_frame(1)
        written = writer.finish(own_mask=None if own_mask is None else own_mask[space.mask])
        return FinishedRun.of(
            written,
            space_digest=space.digest,
            outside=0 if own_mask is None else int((own_mask & ~space.mask).sum()),
            source=stream.fingerprint(),
        )


def _frames(stream: RunStream, *, threads: int) -> AbstractContextManager[Iterable[Frame]]:
    """The frames, decompressed on the way by this thread or ahead of it by another."""
    return nullcontext(stream.frames()) if threads == 1 else ReadAhead(stream.frames(RING))


def _own_mask(run: SurveyedRun) -> NDArray[np.bool_] | None:
    if run.source.mask_url is None:
        return None
    return read_mask(run.source.mask_url, run.header.shape, run.header.affine)
