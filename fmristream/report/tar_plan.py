"""Which windows go into which tar shard: decided by the dataset and the options alone, before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fmristream.catalog.split import PARTS
from fmristream.errors import SpaceError, UsageError
from fmristream.report.tar_bytes import BLOCK, MAX_MEMBER_BYTES, npy_header
from fmristream.report.tar_options import SHARD_BYTES, TarOptions
from fmristream.sampling.order import order_key, permute
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import sha256_json
from fmristream.signal.measure import background_value
from fmristream.stream.clips import StreamingDataset

FORMAT = "fmristream-webdataset"
VERSION = 1

# Folder of runs that are in no part of a split.
UNSPLIT = "unsplit"

# A guess at the size of a sample's JSON, with its tar header and padding.
_JSON_BYTES = 3 * BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class TarShard:
    """One tar: samples [first, first + samples) of a part's shuffled order."""

    part: str
    number: int
    first: int
    samples: int

    @property
    def key(self) -> str:
        """Its name in the target."""
        return f"{self.part}/{self.part}-{self.number:06d}.tar"


@dataclass(frozen=True, kw_only=True)
class TarPart:
    """One folder of shards: the windows of one part of the split.

    Attributes:
        name: of the folder.
        clips: its windows in stored order.
        order: key of the permutation that shuffles them.
        samples_per_shard: of every shard but the last.
        sample_bytes: about, in a tar.
    """

    name: str
    clips: StreamingDataset
    order: int
    samples_per_shard: int
    sample_bytes: int

    @property
    def samples(self) -> int:
        """Windows of the part."""
        return len(self.clips)

    @property
    def shards(self) -> Iterator[TarShard]:
        """Its tars."""
        for number, first in enumerate(range(0, self.samples, self.samples_per_shard)):
            samples = min(self.samples_per_shard, self.samples - first)
            yield TarShard(part=self.name, number=number, first=first, samples=samples)

    def windows(self, shard: TarShard) -> list[int]:
        """Window numbers of a shard's samples, in its order."""
        positions = np.arange(shard.first, shard.first + shard.samples, dtype=np.int64)
        numbers: list[int] = permute(positions, size=self.samples, key=self.order).tolist()
        return numbers


@dataclass(frozen=True, kw_only=True)
class TarPlan:
    """All of a conversion to tar shards; `digest` is the same where every byte of every tar is to be."""

    dataset: Dataset
    options: TarOptions
    parts: tuple[TarPart, ...]
    targets: tuple["TargetColumn", ...]
    warnings: tuple[str, ...]

    def part(self, name: str) -> TarPart:
        """The part with this folder."""
        return next(part for part in self.parts if part.name == name)

    @property
    def shards(self) -> list[TarShard]:
        """Every tar."""
        return [shard for part in self.parts for shard in part.shards]

    @cached_property
    def secret(self) -> str:
        """What opaque names are keyed by: known to whoever has the runs, recorded nowhere in the shards."""
        return sha256_json({"opaque": self.dataset.runs.column("digest")})

    @cached_property
    def described(self) -> dict[str, Any]:
        """The options as the index records them: those that decide bytes."""
        options = self.options
        return {
            "arrays": options.arrays,
            "dtype": "stored" if options.is_raw else (options.dtype or "float32"),
            "grid": list(self.parts[0].clips.grid) if options.arrays == "placed" else None,
            "identifiers": "labels" if options.with_subjects else "opaque",
            "normalize": options.normalize,
            "samples_per_shard": {part.name: part.samples_per_shard for part in self.parts},
            "seed": options.seed,
            "stride": self.parts[0].clips.stride,
            "targets": [target.name for target in self.targets],
            "window": options.window,
        }

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides a byte of a tar."""
        labels = [self.dataset.runs.column("name"), [sorted(target.values.items()) for target in self.targets]]
        return sha256_json(
            {
                "content": self.dataset.content_digest,
                "format": [FORMAT, VERSION],
                "labels": sha256_json(labels),
                "options": self.described,
                "parts": {part.name: part.clips.selection_digest for part in self.parts},
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetColumn:
    """A column of the participants table, its cells as they are: numbers, or words."""

    name: str
    values: dict[str, float | str]  # by subject; missing ones are not there


def plan_tars(dataset: Dataset, options: TarOptions) -> TarPlan:
    """Decide everything, read nothing but tables and masks.

    Raises:
        UsageError: an option does not fit the dataset; a part holds no window.
        SpaceError: the runs share no space.
        CorruptDataError: a run cannot be normalised as asked for.
    """
    names = _part_names(dataset, options)
    parts = tuple(_part(dataset, options, split, folder) for split, folder in names.items())
    _require_one_space(dataset, options, parts)
    targets = tuple(_target(dataset, name, options) for name in options.targets)
    return TarPlan(
        dataset=dataset, options=options, parts=parts, targets=targets, warnings=tuple(_warnings(dataset, parts))
    )


def _part_names(dataset: Dataset, options: TarOptions) -> dict[str, str]:
    """Part of the split -> folder, in the order train, val, test, others."""
    present = set(dataset.runs.counts("split"))
    ranked = [*(part for part in PARTS if part in present), *sorted(present - set(PARTS))]
    folders = {split: split or UNSPLIT for split in ranked}
    if options.parts is None:
        return folders
    unknown = sorted(set(options.parts) - set(folders.values()))
    if unknown:
        raise UsageError(
            f"--parts {','.join(options.parts)}: {dataset.store.name} has no part {', '.join(unknown)}; it has "
            f"{', '.join(folders.values())}"
        )
    return {split: folder for split, folder in folders.items() if folder in options.parts}


def _part(dataset: Dataset, options: TarOptions, split: str, folder: str) -> TarPart:
    clips = StreamingDataset(
        dataset,
        window=options.window,
        stride=options.stride,
        split=split,
        normalize="none" if options.is_raw else options.normalize,
        grid=options.grid,
        mix_spaces=options.mix_spaces,
    )
    if not clips.has_grid:
        raise UsageError(
            f"{dataset.store.name}: holds grayordinates (CIFTI-2), of which no tar shards are made; stream them from the dataset"
        )
    if not len(clips):
        raise UsageError(
            f"{dataset.store.name}: no run of part {folder} has {options.window} frames; choose a shorter --window, or the "
            "other parts by --parts"
        )
    _require_fill(clips, options)
    size = _sample_bytes(clips, options)
    return TarPart(
        name=folder,
        clips=clips,
        order=order_key(clips.selection_digest, seed=options.seed, epoch=0),
        samples_per_shard=options.samples_per_shard or max(1, SHARD_BYTES // size),
        sample_bytes=size,
    )


def _require_fill(clips: StreamingDataset, options: TarOptions) -> None:
    """Raise where a run cannot be normalised or placed; found out now, not after hours."""
    for run in clips.runs:
        if not options.is_raw:
            clips.fill(run)
        elif options.arrays == "placed" and not background_value(run.numpy_dtype, run.slope, run.inter)[1]:
            raise UsageError(
                f"run {run.name}: no stored value means 0 (slope {run.slope}, intercept {run.inter}), so nothing can stand "
                "outside the mask of placed raw arrays; use --arrays packed, or --normalize none"
            )


def _sample_bytes(clips: StreamingDataset, options: TarOptions) -> int:
    """About what a sample takes in a tar; the widest dtype counts.

    Raises:
        UsageError: a tar cannot hold an array of that size.
    """
    values = clips.window * (clips.voxels if options.arrays == "packed" else int(np.prod(clips.grid)))
    dtype = np.dtype(options.dtype or "float32")
    if options.is_raw:
        dtype = max((np.dtype(name) for name in clips.runs.counts("dtype")), key=lambda each: each.itemsize)
    size = len(npy_header(dtype, (values,))) + values * dtype.itemsize
    if size > MAX_MEMBER_BYTES:
        raise UsageError(f"--window {options.window}: a sample would take {size} bytes, a tar holds 8 GiB at most")
    return BLOCK + -(-size // BLOCK) * BLOCK + _JSON_BYTES


def _require_one_space(dataset: Dataset, options: TarOptions, parts: tuple[TarPart, ...]) -> None:
    """What each part was asked for itself, over all of them."""
    first = [part.clips.runs[0] for part in parts]
    if len({run.space_digest for run in first}) > 1:
        raise SpaceError(
            f"{dataset.store.name}: the parts lie on different grids or masks; convert them with one --mask, or write one "
            "part at a time (--parts)"
        )
    if len({run.space for run in first}) > 1 and not options.mix_spaces:
        raise SpaceError(
            f"{dataset.store.name}: the parts lie in different spaces; write one part at a time (--parts), or --mix-spaces"
        )


def _target(dataset: Dataset, name: str, options: TarOptions) -> TargetColumn:
    columns = sorted({column for row in dataset.participants for column in row} - {"subject"})
    if name not in columns:
        shown = ", ".join(columns) or "none: the source had no participants table"
        raise UsageError(f"--targets {name}: no such column in the participants table; it has {shown}")
    values = {str(row["subject"]): row[name] for row in dataset.participants if row.get(name) is not None}
    kept = {subject: value for subject, value in values.items() if value is not None and value == value}
    if not options.with_subjects and _names_subjects(kept):
        raise UsageError(
            f"--targets {name}: the column repeats subject labels, which are left out of shards unless --with-subjects is "
            "given"
        )
    return TargetColumn(name=name, values=kept)


def _names_subjects(values: dict[str, float | str]) -> bool:
    """Whether a column repeats the labels of its subjects, as numbers perhaps, or hides them in longer words."""
    if any(len(subject) >= 4 and isinstance(value, str) and subject in value for subject, value in values.items()):
        return True
    equal = sum(_is_label(value, subject) for subject, value in values.items())
    return 2 * equal > len(values)  # subject 30 may be 30 years old


def _is_label(value: float | str, subject: str) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("sub-") == subject
    return subject.isdecimal() and float(subject) == value


def _warnings(dataset: Dataset, parts: tuple[TarPart, ...]) -> Iterator[str]:
    for part in parts:
        short = int((part.clips.runs.numbers("frames") < part.clips.window).sum())
        if short:
            yield f"{part.name}: {short} runs are shorter than a window of {part.clips.window} frames and are not in it"
    if dataset.skipped:
        yield f"{len(dataset.skipped)} inputs were not converted into the dataset; `fmristream info` lists them"
