"""Compare a dataset with the files that it was made of, value by value, through a reader that shares no code with ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError, SourceError
from fmristream.ingest.nibabel_reader import SourceImage, open_with_nibabel
from fmristream.ingest.sources import Listing, SourceRun
from fmristream.report.blocks import frame_blocks
from fmristream.report.findings import Findings, first_few
from fmristream.report.threads import Counter, in_threads
from fmristream.shards.dataset import Dataset


def compare_with_sources(dataset: Dataset, listing: Listing, counter: Counter) -> Findings:
    """Compare every run with its source of the same name; counts frames."""
    found = Findings()
    sources = {source.name: source for source in listing.runs}
    _match(dataset, sources, found)
    wanted = [run for run in dataset.runs if run.name in sources]
    for result in in_threads(lambda run: compare_run(dataset, run, sources[run.name], counter), wanted, counter):
        found.merge(result)
    if found.voxels_compared == 0:
        found.fault("not one voxel was compared with the source")
    return found


def compare_run(dataset: Dataset, run: Run, source: SourceRun, counter: Counter) -> Findings:
    """Compare one run; memory is a few frames."""
    found = Findings()
    try:
        with open_with_nibabel(source) as image:
            _compare_header(run, image, found)
            if found.faults:
                return found
            _compare_frames(dataset, run, image, found, counter)
            _compare_prefix(dataset, run, image, found)
            found.runs_compared = 1
    except (SourceError, CorruptDataError, ObjectMissingError, FormatError) as error:
        found.fault(str(error), run=run.name)
    return found


def _match(dataset: Dataset, sources: Mapping[str, SourceRun], found: Findings) -> None:
    present = {run.name for run in dataset.runs}
    skipped = {name for name, _ in dataset.skipped}
    for run in dataset.runs:
        if run.name not in sources:
            found.fault("the source has no run of this name", run=run.name)
    extra = [s.name for s in sources.values() if s.name not in present and not {s.name, s.key} & skipped]
    if extra:
        found.fault(
            f"{len(extra)} runs of the source are neither in the dataset nor recorded as skipped: {first_few(extra)}"
        )


def _compare_header(run: Run, image: SourceImage, found: Findings) -> None:
    stored = {
        "shape": (*run.shape, run.frames),
        "dtype": run.dtype,
        "slope": run.slope,
        "inter": run.inter,
        "affine": tuple(run.affine),
    }
    original = {
        "shape": image.shape,
        "dtype": image.dtype.str,
        "slope": image.slope,
        "inter": image.inter,
        "affine": tuple(number for row in image.affine for number in row),
    }
    for name, value in stored.items():
        if value != original[name]:
            found.fault(f"{name} is {value}, the source has {original[name]}", run=run.name)


def _compare_prefix(dataset: Dataset, run: Run, image: SourceImage, found: Findings) -> None:
    """Header and extensions, byte for byte, where the dataset says that it keeps them."""
    reader = dataset.reader(run)
    stored = reader.nifti_prefix
    if stored is None or not image.prefix or reader.attributes.get("nifti", {}).get("headers") != "keep":
        return
    if stored != image.prefix:
        same = next((i for i, (one, other) in enumerate(zip(stored, image.prefix, strict=False)) if one != other), None)
        place = f"from byte {same} on" if same is not None else f"{len(stored)} bytes, {len(image.prefix)} there"
        found.fault(f"the stored NIfTI header is not that of the source: {place}", run=run.name)


@dataclass(slots=True)
class _Differences:
    """How many values differ, and the first of them."""

    what: str
    count: int = 0
    first: str = ""

    def add(self, differs: NDArray[np.bool_], *, frame: int, ours: NDArray[Any], source: NDArray[Any]) -> None:
        count = int(np.count_nonzero(differs))
        if count and not self.count:
            voxel = int(np.argmax(differs))
            self.first = f"frame {frame}, stored voxel {voxel}: {ours[voxel]}, in the source {source[voxel]}"
        self.count += count

    def note(self, run: Run, found: Findings) -> None:
        if self.count:
            found.fault(f"{self.count} {self.what} values differ from the source; {self.first}", run=run.name)


def _compare_frames(dataset: Dataset, run: Run, image: SourceImage, found: Findings, counter: Counter) -> None:
    mask = dataset.space(run).mask
    positions = np.ravel_multi_index(np.nonzero(mask), mask.shape, order="F")  # nibabel's frames are Fortran-ordered
    stored, scaled = _Differences("stored"), _Differences("scaled")
    for start, stop in frame_blocks(run):
        ours = dataset.reader(run).read_stored(start, stop)
        ours_scaled = dataset.read(run, start, stop, packed=True)
        if start == 0:
            _compare_placement(dataset.read(run, 0, 1)[0], mask, ours_scaled[0], run, found)
        # The block first: zip asks for a frame before it sees that nobody wants it.
        for frame, volume in zip(range(start, stop), image.frames, strict=False):
            values = volume.ravel(order="F")[positions]
            row = frame - start
            differs = differing_bits(ours[row], values)
            stored.add(differs, frame=frame, ours=ours[row], source=values)
            # A value that differs as stored differs scaled as well: that is one fault, not two.
            expected = image.scaled(values)
            wrong = beyond_rounding(ours_scaled[row], expected) & ~differs
            scaled.add(wrong, frame=frame, ours=ours_scaled[row], source=expected)
            found.frames_compared += 1
            found.voxels_compared += len(values)
        counter.add(stop - start)
    stored.note(run, found)
    scaled.note(run, found)
    if found.frames_compared != run.frames:
        found.fault(f"{found.frames_compared} of {run.frames} frames could be compared", run=run.name)


def _compare_placement(
    volume: NDArray[Any], mask: NDArray[np.bool_], packed: NDArray[Any], run: Run, found: Findings
) -> None:
    """A volume holds the packed values where the mask is, and 0 elsewhere."""
    if volume[mask].tobytes() != packed.tobytes() or volume[~mask].any():
        found.fault("volumes and packed values of the read API differ", run=run.name)


def differing_bits(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Where two arrays of one dtype differ in any bit, so that one NaN is not another."""
    bits = np.dtype(f"<u{one.dtype.itemsize}")
    return np.asarray(np.ascontiguousarray(one).view(bits) != np.ascontiguousarray(other).view(bits))


def beyond_rounding(ours: NDArray[np.float32], expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a float32 is further from the exact value than one step of float32."""
    with np.errstate(all="ignore"):
        nearest = expected.astype(np.float32)
        same = (ours == nearest) | (np.isnan(ours) & np.isnan(nearest))
        return np.asarray(~(same | (np.abs(ours - nearest) <= np.spacing(np.abs(nearest)))))
