"""A converted dataset, opened: its tables in memory, its voxels read by byte range when asked for."""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.columns import JoinedColumns
from fmristream.catalog.run import Run, StoredArray
from fmristream.catalog.run_table import ArrayTable, RunTable
from fmristream.catalog.tables import (
    Columns,
    Participant,
    decode_participants,
    decode_skipped,
    participant_columns,
)
from fmristream.catalog.where import Condition
from fmristream.errors import CorruptDataError, SpaceError, UsageError
from fmristream.shards.digest import PREFIX, content_digest, matches, sha256
from fmristream.shards.generation import Generation, listed_generations, newest_generation
from fmristream.shards.grayordinates import KIND as BRAIN_MODELS
from fmristream.shards.grayordinates import BrainModels
from fmristream.shards.run_reader import RunReader
from fmristream.shards.side import (
    CONFOUNDS,
    EVENTS,
    Parcels,
    Table,
    read_parcels_of,
    read_sketch,
    read_table,
    recordings_of,
)
from fmristream.shards.spaces import AnySpace, Space, read_space
from fmristream.storage import Store, join_url, open_store

if TYPE_CHECKING:
    import zarr

# Per-voxel vectors that stay in memory between reads of the same runs.
CACHE_BYTES = 64 * 2**20

# Spaces that are read before anybody asks for one: most datasets have one, some have one a run.
_SPACES_AHEAD = 2


def open_dataset(url: str, *, digest: str | None = None) -> "Dataset":
    """Open the newest version of a converted dataset.

    Args:
        url: folder, `s3://bucket/prefix`, or any URL that fsspec reads.
        digest: refuse anything but this content or generation digest (a prefix of 8 hex digits or more will do).

    Raises:
        FormatError: there is no dataset at the URL, or it needs a newer reader.
        CorruptDataError: a table is not what was committed, or the digest differs from the pinned one.
    """
    store = open_store(url)
    dataset = Dataset(url, store, newest_generation(store))
    if digest is not None and not matches(digest, dataset.content_digest, dataset.generation_digest):
        for older in listed_generations(store):
            if matches(digest, str(older.document["content_digest"]), older.digest):
                pinned = Dataset(url, store, older)
                assert pinned.content_digest  # raises where its tables say something else
                return pinned
        raise CorruptDataError(
            f"{store.name}: pinned to {digest}, found content {PREFIX}{dataset.content_digest} in generation "
            f"{PREFIX}{dataset.generation_digest}; open without the pin if the change is known to you"
        )
    return dataset


class Dataset:
    """One version of a dataset, or some of its runs. Made by `fmristream.open`; picklable, safe to share between threads.

    Attributes:
        filters: the conditions that its runs meet; empty for all of them.
    """

    def __init__(self, url: str, store: Store, generation: Generation, *, filters: tuple[str, ...] = ()) -> None:
        self.url = url
        self.store = store
        self.generation = generation
        self.filters = filters
        self._readers: OrderedDict[str, RunReader] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Dataset, filters=self.filters), (self.url, self.store, self.generation)

    def __repr__(self) -> str:
        return f"<Dataset {self.store.name}: {len(self.runs)} runs, content {self.content_digest[:12]}>"

    def warm(self, *, participants: bool) -> None:
        """Read what reading frames takes, tables and spaces, side by side: over a network, one round trip for all."""
        spaces = list(self.generation.document["spaces"].items())[:_SPACES_AHEAD]
        with ThreadPoolExecutor(4 + len(spaces)) as threads:
            tables = ("runs", "array_tables", *(("participants",) if participants else ()))
            asked: list[Future[Any]] = [threads.submit(getattr, self, name) for name in tables]
            asked += [threads.submit(self._keep_space, digest, document) for digest, document in spaces]
            for one in asked:
                one.result()

    @property
    def generation_digest(self) -> str:
        """Hex sha256 that pins every object of this version."""
        return self.generation.digest

    @cached_property
    def content_digest(self) -> str:
        """Hex sha256 of what the dataset says: what order and resume depend on."""
        computed = content_digest(self.all_runs.identities(), parameters=self.parameters)
        recorded = self.generation.document["content_digest"]
        if computed != recorded:
            raise CorruptDataError(
                f"{self.store.name}: the tables say content {computed[:12]}, the generation {recorded[:12]}; "
                "they do not belong together: restore both from a copy"
            )
        return computed

    @property
    def barrier(self) -> int:
        """Number of the newest generation before which unused objects were removed; 0 where none was."""
        return int(self.generation.document.get("barrier", 0))

    @property
    def bulk_digest(self) -> str:
        """Name of the digest that values and objects of runs have."""
        return self.generation.bulk_digest

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters of the conversion that change samples."""
        return dict(self.generation.document["parameters"])

    @cached_property
    def runs(self) -> RunTable:
        """The runs, in base order (subject, session, task, acq, run, echo, space, digest)."""
        found = self.all_runs
        for condition in self.filters:
            columns = JoinedColumns(found, self.participant_columns)
            mask = Condition.parse(condition).mask(columns.column, known=columns.names, rows=columns.rows)
            found = found.select(mask)
        return found

    @cached_property
    def columns(self) -> JoinedColumns:
        """Columns of the runs and, by subject, of the participants."""
        return JoinedColumns(self.runs, self.participant_columns)

    def where(self, condition: str) -> "Dataset":
        """The same dataset with those runs only that meet a condition, such as `age > 60 and task == 'rest'`.

        Columns are those of the runs and of the participants; what is missing never matches. Digests stay those of the
        whole dataset.

        Raises:
            UsageError: it is no condition, or names a column that is not there.
        """
        view = Dataset(self.url, self.store, self.generation, filters=(*self.filters, Condition.parse(condition).text))
        # Tables that are in memory are shared; cached_property keeps them here.
        shared = (
            *("all_runs", "participants", "participant_columns", "array_tables"),
            *("content_digest", "_position_in_all", "_spaces"),
        )
        view.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        columns = JoinedColumns(self.runs, self.participant_columns)
        mask = Condition.parse(condition).mask(columns.column, known=columns.names, rows=columns.rows)
        view.__dict__["runs"] = self.runs.select(mask)
        return view

    @cached_property
    def all_runs(self) -> RunTable:
        """Every run of this version, whatever the filters."""
        found = RunTable.of_segments([self._table(segment["runs"]) for segment in self._segments])
        if repeated := found.repeated_name:
            raise CorruptDataError(
                f"{self.store.name}: two runs are called {repeated!r}; the tables are not ours, convert again"
            )
        return found

    @cached_property
    def participants(self) -> tuple[Participant, ...]:
        """One row per participant, `subject` and the columns of the source."""
        entry = self.generation.document["participants"]
        return tuple(decode_participants(self._table(entry))) if entry else ()

    @cached_property
    def participant_columns(self) -> Columns:
        """The participants table by column; empty where there is none."""
        entry = self.generation.document["participants"]
        return participant_columns(self._table(entry)) if entry else {}

    @cached_property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Inputs that were not converted: (name, reason)."""
        entry = self.generation.document["skipped"]
        return tuple(decode_skipped(self._table(entry))) if entry else ()

    def arrays_of(self, run: int | str | Run) -> tuple[str, dict[str, StoredArray]]:
        """(key of its index object, its arrays by name) of a run."""
        if isinstance(run, int):
            segment, row = self.runs.place(run)
        else:  # a run that was asked for before runs were chosen is read all the same
            segment, row = self.all_runs.place(self._position_in_all[self.run(run).name])
        return self._segments[segment]["index"]["key"], self.array_tables[segment].of(row)

    @cached_property
    def array_tables(self) -> list[ArrayTable]:
        """The arrays of each segment."""
        digest = self.bulk_digest
        return [
            ArrayTable(self._table(segment["arrays"]), runs=segment["runs"]["rows"], bulk_digest=digest)
            for segment in self._segments
        ]

    def run(self, run: int | str | Run) -> Run:
        """The run with this position in `runs` or this name.

        Raises:
            UsageError: there is none.
        """
        if isinstance(run, Run):
            return run
        if isinstance(run, int):
            if not -len(self.runs) <= run < len(self.runs):
                raise UsageError(
                    f"{self.store.name}: run {run} was asked for, there are {len(self.runs)}; count from 0"
                )
            return self.runs[run]
        if run not in self._position:
            raise UsageError(f"{self.store.name}: no run is called {run!r}; `fmristream info --runs` lists the names")
        return self.runs[self._position[run]]

    def is_grayordinates(self, run: int | str | Run) -> bool:
        """Whether a frame of the run is a list of vertices and voxels (CIFTI-2), not a volume."""
        return bool(self.generation.document["spaces"][self.run(run).space_digest]["kind"] == BRAIN_MODELS)

    def space(self, run: int | str | Run) -> Space:
        """Grid and mask of a run's voxels.

        Raises:
            SpaceError: its frames are grayordinates, which lie on no grid.
        """
        space = self.any_space(run)
        if isinstance(space, BrainModels):
            raise SpaceError(
                f"{self.store.name}: run {self.run(run).name} holds {space.voxels} grayordinates (CIFTI-2), which have no "
                "volume to be placed in; read them packed, (t, grayordinates): read(run, packed=True), "
                "Batch.packed; what each of them is: grayordinates(run)"
            )
        return space

    def grayordinates(self, run: int | str | Run) -> BrainModels:
        """What each value of a frame is, for a run of grayordinates: its brain models.

        Raises:
            SpaceError: its frames are volumes.
        """
        space = self.any_space(run)
        if isinstance(space, Space):
            raise SpaceError(
                f"{self.store.name}: run {self.run(run).name} holds volumes, not grayordinates; ask for its space(run)"
            )
        return space

    def any_space(self, run: int | str | Run) -> AnySpace:
        """What the values of a run's frames are, of whichever kind."""
        digest = self.run(run).space_digest
        with self._lock:
            space = self._spaces.get(digest)
        return self._keep_space(digest, self.generation.document["spaces"][digest]) if space is None else space

    def _keep_space(self, digest: str, document: Mapping[str, Any]) -> AnySpace:
        space = read_space(self.store, digest=digest, document=document)
        with self._lock:
            self._spaces[digest] = space
        return space

    def reader(self, run: int | str | Run) -> RunReader:
        """Reader of a run's arrays; the ones used last are kept."""
        wanted = self.run(run)
        with self._lock:
            reader = self._readers.get(wanted.name)
            if reader is not None:
                self._readers.move_to_end(wanted.name)
                return reader
        index_key, arrays = self.arrays_of(wanted)
        reader = RunReader(self.store, wanted, arrays, index_key, self.bulk_digest)
        with self._lock:
            self._readers[wanted.name] = reader
            # reference, moments and stats of a run: at most 2 + 2 x 4 + 2 x 4 bytes a voxel for 16-bit sources
            held = sum(18 * kept.run.voxels + 8 * kept.run.frames for kept in self._readers.values())
            while held > CACHE_BYTES and len(self._readers) > 1:
                _, dropped = self._readers.popitem(last=False)
                held -= 18 * dropped.run.voxels + 8 * dropped.run.frames
        return reader

    def read(
        self, run: int | str | Run, start: int = 0, stop: int | None = None, *, packed: bool = False
    ) -> NDArray[Any]:
        """Scaled signal of frames [start, stop): stored value x slope + inter.

        Returns:
            float32 (t, x, y, z) with 0 outside the mask, or (t, v) in-mask values where `packed`.

        Raises:
            UsageError: no such run or frames.
            SpaceError: grayordinates, not `packed`: they have no volume.
            CorruptDataError: stored bytes have changed.
            ObjectMissingError: an object of the run is gone.
        """
        wanted = self.run(run)
        mask = None if packed else self.space(wanted).mask  # before frames are read for nothing
        stored = self.reader(wanted).read_stored(start, wanted.frames if stop is None else stop)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN stays NaN, what float32 cannot hold becomes infinite
            scaled = (stored.astype(np.float64) * wanted.slope + wanted.inter).astype(np.float32)
        if mask is None:
            return scaled
        volumes = np.zeros((len(scaled), *mask.shape), dtype=np.float32)
        volumes[:, mask] = scaled
        return volumes

    def parcels(self, run: int | str | Run, atlas: str | None = None) -> Parcels:
        """Time series of a run's parcels, with labels, names and coverage.

        Args:
            run: position or name.
            atlas: the first 8 digits or more of the atlas's digest, where the run has parcels of several.

        Raises:
            UsageError: it has none of that atlas, or of several.
            CorruptDataError: stored bytes have changed.
        """
        return read_parcels_of(self, self.run(run), atlas)

    def confounds(self, run: int | str | Run) -> Columns | None:
        """(t,) columns of numbers, one row a frame, NaN where nothing is known; None where the run has no confounds."""
        table = read_table(self.reader(run), CONFOUNDS)
        return None if table is None else table.columns

    def events(self, run: int | str | Run) -> Columns | None:
        """Columns of the run's events, `onset` and `duration` in seconds; None where it has none."""
        table = read_table(self.reader(run), EVENTS)
        return None if table is None else table.columns

    def recordings(self, run: int | str | Run) -> dict[str, Table]:
        """Physiological, stimulus, eye and other recordings of a run by name.

        Their facts are `sampling_hz` and `start_s`, or none where they have one row a frame.
        """
        reader = self.reader(run)
        tables = {name: read_table(reader, name) for name in recordings_of(reader)}
        return {name: table for name, table in tables.items() if table is not None}

    def sketch(self, run: int | str | Run) -> bytes | None:
        """The run's fingerprint for `signal.sketch`; None where none was stored."""
        return read_sketch(self.reader(run))

    def zarr(self, run: int | str | Run) -> "zarr.Group":
        """The run as the Zarr group that it is, for any tool that reads Zarr v3."""
        from fmristream.shards.zarr_metadata import open_group

        return open_group(join_url(self.url, self.run(run).object))

    @cached_property
    def _position(self) -> Mapping[str, int]:
        return {name: position for position, name in enumerate(self.runs.column("name"))}

    @cached_property
    def _position_in_all(self) -> Mapping[str, int]:
        if not self.filters:
            return self._position
        return {name: position for position, name in enumerate(self.all_runs.column("name"))}

    @cached_property
    def _spaces(self) -> dict[str, AnySpace]:
        return {}

    @property
    def _segments(self) -> list[Mapping[str, Any]]:
        return list(self.generation.document["segments"])

    def _table(self, entry: Mapping[str, Any]) -> bytes:
        data = self.store.read(entry["key"])
        if sha256(data) != entry["sha256"]:
            raise CorruptDataError(
                f"{self.store.name}/{entry['key']}: the table is not the one that was committed; restore it from a copy"
            )
        return data
