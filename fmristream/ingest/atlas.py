"""Atlases given to a conversion: read once, checked, put on the voxels of every space that runs are stored in."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import UNALIGNED
from fmristream.errors import ObjectMissingError, SourceError, StorageError, UsageError
from fmristream.ingest.cifti import CiftiStream
from fmristream.ingest.nifti import NiftiStream, open_nifti
from fmristream.ingest.sources.texts import read_text
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.digest import sha256, sha256_json
from fmristream.shards.parcels import ParcelSpace, array_name
from fmristream.shards.spaces import AnySpace, Space
from fmristream.signal.grid import Grid
from fmristream.signal.parcellate import LOW_COVERAGE, Atlas, atlas_of_labels, atlas_of_maps, weights_on
from fmristream.storage.urls import display_url

# Scaling in the header may leave labels beside whole numbers by as much as float32 rounds them.
_WHOLE = 1e-4
_MAX_LABEL = 2**31
_NAME_LETTERS = 200
_LUT_LINE = re.compile(r"\s*(\d+)\s+(\S+)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenAtlas:
    """An atlas, what its parcels are called, and its file for messages."""

    atlas: Atlas
    names: tuple[str, ...]
    file: str
    digest: str


@dataclass(slots=True, kw_only=True)
class ParcelPlan:
    """Which parcels are computed of each run."""

    spaces: dict[str, ParcelSpace] = field(default_factory=dict)  # by digest
    of_space: dict[str, tuple[str, ...]] = field(default_factory=dict)  # space digest -> digests of parcels on it
    without: frozenset[str] = frozenset()  # source keys of runs that get none
    warnings: list[str] = field(default_factory=list)

    def of_run(self, run: SurveyedRun, space_digest: str) -> tuple[str, ...]:
        """Digests of the parcels of a run that is stored in this space."""
        return () if run.source.key in self.without else self.of_space.get(space_digest, ())


def read_atlases(paths: Sequence[str]) -> list[GivenAtlas]:
    """The atlases in the order given.

    Raises:
        UsageError: one cannot be read, is no atlas, or is given twice.
    """
    found: list[GivenAtlas] = []
    for path in paths:
        try:
            atlas = read_atlas(path)
        except (SourceError, StorageError) as error:
            raise UsageError(f"--atlas {display_url(path)}: {error}") from error
        if any(array_name(other.digest) == array_name(atlas.digest) for other in found):
            raise UsageError(f"--atlas {display_url(path)}: is given twice; leave one out")
        found.append(atlas)
    return found


def read_atlas(path: str) -> GivenAtlas:
    """A label image (3-D, whole numbers, 0 = background) or probabilistic maps (4-D), and the names beside it.

    Names are taken from a file of the same name with `.tsv` or `.csv` (columns index, name) or `.txt` (a FreeSurfer
    colour table) in place of the suffix.

    Raises:
        SourceError: it is neither, and why.
        StorageError: it cannot be read.
    """
    name = display_url(path).rstrip("/").rpartition("/")[2]
    with _opened(path, name) as stream:
        header = stream.header
        grid = Grid(shape=header.shape, affine=tuple(float(number) for row in header.affine for number in row))
        if not abs(np.linalg.det(grid.matrix()[:3, :3])) > 0:
            raise SourceError(f"{name}: its affine cannot be inverted; write a valid one into the header")
        volumes = (_scaled(frame, header.slope, header.inter) for frame in stream.frames())
        if header.frames == 1:
            (volume,) = volumes  # all of it, so that the end of the file is checked
            atlas = atlas_of_labels(_labels(volume, name), grid)
        else:
            atlas = atlas_of_maps((_map(volume, name) for volume in volumes), grid)
    if not len(atlas.positions):
        raise SourceError(f"{name}: holds no parcel, all its voxels are background")
    return GivenAtlas(atlas=atlas, names=_names(path, atlas), file=name, digest=_digest(atlas))


def atlas_record(atlases: Sequence[GivenAtlas]) -> dict[str, dict[str, Any]]:
    """What a generation records of its atlases, by digest: no path."""
    return {
        one.digest: {
            "kind": one.atlas.kind,
            "names_sha256": sha256_json(list(one.names)),
            "parcels": len(one.atlas.labels),
        }
        for one in sorted(atlases, key=lambda one: one.digest)
    }


def plan_parcels(
    atlases: Sequence[GivenAtlas],
    runs: Sequence[SurveyedRun],
    spaces: Mapping[str, AnySpace],
    of_run: Mapping[str, str],
) -> ParcelPlan:
    """Put every atlas on the voxels of every space.

    Args:
        atlases: in any order.
        runs: that will be converted.
        spaces: by digest.
        of_run: source key -> digest of the space that the run is stored in.

    Raises:
        UsageError: an atlas has no voxel in common with the stored voxels of a space, or no run can be parcellated.
    """
    plan = ParcelPlan()
    if not atlases:
        return plan
    wanted = [run for run in runs if run.source.key in of_run]
    unaligned = [run for run in wanted if run.space in UNALIGNED]
    plan.without = frozenset(run.source.key for run in unaligned)
    if unaligned:
        labels = ", ".join(sorted({run.space or "unknown" for run in unaligned}))
        text = (
            f"no parcels of {len(unaligned)} runs in space {labels}, where an atlas does not fit every subject; give "
            "--space NAME if you know that all runs are in the atlas's space"
        )
        if len(unaligned) == len(wanted):
            raise UsageError(f"--atlas: {text}")
        plan.warnings.append(text)
    used = {of_run[run.source.key] for run in wanted if run.source.key not in plan.without}
    grids = {digest: space for digest in sorted(used) if isinstance(space := spaces[digest], Space)}
    if len(grids) < len(used):
        text = "no parcels of runs of grayordinates: an atlas of voxels says nothing about vertices"
        if not grids:
            raise UsageError(f"--atlas: {text}")
        plan.warnings.append(text)
    for digest, space in grids.items():
        members = [_on(one, space, digest) for one in atlases]
        plan.warnings += [text for one, made in zip(atlases, members, strict=True) for text in _notes(one, made)]
        plan.spaces.update({made.digest: made for made in members})
        plan.of_space[digest] = tuple(made.digest for made in members)
    return plan


def _on(given: GivenAtlas, space: Space, digest: str) -> ParcelSpace:
    weights = weights_on(given.atlas, space.grid, space.mask)
    if not len(weights.voxels):
        shape = " x ".join(str(size) for size in space.grid.shape)
        raise UsageError(
            f"--atlas {given.file}: none of its parcels lies within the stored voxels of the runs on the grid {shape} "
            f"(space {digest[:12]}); give an atlas in the space of the runs"
        )
    return ParcelSpace(
        atlas=given.digest,
        atlas_kind=given.atlas.kind,
        of=digest,
        labels=given.atlas.labels,
        names=given.names,
        weights=weights,
    )


def _notes(given: GivenAtlas, made: ParcelSpace) -> Iterator[str]:
    low = int((made.weights.coverage < LOW_COVERAGE).sum())
    if low:
        yield (
            f"atlas {given.file}: {low} of {made.weights.parcels} parcels have less than {LOW_COVERAGE:.0%} of themselves "
            f"within the stored voxels of space {made.of[:12]}, {made.weights.empty} have none there (NaN)"
        )


def _opened(path: str, name: str) -> NiftiStream:
    try:
        return _of_voxels(open_nifti(path, name=name), name)
    except SourceError as error:
        try:
            return _of_voxels(open_nifti(path, name=name, is_mask=True), name)
        except SourceError as other:
            is_other_kind = "not a mask" in str(other)
            raise SourceError(
                f"{name}: an atlas has 3 dimensions (labels) or 4 (a map for each parcel)"
                if is_other_kind
                else str(other)
            ) from error
    except ObjectMissingError as error:
        raise SourceError(f"{name}: the file is not there; give a NIfTI image") from error


def _of_voxels(stream: NiftiStream | CiftiStream, name: str) -> NiftiStream:
    if isinstance(stream, NiftiStream):
        return stream
    stream.__exit__(None, None, None)
    raise SourceError(f"{name}: holds grayordinates (CIFTI-2); give an atlas of voxels, a NIfTI image")


def _scaled(stored: NDArray[Any], slope: float, inter: float) -> NDArray[np.float64]:
    return np.asarray(stored.astype(np.float64) * slope + inter)


def _labels(volume: NDArray[np.float64], name: str) -> NDArray[np.int64]:
    whole = np.rint(np.where(np.isfinite(volume), volume, 0))
    if (np.abs(np.where(np.isfinite(volume), volume, 0) - whole) > _WHOLE).any():
        raise SourceError(
            f"{name}: a 3-D image whose values are not whole numbers, so no labels; an atlas of probabilities is 4-D, with a "
            "map for each parcel"
        )
    if whole.min() < 0 or whole.max() >= _MAX_LABEL:
        raise SourceError(f"{name}: has labels from {whole.min():g} to {whole.max():g}; expected 0 (background) and up")
    return whole.astype(np.int64)


def _map(volume: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    finite = np.where(np.isfinite(volume), volume, 0)
    if finite.min() < 0:
        raise SourceError(f"{name}: a map holds {finite.min():g}; weights of parcels are 0 or above")
    return finite


def _digest(atlas: Atlas) -> str:
    """Of what the atlas says, whatever file says it."""
    arrays = (
        atlas.labels.astype("<i8"),
        atlas.indptr.astype("<i8"),
        atlas.positions.astype("<i8"),
        atlas.weights.astype("<f4"),
    )
    return sha256_json(
        {
            "affine": [float(number) for number in atlas.grid.affine],
            "kind": atlas.kind,
            "sha256": [sha256(values.tobytes()) for values in arrays],
            "shape": list(atlas.grid.shape),
        }
    )


def _names(path: str, atlas: Atlas) -> tuple[str, ...]:
    """What the file beside the atlas calls its parcels; "" where there is none or it does not say.

    Raises:
        SourceError: its names are those of other parcels.
    """
    root, _, file = path.rpartition("/")
    stem = re.sub(r"\.nii(\.gz)?$", "", file, flags=re.IGNORECASE)
    for table in (stem + suffix for suffix in (".tsv", ".csv", ".txt")):
        try:
            text = read_text(root or ("/" if path.startswith("/") else "."), table)
        except SourceError:
            continue
        named = (
            _colour_table(text)
            if table.endswith(".txt")
            else _index_table(text, "\t" if table.endswith(".tsv") else ",")
        )
        names = tuple(named.get(int(label), "")[:_NAME_LETTERS] for label in atlas.labels)
        if "background" in (name.lower() for name in names):  # seen in tables that were written with one row too many
            raise SourceError(f"{table}: calls a parcel Background, which is label 0; its rows are shifted, mend them")
        return names
    return ("",) * len(atlas.labels)


def _index_table(text: str, delimiter: str) -> dict[int, str]:
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    pairs = [(str(row.get("index") or "").strip(), str(row.get("name") or "").strip()) for row in rows]
    return {int(index): name for index, name in pairs if index.isascii() and index.isdecimal()}


def _colour_table(text: str) -> dict[int, str]:
    found = (_LUT_LINE.match(line) for line in text.splitlines())
    return {int(match.group(1)): match.group(2) for match in found if match}
