"""What a conversion may be told, and what it tells back."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from fmristream.catalog.split import DEFAULT_RATIOS, checked_ratios
from fmristream.errors import UsageError
from fmristream.ingest.resampling import Resample
from fmristream.ingest.sources import EntityFilter, Phenotypes

MaskKind = Literal["auto", "none", "first", "file"]
UpdateKind = Literal["new", "all"]
Layout = Literal["voxels", "volume"]
HeaderMode = Literal["scrub", "keep"]
Codec = Literal["lossless", "raw", "int16", "int8"]

LAYOUTS = ("voxels", "volume")
HEADER_MODES = ("scrub", "keep")
CODECS = ("lossless", "raw", "int16", "int8")
# Those that give back every stored value: datasets in them are the same dataset.
EXACT_CODECS = ("lossless", "raw")


class FindOptions(TypedDict):
    """The options of `find_runs`, as keywords."""

    space: str | None
    subject_pattern: str | None
    kind: str | None
    entities: EntityFilter
    phenotypes: Phenotypes
    cifti: bool


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
class Shard:
    """One of several tasks that share a conversion: number `index` of `count`, from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `i/n`.

        Raises:
            UsageError: it is not two whole numbers, or not 1 <= i <= n.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(index=int(index), count=int(count))
        raise UsageError(f"--shard {text}: expected i/n with 1 <= i <= n, as in 3/16")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


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
        scheduler: address of a running dask scheduler whose workers do it instead.
        cluster: `slurm`: `workers` jobs do it instead.
        cluster_options: path of a TOML file with the fields of `cluster_options.SlurmJobs`.
        shard: `i/n`: do the i-th of n shares of the runs and commit nothing; see docs/cluster.md.
        threads: of each worker; 2 read and decompress in a thread of its own. None: 2 where this process may use two
            CPUs or more for each worker, else 1. The result does not depend on it.
        space: name of the space that all runs are in, where neither file names nor headers tell.
        subject_pattern: regular expression with a group `subject`, applied to paths of plain folders.
        tr_s: repetition time in seconds, over whatever sidecars and headers say.
        update: what may be done to a dataset that is there: `new` adds runs that it does not hold, `all` also replaces
            those whose source changed; None changes nothing. Tables beside runs are not compared.
        layout: `voxels` (those of the mask, for training), or `volume` (whole frames as OME-Zarr, exported bit for bit).
        header: of layout `volume`, what is stored of NIfTI headers: `scrub` (without free text, unused bytes and
            extensions) or `keep` (every byte, whoever it may name).
        atlases: paths of label or probabilistic images, whose parcel time series are stored beside the voxels.
        side: store confounds, events and recordings that lie beside runs of a BIDS dataset.
        sketch: store a fingerprint of each run, by which copies of it are found.
        codec: `lossless`, `raw` (the same values, uncompressed), `int16` (float sources in steps of 1/256 of each voxel's
            temporal SD; others lossless) or `int8` (no value off by more than .025 temporal SD).
        kind: what the source is, where its layout does not tell; see `find_runs`.
        entities: which runs are wanted, by their labels.
        phenotypes: the table of subjects, and whose groups (families, sites) a split does not divide.
        cifti: convert grayordinates (CIFTI-2 `.dtseries.nii`) where volumes are there as well; where there are none, they
            are converted without asking.
        pseudonyms: path of a file with a key: subjects and groups are called by keyed hashes of their labels.
        resample: another repetition time or grid for all runs; see Resample. A given mask is one of the new grid.
    """

    mask: str = "auto"
    split: str = "auto"
    split_ratios: tuple[float, float, float] = DEFAULT_RATIOS
    split_seed: int = 0
    workers: int = 1
    scheduler: str | None = None
    cluster: Literal["slurm"] | None = None
    cluster_options: str | None = None
    shard: str | None = None
    threads: int | None = None
    space: str | None = None
    subject_pattern: str | None = None
    tr_s: float | None = None
    update: UpdateKind | None = None
    layout: Layout = "voxels"
    header: HeaderMode = "scrub"
    atlases: tuple[str, ...] = ()
    side: bool = True
    sketch: bool = True
    codec: Codec = "lossless"
    kind: str | None = None
    entities: EntityFilter = field(default_factory=EntityFilter)
    phenotypes: Phenotypes = field(default_factory=Phenotypes)
    cifti: bool = False
    pseudonyms: str | None = None
    resample: Resample | None = None

    @property
    def sources(self) -> "FindOptions":
        """What `find_runs` is told."""
        return {
            "space": self.space,
            "subject_pattern": self.subject_pattern,
            "kind": self.kind,
            "entities": self.entities,
            "phenotypes": self.phenotypes,
            "cifti": self.cifti,
        }

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(f"--layout {self.layout}: expected {' or '.join(LAYOUTS)}")
        if self.header not in HEADER_MODES:
            raise UsageError(f"--header {self.header}: expected {' or '.join(HEADER_MODES)}")
        if self.header == "keep":
            self._check_headers()
        if self.codec not in CODECS:
            raise UsageError(f"--codec {self.codec}: expected {', '.join(CODECS)}")
        if self.codec != "lossless" and self.layout == "volume":
            raise UsageError(f"--codec {self.codec}: the layout volume is stored lossless; leave --codec out")
        choice = MaskChoice.parse(self.mask)
        if self.layout == "volume" and choice.kind in ("first", "file"):
            raise UsageError(f"--mask {self.mask}: the layout volume stores whole volumes; leave --mask out")
        checked_ratios(self.split_ratios)
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: expected 1 or more")
        if self.update not in (None, "new", "all"):
            raise UsageError(f"--update {self.update}: expected new or all")
        self._check_engine()
        if self.threads not in (None, 1, 2):
            raise UsageError(
                f"--threads {self.threads}: expected 1 or 2 for each worker; more runs at a time: --workers"
            )
        if self.tr_s is not None and not 0 < self.tr_s < float("inf"):
            raise UsageError(f"--tr {self.tr_s}: expected seconds above 0")

    @property
    def mask_choice(self) -> MaskChoice:
        """Which voxels are stored: all of them where whole volumes are."""
        return MaskChoice(kind="none") if self.layout == "volume" else MaskChoice.parse(self.mask)

    @property
    def parameters(self) -> dict[str, Any]:
        """What of a conversion enters the content digest: codecs only where they change values."""
        return {
            "codec": "lossless" if self.codec in EXACT_CODECS else self.codec,
            "layout": self.layout,
            **({} if self.resample is None else {"resampling": self.resample.record}),
        }

    def _check_headers(self) -> None:
        if self.layout == "voxels":
            raise UsageError("--header keep: the layout voxels stores no headers; add --layout volume")
        if self.pseudonyms is not None:
            raise UsageError("--header keep: original headers may name who --pseudonyms hides; leave one of them out")
        if self.resample is not None:
            raise UsageError("--header keep: a resampled run has another header; leave --header out")

    def _check_engine(self) -> None:
        if self.cluster not in (None, "slurm"):
            raise UsageError(f"--cluster {self.cluster}: expected slurm")
        if self.cluster_options is not None and self.cluster is None:
            raise UsageError("--cluster-options describes jobs; give --cluster slurm with it")
        if self.scheduler is not None and (self.cluster is not None or self.workers != 1):
            raise UsageError("--scheduler uses the workers that it has; leave out --workers and --cluster")
        if self.scheduler is not None and not self.scheduler.startswith(("tcp://", "tls://")):
            raise UsageError(f"--scheduler {self.scheduler}: expected an address as in tcp://host:8786")
        if self.shard is not None:
            Shard.parse(self.shard)
            if self.update is not None:
                raise UsageError("--shard converts into a new dataset; leave --update out, or update without --shard")

    @property
    def needs_shared_target(self) -> bool:
        """Whether other processes write."""
        return self.workers > 1 or self.scheduler is not None or self.cluster is not None or self.shard is not None

    @property
    def threads_per_worker(self) -> int:
        """`threads`, or what suits the CPUs that this process may use; nothing is known of another machine's."""
        if self.threads is not None:
            return self.threads
        if self.scheduler is not None or self.cluster is not None:
            return 1
        return 2 if _usable_cpus() >= 2 * self.workers else 1


def _usable_cpus() -> int:
    """CPUs that the scheduler gives this process: what Slurm, taskset and containers' CPU sets leave of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a conversion is: in runs, and in frames within them where one process does the work."""

    stage: str  # "reading headers", "computing masks", "converting"
    runs_done: int
    runs: int
    frames_done: int
    frames: int
    note: str = ""  # a sentence for people, said once: where the dashboard is


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
    tables_not_compared: bool = (
        False  # it holds tables beside runs, or they lie in the source: those were not looked at
    )
    shard: str = ""  # "3/16": only this share was done, and nothing is committed
    stage: Literal["", "masks", "runs", "committed"] = ""  # how far this shard is
    missing_shards: int = 0  # whose masks are not there yet
    content_digest: str = ""
    generation_digest: str = ""
    runs: int = 0
    resumed: int = 0  # of these, finished by an earlier, interrupted conversion
    added: int = 0  # of these, new in this version
    replaced: int = 0  # of these, converted again because their source changed
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
    headers: str = "none"  # what is stored of NIfTI headers: none, scrub or keep
    headers_removed: dict[str, int] = field(default_factory=dict)  # scrubbed: field -> runs in which it held something
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: everything converted; 3: done, with quarantined inputs."""
        return 3 if self.quarantined else 0
