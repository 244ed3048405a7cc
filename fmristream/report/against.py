"""Compare a dataset with the files that it was made of, value by value, through a reader that shares no code with ours."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError, SourceError
from fmristream.ingest.nibabel_reader import SourceImage, open_with_nibabel
from fmristream.ingest.resampling import Resampling
from fmristream.ingest.sources import Listing, SourceRun
from fmristream.report.blocks import frame_blocks
from fmristream.report.findings import Findings, first_few
from fmristream.report.threads import Counter, in_threads
from fmristream.shards.dataset import Dataset
from fmristream.shards.withdrawn import is_withdrawn

# Two ways to compute an SD differ by rounding.
SD_TOLERANCE = 1e-6


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
        resampling = _resampling(dataset, run)
        with _opened(source, resampling) as image:
            told = dataset.reader(run).attributes.get("quantization") if dataset.reader(run).is_quantized else None
            _compare_header(run, image, found, dtype=run.dtype if told is None else str(told.get("source_dtype")))
            _compare_models(dataset, run, image, found)
            if found.faults:
                return found
            if told is not None:
                with _opened(source, resampling) as again:
                    _compare_bounded(dataset, run, again, image, told, found, counter)
                found.runs_compared = 1
                return found
            _compare_frames(dataset, run, image, found, counter)
            _compare_prefix(dataset, run, image, found)
            found.runs_compared = 1
    except (SourceError, CorruptDataError, ObjectMissingError, FormatError) as error:
        found.fault(str(error), run=run.name)
    return found


def _resampling(dataset: Dataset, run: Run) -> Resampling | None:
    """How the run says that it was resampled, if it was."""
    told = dataset.reader(run).attributes.get("resampled")
    return None if told is None else Resampling.of_record(told, affine=run.affine, shape=run.shape, tr_s=run.tr_s)


@contextmanager
def _opened(source: SourceRun, resampling: Resampling | None) -> Iterator[SourceImage]:
    """The source as nibabel reads it, resampled anew where the run was: reading is checked by other code, weights by ours."""
    with open_with_nibabel(source) as image:
        if resampling is None:
            yield image
            return
        was, header = resampling.source, resampling.header
        found = (image.shape, image.dtype, image.slope, image.inter, image.affine)
        if found != ((*was.shape, was.frames), was.dtype, was.slope, was.inter, was.affine):
            raise SourceError(f"{source.key}: its header is not the one that the run was resampled from")
        yield SourceImage(
            shape=(*header.shape, header.frames),
            dtype=header.dtype,
            slope=header.slope,
            inter=header.inter,
            affine=header.affine,
            # Blocks of frames are compared while others are made.
            frames=(frame.copy(order="F") for frame in resampling.frames(image.frames)),
        )


def _match(dataset: Dataset, sources: Mapping[str, SourceRun], found: Findings) -> None:
    present = {run.name for run in dataset.runs}
    skipped = {name for name, _ in dataset.skipped}
    for run in dataset.runs:
        if run.name not in sources:
            found.fault("the source has no run of this name", run=run.name)
    extra = [
        s.name
        for s in sources.values()
        if s.name not in present
        and not {s.name, s.key} & skipped
        and not is_withdrawn(dataset.generation, s.subject)  # left out for good
    ]
    if extra:
        found.fault(
            f"{len(extra)} runs of the source are neither in the dataset nor recorded as skipped: {first_few(extra)}"
        )


def _compare_header(run: Run, image: SourceImage, found: Findings, *, dtype: str) -> None:
    stored = {
        "shape": (*run.shape, run.frames),
        "dtype": dtype,
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


def _compare_models(dataset: Dataset, run: Run, image: SourceImage, found: Findings) -> None:
    """What each grayordinate is, against the axis that nibabel reads."""
    if dataset.is_grayordinates(run) != (image.models is not None):
        found.fault("one of run and source has grayordinates, the other volumes", run=run.name)
    if found.faults or image.models is None:
        return
    stored, axis = dataset.grayordinates(run), image.models
    surfaces = np.array([model.is_surface for model in stored.models for _ in range(model.count)], dtype=bool)
    told = {
        "structures": np.array([model.structure for model in stored.models for _ in range(model.count)]),
        "surfaces": surfaces,
        "vertices": stored.indices[surfaces, 0],
        "voxels": stored.indices[~surfaces],
        "numbers of vertices": sorted({(m.structure, m.surface_vertices) for m in stored.models if m.is_surface}),
        "volume": None if stored.volume is None else (stored.volume.shape, stored.volume.affine),
    }
    has_voxels = not axis.surface_mask.all()
    expected = {
        "structures": axis.name,
        "surfaces": axis.surface_mask,
        "vertices": axis.vertex[axis.surface_mask],
        "voxels": axis.voxel[axis.volume_mask],
        "numbers of vertices": sorted((str(name), int(count)) for name, count in axis.nvertices.items()),
        "volume": (tuple(axis.volume_shape), tuple(axis.affine.ravel().tolist())) if has_voxels else None,
    }
    for name, value in told.items():
        if not np.array_equal(value, expected[name]) if isinstance(value, np.ndarray) else value != expected[name]:
            found.fault(f"the {name} of its grayordinates are not those of the source", run=run.name)


def _positions(dataset: Dataset, run: Run) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Where stored values stand in a frame of nibabel's, Fortran-ordered; and the mask, where a frame is a volume."""
    if dataset.is_grayordinates(run):
        return np.arange(run.voxels), None
    mask = dataset.space(run).mask
    return np.ravel_multi_index(np.nonzero(mask), mask.shape, order="F"), mask


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

    def note(self, run: Run, found: Findings, *, why: str = "") -> None:
        if self.count:
            differ = f"differ from the source {why}" if why else "differ from the source"
            found.fault(f"{self.count} {self.what} values {differ}; {self.first}", run=run.name)


def _compare_frames(dataset: Dataset, run: Run, image: SourceImage, found: Findings, counter: Counter) -> None:
    positions, mask = _positions(dataset, run)
    stored, scaled = _Differences("stored"), _Differences("scaled")
    for start, stop in frame_blocks(run):
        ours = dataset.reader(run).read_stored(start, stop)
        ours_scaled = dataset.read(run, start, stop, packed=True)
        if start == 0 and mask is not None:
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


def _compare_bounded(
    dataset: Dataset,
    run: Run,
    first: SourceImage,
    second: SourceImage,
    told: Mapping[str, Any],
    found: Findings,
    counter: Counter,
) -> None:
    """Every value of a lossy run against the bound and the errors that are stored with it; the source is read twice."""
    positions, mask = _positions(dataset, run)
    sd = _temporal_sd(first, positions)
    beyond, scaled = _Differences("stored"), _Differences("scaled")
    worst, total = 0.0, 0.0
    for start, stop in frame_blocks(run):
        ours = dataset.reader(run).read_stored(start, stop)
        ours_scaled = dataset.read(run, start, stop, packed=True)
        if start == 0 and mask is not None:
            _compare_placement(dataset.read(run, 0, 1)[0], mask, ours_scaled[0], run, found)
        for frame, volume in zip(range(start, stop), second.frames, strict=False):
            row, values = frame - start, volume.ravel(order="F")[positions]
            error = _error_sd(ours[row], values, sd)
            beyond.add(error > float(told["bound_sd"]) * (1 + SD_TOLERANCE), frame=frame, ours=ours[row], source=values)
            expected = second.scaled(ours[row])
            wrong = beyond_rounding(ours_scaled[row], expected)
            scaled.add(wrong, frame=frame, ours=ours_scaled[row], source=expected)
            worst, total = max(worst, float(error.max(initial=0))), total + float(np.square(error).sum())
            found.frames_compared += 1
            found.voxels_compared += len(values)
        counter.add(stop - start)
    beyond.note(run, found, why=f"by more than {told['bound_sd']} temporal SD, the bound that is stored with it")
    scaled.note(run, found)
    rms = math.sqrt(total / max(1, int(np.count_nonzero(sd)) * run.frames))
    for name, measured in (("max_error_sd", worst), ("rms_error_sd", rms)):
        if not abs(float(told[name]) - measured) <= SD_TOLERANCE:
            found.fault(f"{name} is stored as {told[name]}, the source gives {measured}", run=run.name)
    if found.frames_compared != run.frames:
        found.fault(f"{found.frames_compared} of {run.frames} frames could be compared", run=run.name)


def _temporal_sd(image: SourceImage, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """(v,) SD over the finite frames, by Welford's update; memory is a few frames."""
    count = np.zeros(len(positions))
    mean, squares = np.zeros(len(positions)), np.zeros(len(positions))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for volume in image.frames:
            values = volume.ravel(order="F")[positions].astype(np.float64)
            finite = np.isfinite(values)
            count += finite
            difference = np.where(finite, values - mean, 0)
            mean += difference / np.maximum(count, 1)
            squares += np.where(finite, difference * (values - mean), 0)
        return np.asarray(np.sqrt(squares / np.maximum(count, 1)))


def _error_sd(ours: NDArray[Any], values: NDArray[Any], sd: NDArray[np.float64]) -> NDArray[np.float64]:
    """(v,) differences in SDs; infinite where a voxel that never changes does, or where one is NaN and the other not."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        one, other = ours.astype(np.float64), values.astype(np.float64)
        error = np.asarray(np.abs(one - other) / sd)
    error[np.isnan(error)] = np.inf
    error[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
    return error


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
