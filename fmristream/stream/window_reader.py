"""One clip of frames, from bytes to normalised values: planned by byte range, checked, decoded, normalised. numpy only."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, SpaceError
from fmristream.sampling.clip import Clip
from fmristream.shards.dataset import Dataset
from fmristream.shards.run_reader import RunReader, Span
from fmristream.signal.prepared import Prepared
from fmristream.signal.recipes import Recipe, prepare
from fmristream.storage.local import LocalStore
from fmristream.stream.kept import Kept
from fmristream.stream.rows import Piece, Scratch, Target
from fmristream.stream.run_source import RunSource
from fmristream.stream.sinks import Sink, sink_of

__all__ = ["Request", "Scratch", "Target", "WindowReader"]

# Recipes made ready that stay in memory, with the vectors of their runs: 15 runs of an MNI brain at 2 mm.
PREPARED_BYTES = 48 * 2**20
# Uncompressed runs of which is known which chunks were looked at: a byte a frame.
_KNOWN_RUNS = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """What a clip needs of its run: byte ranges, and nothing else."""

    run: Run
    clip: Clip
    reader: RunReader
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        """How much is read."""
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReader:
    """Reads clips of a dataset under one recipe; any number of threads may use it, each with its own scratch.

    Attributes:
        dataset: where the runs lie.
        recipe: what becomes of the stored values.
        exact: z-score with float32 moments also where float16 ones are stored (another request per run).
    """

    dataset: Dataset
    recipe: Recipe
    exact: bool = False
    _prepared: Kept[Prepared] = field(default_factory=lambda: Kept(PREPARED_BYTES), init=False, repr=False)
    _known: "_KnownChunks" = field(default_factory=lambda: _KnownChunks(), init=False, repr=False)

    def prepared(self, run: Run) -> Prepared:
        """The recipe made ready for a run; kept while others do not need its place.

        Raises:
            CorruptDataError: the run cannot be normalised.
        """
        return self._prepared.get(
            run.name, lambda: prepare(self.recipe, RunSource(self.dataset, run), exact=self.exact)
        )

    def request(self, run: Run, clip: Clip) -> Request:
        """The byte ranges of a clip; asks for the run's index if it is not known yet.

        Raises:
            CorruptDataError: the index is damaged.
            ObjectMissingError: it is gone.
        """
        reader = self.dataset.reader(run)
        # Only what reduces frames may find its values stored beside them.
        is_read = not self.recipe.reduces or self.prepared(run).needs_frames
        return Request(run, clip, reader, tuple(reader.plan(clip.frames)) if is_read else ())

    def fill(
        self,
        request: Request,
        target: Target,
        scratch: Scratch,
        *,
        data: Sequence[memoryview] | None = None,
        prepared: Prepared | None = None,
    ) -> Prepared:
        """Write what becomes of a clip; returns the recipe that made it.

        Args:
            request: of the clip.
            target: where it goes.
            scratch: of this thread.
            data: the bytes of each of the request's spans; None to read them now.
            prepared: the recipe made ready for the run, where somebody holds it.

        Raises:
            CorruptDataError: stored bytes have changed, or the run cannot be normalised.
            ObjectMissingError: an object of the run is gone.
            UsageError: the recipe cannot be had in this form.
        """
        reader = request.reader
        is_mapped = data is None and reader.is_raw and isinstance(reader.store, LocalStore)
        known = self._known.of(request.run) if is_mapped else None
        recipe = self.prepared(request.run) if prepared is None else prepared
        _require_room(request, recipe, target)
        sink = sink_of(reader, recipe, request.clip, target, scratch, known)
        try:
            row = 0
            for number, span in enumerate(request.spans):
                with _source(reader, span, scratch, data[number] if data is not None else None) as source:
                    _pour(span, source, sink, row)
                row += len(span.lengths)
        except CorruptDataError:
            if is_mapped:  # what is restored from a copy is another file
                self._known.forget(request.run)
                for span in request.spans:
                    reader.store.unmap(span.key)  # type: ignore[attr-defined]
            raise
        sink.finish()
        return recipe

    def read(self, run: Run, clip: Clip, packed: NDArray[Any], scratch: Scratch) -> None:
        """Fill `packed` (c, t, v) with the clip's frames of a run.

        Raises:
            CorruptDataError: stored bytes have changed, or the run cannot be normalised.
            ObjectMissingError: an object of the run is gone.
        """
        self.fill(self.request(run, clip), Target(packed), scratch)


def _require_room(request: Request, recipe: Prepared, target: Target) -> None:
    """Raise SpaceError unless a clip fits its place exactly: kernels write what they have, wherever that ends."""
    channels, frames, last = target.values.shape
    width = recipe.width
    if target.stretches is not None:
        ends = (
            target.stretches[:, :2].max(axis=0, initial=0)
            if not len(target.stretches)
            else ((target.stretches[:, :2] + target.stretches[:, 2:]).max(axis=0))
        )
        fits = bool(ends[0] <= width and ends[1] <= last)
    else:
        fits = last == width
    if not fits or (channels, frames) != (recipe.channels, request.clip.length):
        raise SpaceError(
            f"run {request.run.name}: {recipe.channels} channels of {request.clip.length} frames of {width} values do not fit "
            f"a place of {channels}, {frames} and {last}; stream runs of one space by one recipe"
        )


def _pour(span: Span, source: "_Source", sink: Sink, row: int) -> None:
    """Every chunk of a span: at once where that goes, else as many at a time as the sink takes from Python."""
    start, at = span.start, 0
    at = sink.take_all(source.piece(span, row))
    start += sum(span.lengths[:at])
    while at < len(span.lengths):
        lengths = span.lengths[at : at + sink.rows]
        stop = start + sum(lengths)
        sink.take(source.read(start, stop), lengths, first=span.first + at, row=row + at)
        start, at = stop, at + len(lengths)


def _source(reader: RunReader, span: Span, scratch: Scratch, data: memoryview | None) -> "_Source":
    """Where a span's bytes come from."""
    store = reader.store
    if data is None and isinstance(store, LocalStore):
        if reader.is_raw:
            return _MemorySource(store.map_object(span.key, span.stop), 0)
        return _LocalSource(store, span.key, scratch)
    held = data if data is not None else memoryview(store.read_range(span.key, span.start, span.stop))
    return _MemorySource(held, span.start)


class _Source(Protocol):
    """Bytes of one object."""

    def piece(self, span: Span, row: int) -> Piece: ...

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the object, valid until the next call."""
        ...

    def __enter__(self) -> "_Source": ...

    def __exit__(self, *exc: object) -> None: ...


class _MemorySource:
    """Bytes that are in memory, the first of them byte `begin` of the object."""

    def __init__(self, held: memoryview, begin: int) -> None:
        self._held = held
        self._begin = begin

    def piece(self, span: Span, row: int) -> Piece:
        return Piece(span.lengths, span.first, row, self._held, span.start - self._begin)

    def read(self, start: int, stop: int) -> memoryview:
        return self._held[start - self._begin : stop - self._begin]

    def __enter__(self) -> "_MemorySource":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _LocalSource:
    """Pieces of a local file, read into memory that is warm: one copy out of the page cache, into the processor's."""

    def __init__(self, store: LocalStore, key: str, scratch: Scratch) -> None:
        self._file = store.open_object(key)
        self._scratch = scratch

    def piece(self, span: Span, row: int) -> Piece:
        return Piece(span.lengths, span.first, row, None, span.start, self._file.descriptor)

    def read(self, start: int, stop: int) -> memoryview:
        view = self._scratch.array("bytes", (stop - start,), np.uint8).data
        self._file.read_into(start, view)
        return view

    def __enter__(self) -> "_LocalSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)


class _KnownChunks:
    """Which chunks of uncompressed runs had the right checksum when this process touched them first."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, NDArray[np.bool_]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _KnownChunks, ()

    def of(self, run: Run) -> NDArray[np.bool_]:
        """(t,) of a run, to read and to write."""
        with self._lock:
            known = self._of.setdefault(run.name, np.zeros(run.frames, dtype=np.bool_))
            self._of.move_to_end(run.name)
            if len(self._of) > _KNOWN_RUNS:
                self._of.popitem(last=False)
            return known

    def forget(self, run: Run) -> None:
        """Look at all of a run's chunks again."""
        with self._lock:
            self._of.pop(run.name, None)
