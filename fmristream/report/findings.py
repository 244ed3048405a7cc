"""What a verification found, as values."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that is not as it was committed, or not as the source has it."""

    object: str  # key of the object; "" where the fault is not in one object
    run: str  # name of the run it belongs to; "" where it belongs to the whole dataset
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyProgress:
    """How far a verification is."""

    stage: str  # "checking tables", "checking objects", "checking indexes", "decoding", "comparing with the source"
    done: int
    total: int
    unit: str  # "bytes", "runs" or "frames"


ProgressCallback = Callable[[VerifyProgress], None]


COUNTS = (
    "objects", "bytes", "chunks", "frames_decoded", "frames_cross_read", "runs_compared", "frames_compared",
    "voxels_compared",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Findings:
    """What checks counted and found, added up as they finish."""

    objects: int = 0
    bytes: int = 0
    chunks: int = 0
    frames_decoded: int = 0
    frames_cross_read: int = 0
    runs_compared: int = 0
    frames_compared: int = 0
    voxels_compared: int = 0
    faults: list[Fault] = field(default_factory=list)
    tables_damaged: bool = False

    def merge(self, other: "Findings") -> None:
        """Add what another check found."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults

    def fault(self, what: str, *, run: str = "", key: str = "") -> None:
        """Note a fault; `key` is the object that it is in."""
        self.faults.append(Fault(object=key, run=run, what=what))

    def damaged(self) -> set[str]:
        """Objects that a fault was found in."""
        return {fault.object for fault in self.faults if fault.object}

    def counts(self) -> dict[str, int]:
        """The numbers alone."""
        return {name: getattr(self, name) for name in COUNTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The verdict on a dataset, and what it rests on.

    Attributes:
        objects: objects whose size and digest were checked.
        bytes: their size.
        chunks: chunks whose place in the shard's own index was compared with the dataset's.
        frames_decoded: frames decoded and counted into run digests (`deep`).
        frames_cross_read: of these, read a second time through zarr-python.
        frames_compared: frames of which every stored voxel was compared with the source (`against`).
        voxels_compared: stored values compared, frames times voxels.
    """

    url: str
    content_digest: str
    generation_digest: str
    deep: bool
    against: str
    runs: int
    objects: int
    bytes: int
    chunks: int
    frames_decoded: int
    frames_cross_read: int
    runs_compared: int
    frames_compared: int
    voxels_compared: int
    faults: tuple[Fault, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_sound": self.is_sound}


def first_few(names: Iterable[str], *, shown: int = 3) -> str:
    """`a, b, c and 4 more`."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
