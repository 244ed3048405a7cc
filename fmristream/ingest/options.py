"""What a conversion may be told, and what it tells back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from fmristream.catalog.split import DEFAULT_RATIOS, checked_ratios
from fmristream.errors import UsageError
from fmristream.ingest.sources import EntityFilter, Phenotypes

MaskKind = Literal["auto", "none", "first", "file"]


class FindOptions(TypedDict):
    """The options of `find_runs`, as keywords."""

    space: str | None
    subject_pattern: str | None
    kind: str | None
    entities: EntityFilter
    phenotypes: Phenotypes


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskChoice:
    """Which voxels are stored."""

    kind: MaskKind = "auto"
    path: str = ""  # of a given mask
    frames: int = 0  # averaged for `first:K`

    @classmethod
    def parse(cls, text: str) -> "MaskChoice":
        """Read `auto`, `none`, `first:K` or the path of a mask file.

        Raises:
            UsageError: `first:` without a positive number.
        """
        if text in ("auto", "none"):
            return cls(kind="auto" if text == "auto" else "none")
        if text.startswith("first:"):
            count = text.removeprefix("first:")
            if not count.isdecimal() or int(count) < 1:
                raise UsageError(f"--mask {text}: expected first:K with K >= 1 frames, as in first:16")
            return cls(kind="first", frames=int(count))
        if not text:
            raise UsageError("--mask is empty; give auto, none, first:K or the path of a mask")
        return cls(kind="file", path=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Everything about a conversion but its source and its target.

    Attributes:
        mask: `auto` (the runs' own masks, else computed), `none` (whole volumes), `first:K`, or the path of a mask.
        split: `auto` (what a table of runs says, else hash), `hash`, `exact`, `none`, or the path of a table (columns
            subject, split).
        split_ratios: shares of train, val, test.
        split_seed: another seed, another split.
        workers: runs converted at the same time; 1 stays in this process.
        space: name of the space that all runs are in, where neither file names nor headers tell.
        subject_pattern: regular expression with a group `subject`, applied to paths of plain folders.
        tr_s: repetition time in seconds, over whatever sidecars and headers say.
        kind: what the source is, where its layout does not tell; see `find_runs`.
        entities: which runs are wanted, by their labels.
        phenotypes: the table of subjects, and whose groups (families, sites) a split does not divide.
    """

    mask: str = "auto"
    split: str = "auto"
    split_ratios: tuple[float, float, float] = DEFAULT_RATIOS
    split_seed: int = 0
    workers: int = 1
    space: str | None = None
    subject_pattern: str | None = None
    tr_s: float | None = None
    kind: str | None = None
    entities: EntityFilter = field(default_factory=EntityFilter)
    phenotypes: Phenotypes = field(default_factory=Phenotypes)

    @property
    def sources(self) -> "FindOptions":
        """What `find_runs` is told."""
        return {
            "space": self.space,
            "subject_pattern": self.subject_pattern,
            "kind": self.kind,
            "entities": self.entities,
            "phenotypes": self.phenotypes,
        }

    def __post_init__(self) -> None:
        MaskChoice.parse(self.mask)
        checked_ratios(self.split_ratios)
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: expected 1 or more")
        if self.tr_s is not None and not 0 < self.tr_s < float("inf"):
            raise UsageError(f"--tr {self.tr_s}: expected seconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a conversion is: in runs, and in frames within them where one process does the work."""

    stage: str  # "reading headers", "computing masks", "converting"
    runs_done: int
    runs: int
    frames_done: int
    frames: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """An input that was not converted, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion did, or with `dry_run` would do."""

    url: str
    source_kind: str
    dry_run: bool = False
    already_there: bool = False  # the dataset held exactly this before
    content_digest: str = ""
    generation_digest: str = ""
    runs: int = 0
    resumed: int = 0  # of these, finished by an earlier, interrupted conversion
    subjects: int = 0
    frames: int = 0
    splits: dict[str, int] = field(default_factory=dict)  # subjects per part
    spaces: tuple[str, ...] = ()  # space labels of the runs
    stored_bytes: int = 0  # of all objects; an estimate in a dry run
    source_bytes: int = 0
    objects: int = 0  # files; in a dry run how many there will be
    folders: int = 0
    quarantined: tuple[Quarantined, ...] = ()
    not_chosen: tuple[Quarantined, ...] = ()  # other forms of the same runs, other spaces: left out on purpose
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: everything converted; 3: done, with quarantined inputs."""
        return 3 if self.quarantined else 0
