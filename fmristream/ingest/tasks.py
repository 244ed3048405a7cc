"""What one worker does with one run: find its mask, or convert it. Values in, values out, so that any engine can carry it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError, SourceError
from fmristream.ingest import pending
from fmristream.ingest.epi_mask import compute_mask
from fmristream.ingest.fingerprint import Fingerprint, quick_fingerprint
from fmristream.ingest.header_bytes import Scrubbed, header_of, is_big_endian, make_prefix, scrub
from fmristream.ingest.mask_file import read_mask
from fmristream.ingest.options import Codec, HeaderMode, Layout, Quarantined
from fmristream.ingest.pending import FinishedRun
from fmristream.ingest.read_ahead import RING, ReadAhead
from fmristream.ingest.resampling import ResampledStream, Resampling
from fmristream.ingest.run_stream import Frame, RunHeader, RunStream, open_run
from fmristream.ingest.side import Beside, SideTask, read_beside
from fmristream.ingest.sidecar import read_sidecar
from fmristream.ingest.sources import SourceRun
from fmristream.ingest.sources.synth import is_synth
from fmristream.shards.digest import sha256
from fmristream.shards.run_writer import RunWriter
from fmristream.shards.side import SideWriter
from fmristream.shards.spaces import AnySpace, Space, read_space
from fmristream.shards.volume import NiftiPrefix, VolumeRunWriter
from fmristream.signal import kernels
from fmristream.signal.grid import masked_columns
from fmristream.signal.quantize import LOSSY_CODECS, Quantizer, RangeMeasure
from fmristream.storage import Store

FrameCallback = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedRun:
    """A run whose header was read and found good, with what the options said put in its place.

    Where it is resampled, header and repetition time are those of what is stored.
    """

    source: SourceRun
    header: RunHeader
    space: str
    tr_s: float | None
    source_bytes: int
    resampling: Resampling | None = None

    @property
    def affine(self) -> tuple[float, ...]:
        """16 numbers, row by row."""
        return tuple(float(number) for row in self.header.affine for number in row)

    @property
    def decided(self) -> dict[str, Any]:
        """What records of the run depend on besides its source, JSON-able; nothing where it is not resampled."""
        return (
            {}
            if self.resampling is None
            else {
                "resampling": [
                    self.resampling.record,
                    self.header.affine,
                    self.header.shape,
                    self.header.frames,
                    self.tr_s,
                ]
            }
        )

    def open(self, *, with_prefix: bool = False) -> RunStream:
        """The run as it is stored."""
        stream = open_run(self.source, with_prefix=with_prefix)
        return stream if self.resampling is None else ResampledStream(stream, self.resampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTask:
    """Find the brain mask of a run: its own, or computed from the mean of its first frames (0 = all of them)."""

    run: SurveyedRun
    frames: int
    is_computed: bool = False  # even where the run brings its own
    store: Store | None = None  # where computed masks are recorded

    @property
    def name(self) -> str:
        """For messages: the run's."""
        return self.run.source.name

    @property
    def has_to_compute(self) -> bool:
        """Whether the run's own mask is not used, or there is none."""
        return self.is_computed or self.run.source.mask_url is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTask:
    """Convert a run into a dataset, storing the voxels of a space that lies there already.

    Attributes:
        made_after: number of the newest generation, 0 for none.
        bulk_digest: which digest values and objects get.
        barrier: number of the newest generation before which unused objects were removed: what a record from an
            earlier time names may be gone.
        computed_outside: voxels of the run's computed mask that the space lacks, where it joins an older dataset.
    """

    run: SurveyedRun
    store: Store
    space_digest: str
    space_document: dict[str, object]
    bulk_digest: str
    made_after: int = 0
    barrier: int = 0
    computed_outside: int = 0
    layout: Layout = "voxels"
    header: HeaderMode = "scrub"  # of layout volume
    codec: Codec = "lossless"
    threads: int = 1  # 2: the source is read and decompressed by a thread of its own; the result is the same
    side: SideTask = field(default_factory=SideTask)

    @property
    def name(self) -> str:
        """For messages: the run's."""
        return self.run.source.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A run that an earlier attempt had finished."""

    finished: FinishedRun


def find_run_mask(task: MaskTask, on_frame: FrameCallback | None = None) -> NDArray[np.uint8] | Quarantined:
    """The run's brain mask as packed bits in C order, or why the run cannot be used."""
    name, source = task.name, task.run.source
    if not task.has_to_compute:
        try:
            own = _own_mask(task.run)
            assert own is not None
            if not own.any():
                raise SourceError(f"{source.key}: the mask holds no voxel; make a new one, or give --mask none")
        except SourceError as error:
            return Quarantined(name=name, reason=f"its brain mask is unusable: {error}")
        return np.packbits(own.reshape(-1))
    try:
        if task.store is None:
            return _computed_mask(task, on_frame)[0]
        decided = task.run.decided
        key = pending.mask_key(source.key, quick_fingerprint(source), task.frames, decided=decided)
        found = pending.load_mask(task.store, key)
        if found is None:
            found, fingerprint = _computed_mask(task, on_frame)
            key = pending.mask_key(source.key, fingerprint, task.frames, decided=decided)
            pending.save_mask(task.store, key, found)
        return found
    except (SourceError, CorruptDataError) as error:
        return Quarantined(name=name, reason=str(error))


def _computed_mask(task: MaskTask, on_frame: FrameCallback | None) -> tuple[NDArray[np.uint8], Fingerprint]:
    """The whole file is read even for `first:K`, so that a damaged one is found before anything is stored."""
    header = task.run.header
    total = np.zeros(header.shape, dtype=np.float64, order="F")
    counted = 0
    with task.run.open() as stream:
        if stream.header != header:
            raise SourceError(f"{task.run.source.key}: its header changed while the conversion ran; convert it again")
        for number, volume in enumerate(stream.frames()):
            if task.frames == 0 or number < task.frames:
                total += np.where(np.isfinite(volume), volume, 0) if volume.dtype.kind == "f" else volume
                counted += 1
            if on_frame is not None:
                on_frame(1)
        fingerprint = stream.fingerprint()
    mean = total / counted * header.slope + header.inter
    return np.packbits(compute_mask(mean, task.run.affine).reshape(-1)), fingerprint


def convert_run(task: RunTask, on_frame: FrameCallback | None = None) -> FinishedRun | Resumed | Quarantined:
    """Convert one run, unless a record says that it was done; what is wrong with the source is its result.

    Raises:
        StorageError: the target failed; the conversion stops and can be run again.
    """
    store, source = task.store, task.run.source
    try:
        own_mask = _own_mask(task.run)
        sidecar = read_sidecar(source.sidecar_urls, is_pseudonymous=source.is_pseudonymous)
        beside = read_beside(task.side, source, task.run.header, task.run.resampling)
        decided = {
            "bulk_digest": task.bulk_digest,
            "own_mask": None if own_mask is None else sha256(np.packbits(own_mask).tobytes()),
            "space": task.space_digest,
            "tr_s": task.run.tr_s,
            **({"sidecar": sidecar} if sidecar else {}),
            **({"header": task.header, "layout": task.layout} if task.layout != "voxels" else {}),
            **beside.decided,
            **({"codec": task.codec} if task.codec != "lossless" else {}),
            **task.run.decided,
        }
        key = pending.record_key(source.key, quick_fingerprint(source), decided=decided)
        found = pending.load(store, key, barrier=task.barrier)
        if found is not None:
            return Resumed(finished=found)
        space = read_space(store, digest=task.space_digest, document=task.space_document)
        finished = _convert(task, space, own_mask, sidecar, beside, on_frame)
        if own_mask is None:
            finished = replace(finished, outside=task.computed_outside)
        # The content that was read is what is recorded, should the file have changed meanwhile.
        key = pending.record_key(source.key, finished.source, decided=decided)
        return pending.save(store, key, finished, made_after=task.made_after, barrier=task.barrier)
    except SourceError as error:
        return Quarantined(name=source.name, reason=str(error))


def _convert(
    task: RunTask,
    space: AnySpace,
    own_mask: NDArray[np.bool_] | None,
    sidecar: Mapping[str, Any],
    beside: Beside,
    on_frame: FrameCallback | None,
) -> FinishedRun:
    run = task.run
    in_space = space.mask if isinstance(space, Space) else np.ones(space.frame_shape, dtype=bool)
    columns = masked_columns(in_space)
    measures = beside.measures(task.store, space)
    quantizer, seen = _quantizer(task, columns, space.voxels)
    with (
        run.open(with_prefix=task.layout == "volume") as stream,
        _writer(task, space, stream, quantizer) as writer,
        SideWriter(task.store, writer.object, space.digest, bulk_digest=task.bulk_digest) as side,
    ):
        _require_same_header(stream, run)
        stored = writer.values if quantizer is None else quantizer.decoded  # what readers will get of each frame
        with _frames(stream, threads=task.threads) as frames:
            for volume in frames:
                kernels.gather(_planes(volume), columns, writer.values)
                writer.append()
                measures.add(stored)
                if on_frame is not None:
                    on_frame(1)
        if seen is not None and stream.fingerprint() != seen:
            raise SourceError(f"{run.source.key}: it changed while the conversion ran; convert it again")
        measures.store(side)
        written = writer.finish(
            own_mask=None if own_mask is None else own_mask[in_space],
            sidecar=sidecar,
            resampled=None if run.resampling is None else run.resampling.record,
        )
        return FinishedRun.of(
            replace(written, arrays=(*written.arrays, *side.arrays)),
            space_digest=space.digest,
            outside=0 if own_mask is None else int((own_mask & ~in_space).sum()),
            source=stream.fingerprint(),
            notes=beside.notes,
        )


def _planes(volume: Frame) -> NDArray[Any]:
    """An (x, y, z) volume in Fortran order as (z, x*y), no copy."""
    return volume.reshape(-1, volume.shape[2], order="F").T


def _require_same_header(stream: RunStream, run: SurveyedRun) -> None:
    if stream.header != run.header:
        raise SourceError(f"{run.source.key}: its header changed while the conversion ran; convert it again")


def _quantizer(task: RunTask, columns: NDArray[Any], voxels: int) -> tuple[Quantizer | None, Fingerprint | None]:
    """For a lossy codec: what a first pass over the source says of each voxel, and which source that was."""
    run, header = task.run, task.run.header
    codec = LOSSY_CODECS.get(task.codec)
    if codec is None or not codec.takes(header.dtype):
        return None, None
    measure = RangeMeasure(frames=header.frames, dtype=header.dtype)
    values = np.empty(voxels, dtype=header.dtype)
    with run.open() as stream:
        _require_same_header(stream, run)
        with _frames(stream, threads=task.threads) as frames:
            for volume in frames:
                kernels.gather(_planes(volume), columns, values)
                measure.add(values)
        seen = stream.fingerprint()
    scale = measure.finish(codec)
    return Quantizer(codec=codec, scale=scale, dtype=header.dtype, slope=header.slope, inter=header.inter), seen


def _writer(
    task: RunTask, space: AnySpace, stream: RunStream, quantizer: Quantizer | None
) -> RunWriter | VolumeRunWriter:
    """The writer of the layout that was asked for."""
    header = task.run.header
    if task.layout == "volume":
        assert isinstance(space, Space), "grayordinates are refused when headers are read"
        writer: Any = partial(VolumeRunWriter, task.store, space, prefix=_prefix(task, stream))
    else:
        writer = partial(RunWriter, task.store, space, is_raw=task.codec == "raw", quantizer=quantizer)
    opened: RunWriter | VolumeRunWriter = writer(
        frames=header.frames,
        dtype=header.dtype,
        slope=header.slope,
        inter=header.inter,
        affine=task.run.affine,
        tr_s=task.run.tr_s,
        bulk_digest=task.bulk_digest,
    )
    return opened


def _prefix(task: RunTask, stream: RunStream) -> NiftiPrefix:
    """What is stored of the source's header; one made for it where the run comes from no file, or is resampled."""
    run, header = task.run, task.run.header
    if is_synth(run.source.url) or run.resampling is not None:
        original = make_prefix(
            shape=header.shape,
            frames=header.frames,
            dtype=header.dtype,
            slope=header.slope,
            inter=header.inter,
            affine=run.affine,
            tr_s=run.tr_s,
            space=run.space,
        )
    else:
        original = stream.prefix
        header_of(original, run.source.key)  # raises where there is none: never a made one in place of the source's
    kept = Scrubbed(prefix=original, removed=()) if task.header == "keep" else scrub(original)
    return NiftiPrefix(data=kept.prefix, big_endian=is_big_endian(original), mode=task.header, removed=kept.removed)


def _frames(stream: RunStream, *, threads: int) -> AbstractContextManager[Iterable[Frame]]:
    """The frames, decompressed on the way by this thread or ahead of it by another."""
    return nullcontext(stream.frames()) if threads == 1 else ReadAhead(stream.frames(RING))


def _own_mask(run: SurveyedRun) -> NDArray[np.bool_] | None:
    if run.source.mask_url is None:
        return None
    if run.header.models:
        raise SourceError(f"{run.source.key}: a mask is given for grayordinates, which are stored whole; leave it out")
    if run.resampling is None:
        return read_mask(run.source.mask_url, run.header.shape, run.header.affine)
    source = run.resampling.source
    return run.resampling.mask(read_mask(run.source.mask_url, source.shape, source.affine))
