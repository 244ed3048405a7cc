"""What a listing of a source holds, and what a file name says: values and text only, no I/O."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fmristream.errors import UsageError

# Longest first, so that `a.nii.gz` loses all of its suffix. `.img` is the second half of `.hdr`.
IMAGING_SUFFIXES = (".nii.gz", ".hdr.gz", ".nii", ".hdr", ".mgz", ".mgh")
_PAIR_SUFFIXES = {".img": ".hdr", ".img.gz": ".hdr.gz"}

# CIFTI-2 files by name; what they are is in their headers.
_CIFTI = re.compile(
    r"\.(?:dconn|dtseries|dscalar|dlabel|dpconn|pconn|pdconn|ptseries|pscalar|plabel|pconnseries|pconnscalar)\.nii(?:\.gz)?$",
    re.IGNORECASE,
)
_DENSE_SERIES = (".dtseries.nii", ".dtseries.nii.gz")
CIFTI_LEFT_OUT = "a CIFTI file beside volumes of runs, which are taken (--cifti takes these instead)"
VOLUME_LEFT_OUT = "volumes beside CIFTI files, which are taken"

_ARCHIVE = re.compile(r"\.(?:zip|tar|tar\.gz|tgz)!$", re.IGNORECASE)
_LABEL = re.compile(r"^([A-Za-z0-9]+)-([A-Za-z0-9+.]+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A table that belongs to a run."""

    name: (
        str  # "confounds", "events", or a kind of recordings, with "-" and the label of the recording where it has one
    )
    url: str  # "" where it cannot be said which file is meant
    reason: str = ""  # why it cannot; without one, several files apply equally
    sidecar_urls: tuple[str, ...] = ()  # nearest first; what is not there says nothing
    columns: tuple[str, ...] = ()  # of a table of numbers between blanks, without a header line


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRun:
    """One file that may be a run, and what its name and its neighbours say about it."""

    key: str  # unique and stable: path relative to the source's root; used only to match runs again
    name: str  # unique in the listing, for people: BIDS stem, or the relative path without the suffix
    url: str
    subject: str
    session: str = ""  # BIDS labels without the prefix, "" where there is none
    task: str = ""
    acq: str = ""
    run: str = ""
    echo: str = ""
    space: str = ""  # declared space; "" = take the header's
    res: str = ""  # these three only tell forms of the same run apart; they are chosen by, not stored
    den: str = ""
    desc: str = ""
    tr_s: float | None = None  # from the sidecar; wins over the header
    mask_url: str | None = None  # the brain mask that belongs to this run
    sidecar_urls: tuple[str, ...] = ()  # BIDS sidecars that apply, nearest first
    side: tuple[SideFile, ...] = ()  # confounds, events, recordings
    group: str = ""  # what a split must not divide, a family or site; "" = the subject alone
    split: str = ""  # train, val or test, where the source itself says so
    called_by: str = "labels"  # or "pseudonyms": then nothing that lies beside the run may name anybody

    @property
    def is_pseudonymous(self) -> bool:
        """Whether subject and group are pseudonyms."""
        return self.called_by == "pseudonyms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A file that looks like a run and is not taken.

    `by_choice` tells a file that is left out because another form of the same run, or another selection, was chosen
    (another space, CIFTI beside volumes, a phase image) from one that is wrong.
    """

    key: str
    reason: str
    by_choice: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Everything that a source offers."""

    kind: str  # "bids", "fmriprep", "folder", "table", "synth", or the name of a collection's description
    root: str
    runs: tuple[SourceRun, ...]  # sorted by key
    participants: tuple[dict[str, str | float | None], ...] = ()  # "subject" without "sub-", then the columns
    skipped: tuple[Skipped, ...] = ()  # sorted by key
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BidsName:
    """A BIDS file name taken apart: `sub-01_task-rest_bold.nii.gz` → {sub: 01, task: rest}, `bold`, `.nii.gz`."""

    entities: dict[str, str]
    suffix: str
    extension: str

    def labels(self) -> dict[str, str]:
        """The labels that a `SourceRun` keeps, by its field names."""
        same = {name: name for name in ("task", "acq", "run", "echo", "res", "den", "desc")}
        fields = {"session": "ses", **same}
        return {field: self.entities.get(entity, "") for field, entity in fields.items()}


def parse_bids_name(path: str) -> BidsName:
    """Take a file name apart; parts that are not `key-label` are left out."""
    file_name = path.rpartition("/")[2]
    stem, dot, extension = file_name.partition(".")
    *pairs, suffix = stem.split("_")
    found = (_LABEL.match(pair) for pair in pairs)
    return BidsName(
        entities={match.group(1): match.group(2) for match in found if match},
        suffix=suffix,
        extension=dot + extension,
    )


def label_of(run: SourceRun) -> str:
    """A BIDS-like name for a run whose file name is none."""
    space = "" if run.space == "native" else run.space
    labels = (run.subject, run.session, run.task, run.acq, run.run, run.echo, space, run.desc)
    names = ("sub", "ses", "task", "acq", "run", "echo", "space", "desc")
    return "_".join(f"{name}-{label}" for name, label in zip(names, labels, strict=True) if label)


def unique_names(runs: Sequence[SourceRun]) -> list[SourceRun]:
    """Runs that share a name get their paths, which differ, as names."""
    times = Counter(run.name for run in runs)
    return [run if times[run.name] == 1 else replace(run, name=without_suffix(run.key)) for run in runs]


def imaging_suffix(path: str) -> str:
    """The imaging suffix that a path ends in, in lower case; "" where it ends in none."""
    lower = path.lower()
    return next((suffix for suffix in IMAGING_SUFFIXES if lower.endswith(suffix)), "")


def is_cifti(path: str) -> bool:
    """Whether a path is named like a CIFTI-2 file of any kind."""
    return _CIFTI.search(path) is not None


def is_dense_series(path: str) -> bool:
    """Whether a path is named like a CIFTI-2 dense time series: a run of grayordinates."""
    return path.lower().endswith(_DENSE_SERIES)


def takes_cifti(
    asked: bool,
    volumes: Sequence[Mapping[str, str]],
    series: Sequence[Mapping[str, str]],
    wanted: Mapping[str, Sequence[str]],
) -> bool:
    """Whether grayordinates are converted of a source, and not volumes; never both.

    Where it is asked for; where there are no volumes; and where a label is wanted that only they have.

    Args:
        asked: by the user, in so many words.
        volumes: labels of the volumes that are there.
        series: labels of the dense series that are there.
        wanted: labels that were asked for, by name.

    Raises:
        UsageError: it is asked for, and there are none.
    """
    if asked and not series:
        raise UsageError("--cifti: there is no CIFTI-2 dense series (.dtseries.nii) among the files; leave --cifti out")
    if asked or not volumes:
        return bool(series)
    for name, labels in wanted.items():
        here, there = ({of.get(name, "") for of in files} for files in (volumes, series))
        if labels and here.isdisjoint(labels) and not there.isdisjoint(labels):
            return True
    return False


def without_suffix(path: str) -> str:
    """The path without its imaging suffix."""
    return path[: len(path) - len(imaging_suffix(path))]


def without_archive_suffix(folder: str) -> str:
    """`site1` for `site1.tar.gz!`, an archive as a folder; any other name as it is."""
    return _ARCHIVE.sub("", folder)


def header_of_pair(path: str) -> str:
    """The `.hdr` that an `.img` belongs to; "" for any other file."""
    lower = path.lower()
    for image, header in _PAIR_SUFFIXES.items():
        if lower.endswith(image):
            return path[: len(path) - len(image)] + header
    return ""


def is_hidden(path: str) -> bool:
    """Whether a part of the path starts with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def unreadable_names(paths: list[str]) -> list[str]:
    """Paths that no table can hold, because their bytes are not UTF-8 text."""
    return [path for path in paths if any("\ud800" <= letter <= "\udfff" for letter in path)]


def printable(path: str) -> str:
    """A path as text that can be stored and printed."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
