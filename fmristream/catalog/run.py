"""A run and its arrays, as rows of the dataset's tables."""

from dataclasses import dataclass

import numpy as np

# Labels that name a run within its dataset, in the order in which runs are sorted.
ENTITIES = ("subject", "session", "task", "acq", "run", "echo", "space")
# What of a run enters the content digest: its place in the base order, and where it may be used.
IDENTITY = (*ENTITIES, "digest", "split", "group")

# `space` labels of runs whose voxels do not correspond between subjects.
UNALIGNED = frozenset({"native", "unknown", "T1w", "bold", "func", "individual", "orig", ""})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One 4-D run: who, what, how large, and the statistics of all of it."""

    name: str  # unique in the dataset, for people: the BIDS stem or the path without suffix
    subject: str
    session: str = ""
    task: str = ""
    acq: str = ""
    run: str = ""
    echo: str = ""
    space: str
    split: str = ""  # train, val, test; "" where the dataset was not split
    group: str  # what a split never divides: the subject, unless a family or site was given
    frames: int
    tr_s: float | None  # None where no header or sidecar tells
    shape: tuple[int, int, int]  # the grid, native axes
    voxels: int  # stored voxels: the positions of the space
    space_digest: str
    affine: tuple[float, ...]  # 4x4, row by row, voxel to mm
    dtype: str  # stored dtype, little-endian numpy name such as '<i2'
    slope: float
    inter: float  # value = stored x slope + inter
    digest: str  # run digest: header, space and every stored value
    object: str  # folder of the run's Zarr group; opaque
    objects_digest: str  # sha256 over key, size and digest of every object of the run (`objects_digest`)
    residual_wraps: bool  # some stored value differs from its reference by more than the signed dtype holds
    valid_min: float  # smallest and largest finite stored value
    valid_max: float
    nonfinite: int  # stored values that are NaN or infinite
    foreground_count: int  # finite values that are not exactly 0 when scaled; the statistics below are over these
    foreground_mean: float
    foreground_sd: float  # unbiased
    foreground_min: float
    foreground_max: float
    outside: int  # brain voxels of the run's own mask that the stored mask lacks
    source_bytes: int
    source_crc: str  # checksum of the source, to know it again

    @property
    def sort_key(self) -> tuple[str, ...]:
        """Place in the dataset's base order."""
        return (*(str(getattr(self, entity)) for entity in ENTITIES), self.digest)

    @property
    def identity(self) -> tuple[str, ...]:
        """What of the run enters the content digest."""
        return tuple(str(getattr(self, name)) for name in IDENTITY)

    @property
    def numpy_dtype(self) -> "np.dtype[np.generic]":
        """The stored dtype."""
        return np.dtype(self.dtype)

    @property
    def affine_matrix(self) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
        """(4, 4) float64."""
        return np.array(self.affine, dtype=np.float64).reshape(4, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One object of an array: its name below the array's folder, size and digest.

    The digest is hex: all of it where the object was just written or read, its first 12 digits where it comes from a
    table. Those tell damage and exchange; the run's `objects_digest` covers the whole of each.
    """

    name: str
    bytes: int
    digest: str

    def key_in(self, folder: str) -> str:
        """The object's key, in the array's folder."""
        return f"{folder}/{self.name}" if self.name else folder


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """One array of a run: what it is called, how it is encoded, which objects hold it."""

    name: str  # '' (the group itself), 'residual', 'bold', 'reference', 'moments', 'stats'
    object: str  # folder or object the file names are relative to
    space_digest: str
    dtype: str
    encoding: str  # 'difference', 'direct', 'blob', 'group'
    shape: tuple[int, ...]
    frames_per_shard: int = 0  # 0: not sharded
    index_offset: int = -1  # byte offset of this array's block in the segment's index object
    index_bytes: int = 0
    files: tuple[StoredFile, ...]
