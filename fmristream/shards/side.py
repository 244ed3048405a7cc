"""What is stored beside the voxels of a run: parcel series, sketch, confounds, events, recordings; written and read.

Each is a row of the arrays table of its own, so that `verify`, `gc` and `withdraw` know it as they know the voxels.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run, StoredArray, StoredFile
from fmristream.catalog.tables import Columns, decode_columns, encode_columns
from fmristream.errors import CorruptDataError, UsageError
from fmristream.shards import codec
from fmristream.shards.hashing import bulk_hexdigest
from fmristream.shards.parcels import KIND, ParcelSpace, array_name, read_parcels, robust_name
from fmristream.shards.run_reader import RunReader
from fmristream.storage import Store

if TYPE_CHECKING:
    from fmristream.shards.dataset import Dataset

TABLE_ENCODING = "table"
SKETCH = "sketch"
CONFOUNDS = "confounds"
EVENTS = "events"
# Folder of the objects of each kind; names of recordings begin with theirs.
_RECORDINGS = ("physio", "stim", "eyetrack", "eeg", "recording")
FOLDERS = {SKETCH: "sketches", CONFOUNDS: "confounds", EVENTS: "events", **dict.fromkeys(_RECORDINGS, "recordings")}
SIDE_FOLDERS = tuple(sorted(set(FOLDERS.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns of equal length, and numbers about all of them.

    Attributes:
        columns: name to values: numbers with NaN, or text with None, where nothing is known.
        facts: of recordings `sampling_hz` and `start_s`, the time of the first row relative to the first frame; none where
            a recording has a row a frame.
    """

    columns: Columns
    facts: Mapping[str, float]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.columns.values()), ()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parcels:
    """Parcel time series of a run.

    Attributes:
        values: (t, p) float32, scaled: the weighted mean of each parcel's stored voxels; NaN where it has none.
        median: (p,) over time, scaled.
        iqr: (p,) interquartile range over time, scaled.
        labels: (p,) numbers of the parcels in the atlas.
        names: of the parcels, "" where none is known.
        coverage: (p,) share of each parcel that lies in stored voxels, 0 to 1.
        atlas: hex digest of the atlas.
    """

    values: NDArray[np.float32]
    median: NDArray[np.float32]
    iqr: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    coverage: NDArray[np.float32]
    atlas: str


class SideWriter:
    """Writes these for one run; leaving the block by an exception removes what was written.

    Args:
        store: the dataset.
        group: key of the run's Zarr group.
        space_digest: of the run's voxels.
        bulk_digest: which digest the objects get.
    """

    def __init__(self, store: Store, group: str, space_digest: str, *, bulk_digest: str) -> None:
        self._store, self._group, self._space_digest = store, group, space_digest
        self._bulk_digest = bulk_digest
        self._keys: list[str] = []
        self.arrays: list[StoredArray] = []

    def put_parcels(self, space: ParcelSpace, series: NDArray[np.float32], robust: NDArray[np.float32]) -> None:
        """Store (t, p) series and their (2, p) medians and interquartile ranges, in stored units."""
        self._put_array(array_name(space.atlas), series, names=("time", "parcel"), space_digest=space.digest)
        self._put_array(robust_name(space.atlas), robust, names=("statistic", "parcel"), space_digest=space.digest)

    def put_sketch(self, data: bytes) -> None:
        """Store the run's sketch."""
        self._put_object(SKETCH, FOLDERS[SKETCH], data, encoding="blob", shape=(len(data),))

    def put_table(self, name: str, table: Table) -> None:
        """Store confounds, events or a recording; their kind begins the name."""
        data = encode_columns(table.columns, table.facts)
        shape = (table.rows, len(table.columns))
        self._put_object(name, FOLDERS[name.partition("-")[0]], data, encoding=TABLE_ENCODING, shape=shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            for key in self._keys:
                self._store.delete(key)

    def _put_object(self, name: str, folder: str, data: bytes, *, encoding: str, shape: tuple[int, ...]) -> None:
        key = f"{folder}/{secrets.token_hex(12)}"
        file = self._put(key, "", data)
        self.arrays.append(
            StoredArray(
                name=name, object=key, space_digest=self._space_digest, dtype="|u1", encoding=encoding, shape=shape,
                files=(file,),
            )
        )  # fmt: skip

    def _put_array(self, name: str, values: NDArray[Any], *, names: tuple[str, ...], space_digest: str) -> None:
        from fmristream.shards.zarr_metadata import plain_metadata

        chunk = np.full(
            (len(values), codec.padded_length(values.shape[1])), codec.fill_value(values.dtype), dtype=values.dtype
        )
        chunk[:, : values.shape[1]] = values
        folder = f"{self._group}/{name}"
        metadata = plain_metadata(shape=values.shape, chunks=chunk.shape, dtype=values.dtype.str, names=names)
        files = (
            self._put(f"{folder}/c/0/0", "c/0/0", codec.encode(chunk)),
            self._put(f"{folder}/zarr.json", "zarr.json", metadata),
        )
        self.arrays.append(
            StoredArray(
                name=name, object=folder, space_digest=space_digest, dtype=values.dtype.str, encoding="direct",
                shape=values.shape, files=files,
            )
        )  # fmt: skip

    def _put(self, key: str, name: str, data: bytes) -> StoredFile:
        self._store.put_new(key, data)
        self._keys.append(key)
        return StoredFile(name=name, bytes=len(data), digest=bulk_hexdigest(data, self._bulk_digest))


def parcel_spaces_of(dataset: "Dataset", reader: RunReader) -> dict[str, str]:
    """(name of the series' array -> digest of its space) of a run."""
    spaces = dataset.generation.document["spaces"]
    found = {}
    for array in reader.arrays.values():
        document = spaces.get(array.space_digest, {})
        if document.get("kind") == KIND and array.name == array_name(str(document["atlas"])):
            found[array.name] = array.space_digest
    return found


def read_parcel_space(dataset: "Dataset", digest: str) -> ParcelSpace:
    """A space of parcels that the dataset's generation names."""
    return read_parcels(dataset.store, digest=digest, document=dataset.generation.document["spaces"][digest])


def read_parcels_of(dataset: "Dataset", run: Run, atlas: str | None) -> Parcels:
    """Parcel series of a run; see `Dataset.parcels`."""
    reader = dataset.reader(run)
    spaces = parcel_spaces_of(dataset, reader)
    wanted = {name: digest for name, digest in spaces.items() if atlas is None or _is_of(dataset, digest, atlas)}
    if len(wanted) != 1:
        known = ", ".join(str(_document(dataset, digest)["atlas"])[:12] for digest in spaces.values()) or "none"
        asked = "no atlas was named" if atlas is None else f"atlas {atlas} was asked for"
        raise UsageError(
            f"{dataset.store.name}: run {run.name}: {asked}, it has parcels of: {known}; "
            "give the first digits of one's digest, or convert with --atlas"
        )
    ((name, digest),) = wanted.items()
    space = read_parcel_space(dataset, digest)
    series = read_small_array(reader, name).astype(np.float64) * run.slope + run.inter
    robust = read_small_array(reader, robust_name(space.atlas)).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite
        median, iqr = (robust[0] * run.slope + run.inter).astype(np.float32), (robust[1] * abs(run.slope)).astype("<f4")
        values = series.astype(np.float32)
    return Parcels(
        values=values,
        median=median,
        iqr=iqr,
        labels=space.labels,
        names=space.names,
        coverage=space.weights.coverage,
        atlas=space.atlas,
    )


def read_small_array(reader: RunReader, name: str) -> NDArray[Any]:
    """An array of a run that is one chunk of two axes."""
    array = reader.arrays[name]
    rows, columns = array.shape
    if rows < 0 or columns < 1 or rows * codec.padded_length(columns) * np.dtype(array.dtype).itemsize >= 2**31:
        raise CorruptDataError(f"{reader.store.name}/{array.object}: the arrays table says shape {array.shape}")
    padded = np.empty((rows, codec.padded_length(columns)), dtype=array.dtype)
    codec.decode_into(read_whole(reader, array, "c/0/0"), padded, what=f"{reader.store.name}/{array.object}/c/0/0")
    return np.ascontiguousarray(padded[:, :columns])


def read_table(reader: RunReader, name: str) -> Table | None:
    """Confounds, events or a recording of a run, if it has them.

    Raises:
        CorruptDataError: it is not what was committed.
    """
    array = reader.arrays.get(name)
    if array is None or array.encoding != TABLE_ENCODING:
        return None
    columns, facts = decode_columns(read_whole(reader, array, ""))
    return Table(columns=columns, facts=facts)


def read_sketch(reader: RunReader) -> bytes | None:
    """The sketch of a run, if it has one."""
    array = reader.arrays.get(SKETCH)
    return None if array is None else read_whole(reader, array, "")


def read_whole(reader: RunReader, array: StoredArray, name: str) -> bytes:
    """An object of a run, checked to be the one that was committed."""
    key = f"{array.object}/{name}" if name else array.object
    data = reader.store.read(key)
    found = bulk_hexdigest(data, reader.bulk_digest)
    if not any(file.name == name and found.startswith(file.digest) for file in array.files):
        raise CorruptDataError(
            f"{reader.store.name}/{key}: not the object that was committed for {reader.run.name}; restore it from a copy"
        )
    return data


def recordings_of(reader: RunReader) -> Sequence[str]:
    """Names of the recordings that a run has."""
    return [
        name
        for name, array in reader.arrays.items()
        if array.encoding == TABLE_ENCODING and name not in (CONFOUNDS, EVENTS)
    ]


def _document(dataset: "Dataset", digest: str) -> Mapping[str, Any]:
    document: Mapping[str, Any] = dataset.generation.document["spaces"][digest]
    return document


def _is_of(dataset: "Dataset", digest: str, atlas: str) -> bool:
    return len(atlas) >= 8 and str(_document(dataset, digest)["atlas"]).startswith(atlas.lower())
