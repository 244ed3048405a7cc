"""What a dataset holds, from its tables alone: no voxel is read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmristream.catalog.run import Run
from fmristream.catalog.run_table import RunTable
from fmristream.catalog.split import PARTS
from fmristream.report.findings import first_few
from fmristream.report.objects import objects_of_generation
from fmristream.report.orientation import axis_codes, voxel_sizes_mm
from fmristream.shards.dataset import Dataset
from fmristream.shards.notes import (
    ORIGINAL_HEADERS,
    alignment_warnings,
    codec_of,
    copy_warnings,
    has_original_headers,
    headers_of,
    subjects_by_space,
)
from fmristream.storage import display_url


@dataclass(frozen=True, slots=True, kw_only=True)
class GridInfo:
    """One grid with one mask, or one list of grayordinates, and how many runs are stored on it."""

    runs: int
    shape: tuple[int, int, int]
    voxel_size_mm: tuple[float, float, float]
    orientation: str  # where the voxel axes run to, such as LAS
    voxels: int  # stored, of shape's product
    kind: str = "grid"  # or brain-models: grayordinates, whose shape is their number and says nothing of place
    structures: tuple[str, ...] = ()  # of grayordinates, each with how many there are

    @property
    def share(self) -> float:
        """Stored share of the grid."""
        return self.voxels / math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """One part of the split."""

    part: str
    subjects: int
    runs: int
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One run as a row for people."""

    name: str
    subject: str
    session: str
    task: str
    run: str
    space: str
    split: str
    frames: int
    tr_s: float | None
    shape: tuple[int, int, int]
    voxels: int
    dtype: str
    stored_bytes: int
    source_bytes: int
    mean: float | None  # of the foreground, in scaled units; None where there is none
    sd: float | None
    nonfinite: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """One version of a dataset in numbers."""

    url: str
    generation: int
    generation_digest: str
    content_digest: str
    format_version: int
    tool: str
    pseudonyms: bool  # subjects and groups are called by keyed hashes of their labels
    layout: str
    codec: str
    contents: Mapping[str, Any]  # what is stored beside the voxels, as the generation records it
    lossy: Mapping[str, float]  # bound_sd, and the largest max_error_sd and rms_error_sd of lossy runs; else empty
    resampling: Mapping[str, Any]  # what all runs were resampled to, see FORMAT.md 19; empty where they were not
    headers: str  # what is stored of NIfTI headers: none, scrub or keep
    runs: int
    subjects: int
    participants: int
    sessions: tuple[str, ...]
    tasks: tuple[str, ...]
    spaces: Mapping[str, int]  # label -> runs
    frames: int
    duration_s: float | None  # None where a run has no TR
    tr_s: tuple[float, ...]  # every one that occurs
    runs_without_tr: int
    grids: tuple[GridInfo, ...]
    dtypes: Mapping[str, int]  # numpy name -> runs
    split: Mapping[str, Any]  # how it was made
    splits: tuple[SplitInfo, ...]
    stored_bytes: int
    decoded_bytes: int  # of the stored voxels, as the source had them
    source_bytes: int
    objects: int
    quarantined: int
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(dataset: Dataset) -> Info:
    """The dataset in numbers.

    Raises:
        CorruptDataError: a table is not what was committed.
    """
    runs, document = dataset.runs, dataset.generation.document
    stored, objects = _stored(dataset)
    frames, dtypes = runs.numbers("frames"), runs.column("dtype")
    frame_bytes = runs.numbers("voxels") * np.array([np.dtype(dtype).itemsize for dtype in dtypes], dtype=np.int64)
    tr_s = runs.numbers("tr_s")
    return Info(
        url=display_url(dataset.url),
        generation=dataset.generation.number,
        generation_digest=dataset.generation_digest,
        content_digest=document["content_digest"],  # `verify` computes it anew
        format_version=document["version"],
        tool=document["tool"],
        pseudonyms="pseudonyms" in document,
        layout=document["parameters"]["layout"],
        codec=codec_of(document),
        contents=document.get("contents", {}),
        lossy={name: value for name, value in document.get("codec", {}).items() if name != "name"},
        resampling=document["parameters"].get("resampling", {}),
        headers=headers_of(document),
        runs=len(runs),
        subjects=runs.distinct("subject"),
        participants=len(dataset.participants),
        sessions=_labels(runs.counts("session")),
        tasks=_labels(runs.counts("task")),
        spaces=runs.counts("space"),
        frames=int(frames.sum()),
        duration_s=None if np.isnan(tr_s).any() else float(tr_s @ frames),
        tr_s=tuple(np.unique(tr_s[~np.isnan(tr_s)]).tolist()),
        runs_without_tr=int(np.isnan(tr_s).sum()),
        grids=_grids(dataset),
        dtypes={np.dtype(dtype).name: count for dtype, count in runs.counts("dtype").items()},
        split=document["split"],
        splits=_splits(runs),
        stored_bytes=stored,
        decoded_bytes=int((frame_bytes * frames).sum()),
        source_bytes=int(runs.numbers("source_bytes").sum()),
        objects=objects,
        quarantined=len(dataset.skipped),
        warnings=(*_warnings(runs), *([ORIGINAL_HEADERS] if has_original_headers(document) else [])),
    )


def describe_runs(dataset: Dataset) -> tuple[RunInfo, ...]:
    """Every run as a row, in base order."""
    return tuple(_row(dataset, run) for run in dataset.runs)


def _row(dataset: Dataset, run: Run) -> RunInfo:
    _, arrays = dataset.arrays_of(run)
    return RunInfo(
        name=run.name,
        subject=run.subject,
        session=run.session,
        task=run.task,
        run=run.run,
        space=run.space,
        split=run.split,
        frames=run.frames,
        tr_s=run.tr_s,
        shape=run.shape,
        voxels=run.voxels,
        dtype=run.numpy_dtype.name,
        stored_bytes=sum(file.bytes for array in arrays.values() for file in array.files),
        source_bytes=run.source_bytes,
        mean=run.foreground_mean if math.isfinite(run.foreground_mean) else None,
        sd=run.foreground_sd if math.isfinite(run.foreground_sd) else None,
        nonfinite=run.nonfinite,
        digest=run.digest,
    )


def _stored(dataset: Dataset) -> tuple[int, int]:
    """(bytes, objects) of everything that the generation names."""
    own = [one.bytes for one in objects_of_generation(dataset.generation)]
    of_runs = [table.stored() for table in dataset.array_tables]
    return sum(own) + sum(size for size, _ in of_runs), len(own) + sum(count for _, count in of_runs)


def _grids(dataset: Dataset) -> tuple[GridInfo, ...]:
    found = []
    for digest, runs in dataset.runs.counts("space_digest").items():
        space = dataset.generation.document["spaces"][digest]
        affine = np.array(space["affine"], dtype=np.float64).reshape(4, 4)
        x, y, z = space["shape"]
        found.append(
            GridInfo(
                kind=space["kind"],
                structures=tuple(
                    f"{model['structure'].removeprefix('CIFTI_STRUCTURE_')} {model['count']} of {model.get('vertices', 'voxels')}"
                    for model in space.get("models", ())
                ),
                runs=runs,
                shape=(x, y, z),
                voxel_size_mm=voxel_sizes_mm(affine),
                orientation=axis_codes(affine),
                voxels=space["voxels"],
            )
        )
    return tuple(found)


def _splits(runs: RunTable) -> tuple[SplitInfo, ...]:
    present = runs.counts("split")
    return tuple(
        SplitInfo(
            part=part,
            subjects=members.distinct("subject"),
            runs=len(members),
            frames=int(members.numbers("frames").sum()),
        )
        for part in (*PARTS, *sorted(set(present) - {*PARTS, ""}))
        if part in present
        for members in [runs.where("split", part)]
    )


def _labels(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(label for label in labels if label))


def _warnings(runs: RunTable) -> tuple[str, ...]:
    warnings = [*alignment_warnings(subjects_by_space(runs)), *copy_warnings(runs)]
    for what, chosen in {
        "have no repetition time": np.isnan(runs.numbers("tr_s")),
        "hold values that are NaN or infinite": runs.numbers("nonfinite") > 0,
        "have no spread, and no global normalisation takes them": ~(runs.numbers("foreground_sd") > 0),
        "have brain voxels outside the stored mask": runs.numbers("outside") > 0,
    }.items():
        if chosen.any():
            names = runs.select(chosen).column("name")
            warnings.append(f"{len(names)} of {len(runs)} runs {what}: {first_few(names)}")
    return tuple(warnings)
