"""How many files and folders a conversion will make, from headers and names alone: what quotas of inodes have to allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmristream.catalog.run import UNALIGNED
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.plan import group_by_grid, volumes_of
from fmristream.ingest.sources import Listing
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.codec import padded_length
from fmristream.shards.frames import SHARD_BYTES
from fmristream.shards.side import FOLDERS
from fmristream.signal.quantize import LOSSY_CODECS, decoded_dtype


@dataclass(frozen=True, slots=True)
class Objects:
    """Files, and the folders that they need beside those of others."""

    files: int
    folders: int

    def __add__(self, other: "Objects") -> "Objects":
        return Objects(self.files + other.files, self.folders + other.folders)

    def times(self, count: int) -> "Objects":
        """So many of these."""
        return Objects(self.files * count, self.folders * count)


# A zarr.json and one chunk in each: of one dimension in name/c, of two in name/c/0.
_SERIES = Objects(2, 2)
_MATRIX = Objects(2, 3)
_FILE = Objects(1, 0)
# Group, moments, statistics beside it; the frames' own zarr.json.
_VOXELS = Objects(1, 1) + _MATRIX + _FILE + Objects(1, 3)
_VOLUME = Objects(1, 1) + _MATRIX + _FILE + Objects(1, 5) + _SERIES  # and the NIfTI header
_SPACE = Objects(3, 5)  # group, mask/zarr.json, mask/c/0/0/0
_MODELS = Objects(3, 4)  # group, indices/zarr.json, indices/c/0/0
_PARCEL_SPACE = Objects(1, 1) + _SERIES.times(5)
_PARCELS = _MATRIX.times(2)  # series; medians and interquartile ranges
# dataset.json, generations/, index/, two of tables/; runs/, spaces/, stats/, tmp/; pending/ with two folders meanwhile.
_ALWAYS = Objects(5, 10)


def count_objects(
    listing: Listing, runs: Sequence[SurveyedRun], options: ConvertOptions, *, is_some_skipped: bool, mask_share: float
) -> Objects:
    """What will be there at most, records of an unfinished conversion included, which go at its end.

    Args:
        listing: of the source.
        runs: whose headers are good.
        options: of the conversion.
        is_some_skipped: whether inputs are quarantined, for which there is a table.
        mask_share: of a grid, stored.
    """
    total = _ALWAYS + _FILE.times(bool(listing.participants)) + _FILE.times(is_some_skipped)
    folders: set[str] = set()
    for run in runs:
        total += _of_run(run, options, mask_share)
        folders.update(_side_folders(run, options))
    volumes = volumes_of(runs)
    models = {run.header.models for run in runs if run.header.models}
    total += _SPACE.times(len(group_by_grid(volumes))) + _MODELS.times(len(models)) + Objects(0, len(folders))
    aligned = [run for run in volumes if run.space not in UNALIGNED]
    return total + _PARCEL_SPACE.times(len(group_by_grid(aligned)) * len(options.atlases))


def _of_run(run: SurveyedRun, options: ConvertOptions, mask_share: float) -> Objects:
    header, source = run.header, run.source
    is_volume = options.layout == "volume"
    lossy = LOSSY_CODECS.get(options.codec)
    is_lossy = lossy is not None and lossy.takes(header.dtype)
    total = (_VOLUME if is_volume else _VOXELS) + _FILE.times(_shards(run, options, mask_share))
    stored = decoded_dtype(header.dtype) if is_lossy else header.dtype
    total += _SERIES.times((stored.kind != "f") + (source.mask_url is not None))  # reference frame, the run's own mask
    total += _MATRIX.times(is_lossy)  # steps and offsets
    total += _FILE.times(len(_tables(run, options)) + (options.sketch and not header.models))
    if not header.models and run.space not in UNALIGNED:
        total += _PARCELS.times(len(options.atlases))
    is_mask_computed = options.mask_choice.kind == "first" or (
        options.mask_choice.kind == "auto" and source.mask_url is None
    )
    return total + _FILE.times(1 + (is_mask_computed and not header.models))  # records


def _shards(run: SurveyedRun, options: ConvertOptions, mask_share: float) -> int:
    header, codec = run.header, LOSSY_CODECS.get(options.codec)
    dtype: np.dtype[Any] = codec.code_dtype if codec is not None and codec.takes(header.dtype) else header.dtype
    share = 1.0 if header.models else mask_share
    frame_bytes = padded_length(max(1, round(share * int(np.prod(header.shape))))) * dtype.itemsize
    return -(-header.frames // max(1, min(header.frames, SHARD_BYTES // frame_bytes)))


def _tables(run: SurveyedRun, options: ConvertOptions) -> list[str]:
    return [file.name for file in run.source.side if file.url] if options.side else []


def _side_folders(run: SurveyedRun, options: ConvertOptions) -> set[str]:
    found = {FOLDERS[name.partition("-")[0]] for name in _tables(run, options)}
    return found | ({FOLDERS["sketch"]} if options.sketch and not run.header.models else set())
