"""Decode everything of a run again: its digest, its statistics, and the same bytes through zarr-python."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError
from fmristream.report.beside import BesideCheck
from fmristream.report.blocks import frame_blocks
from fmristream.report.findings import Findings
from fmristream.report.image import image_of
from fmristream.report.threads import Counter, in_threads
from fmristream.shards import QUANTIZATION
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import RunDigest, run_header
from fmristream.shards.run_reader import RunReader
from fmristream.signal.measure import REFERENCE_FRAMES, RunMeasure, Statistics, moments_of, reference_of

# Sums of floats depend on the order in which a compiler adds them; integers of 8 and 16 bits are summed exactly.
FLOAT_TOLERANCE = 1e-6


def check_all_deeply(dataset: Dataset, counter: Counter) -> Findings:
    """Check every run, several at a time; counts frames."""
    found = Findings()
    for result in in_threads(lambda run: check_run_deeply(dataset, run, counter), dataset.runs, counter):
        found.merge(result)
    return found


def check_run_deeply(dataset: Dataset, run: Run, counter: Counter) -> Findings:
    """Check one run; memory is a few frames and the run's per-voxel statistics."""
    found = Findings()
    try:
        reader = dataset.reader(run)
        beside = BesideCheck(dataset, reader)
        digest, statistics = _decode_all(reader, found, counter, beside)
        if digest != run.digest:
            found.fault(f"its stored values have digest {digest[:12]}, its row says {run.digest[:12]}", run=run.name)
        _compare_scalars(run, statistics, found)
        _compare_vectors(reader, statistics, found)
        beside.compare(found)
        if reader.is_volume:
            _check_image(dataset, run, found)
        if reader.is_quantized:
            _check_bound(reader, found)
        _read_through_zarr(dataset, reader, found)
    except (CorruptDataError, ObjectMissingError, FormatError) as error:
        found.fault(str(error), run=run.name)
    return found


def _decode_all(reader: RunReader, found: Findings, counter: Counter, beside: BesideCheck) -> tuple[str, Statistics]:
    run = reader.run
    header = run_header(
        frames=run.frames, shape=run.shape, dtype=run.dtype, slope=run.slope, inter=run.inter, affine=run.affine,
        tr_s=run.tr_s,
    )  # fmt: skip
    digest = RunDigest(header=header, space_digest=run.space_digest, bulk_digest=reader.bulk_digest)
    if reader.is_difference:
        reference = reader.reference
        scratch = np.empty(run.voxels, dtype=run.dtype)
    else:  # the shift that float sums were taken about
        reference = reference_of(list(reader.read_stored(0, min(REFERENCE_FRAMES, run.frames))))
        scratch = None
    measure = RunMeasure(reference, dtype=run.numpy_dtype, slope=run.slope, inter=run.inter)
    for start, stop in frame_blocks(run):
        for values in reader.read_stored(start, stop):
            digest.add(values.data)
            measure.add(values, scratch)
            beside.add(values)
        found.frames_decoded += stop - start
        counter.add(stop - start)
    return digest.hexdigest(), measure.finish()


def _check_image(dataset: Dataset, run: Run, found: Findings) -> None:
    """The NIfTI image that an export would write, against the digest that was taken when the source was read."""
    image = image_of(dataset, run)
    digest = hashlib.sha256(image.prefix)
    for frame in image.frames:
        digest.update(frame)
    if digest.hexdigest() != image.stream_sha256:
        found.fault(
            f"its NIfTI image comes to sha256 {digest.hexdigest()[:12]}, {image.stream_sha256[:12]} was recorded",
            run=run.name,
        )


def _check_bound(reader: RunReader, found: Findings) -> None:
    """What its group claims of the error is not more than codes with these steps can hold."""
    told = reader.attributes.get("quantization", {})
    try:
        bound, measured, rms = (float(told[name]) for name in ("bound_sd", "max_error_sd", "rms_error_sd"))
    except (KeyError, TypeError, ValueError):
        found.fault("its group does not say how far its codes are off", run=reader.run.name)
        return
    if not 0 <= rms <= measured <= bound:
        found.fault(f"its group claims a bound of {bound} SD and errors of {measured} (rms {rms})", run=reader.run.name)


def _compare_scalars(run: Run, statistics: Statistics, found: Findings) -> None:
    tolerance = 0.0 if run.numpy_dtype.kind in "iu" and run.numpy_dtype.itemsize <= 2 else FLOAT_TOLERANCE
    names = ("residual_wraps", "valid_min", "valid_max", "nonfinite", "foreground_count")
    scaled = ("foreground_mean", "foreground_sd", "foreground_min", "foreground_max")
    for name in (*names, *scaled):
        told, is_ = float(getattr(run, name)), float(getattr(statistics, name))
        near = abs(told - is_) <= tolerance * max(abs(told), abs(is_)) if name in scaled else told == is_
        if not near and math.isfinite(told) | math.isfinite(is_):  # without a finite value there is no range: NaN
            found.fault(f"its row says {name} {told!r}, its stored values give {is_!r}", run=run.name)


def _compare_vectors(reader: RunReader, statistics: Statistics, found: Findings) -> None:
    run = reader.run
    exact = run.numpy_dtype.kind in "iu" and run.numpy_dtype.itemsize <= 2
    with np.errstate(over="ignore"):
        expected: Mapping[str, NDArray[Any]] = {
            "moments": moments_of(statistics, dtype=run.numpy_dtype),
            "stats": np.stack([statistics.delta, statistics.sd]).astype("<f4"),
        }
    stored = {"moments": reader.moments, "stats": reader.exact_moments}
    for name, vectors in expected.items():
        if stored[name].dtype != vectors.dtype:
            found.fault(f"{name} are stored as {stored[name].dtype}, its values need {vectors.dtype}", run=run.name)
        elif not (np.array_equal(stored[name], vectors) if exact else _is_close(stored[name], vectors)):
            found.fault(f"the stored {name} are not those of its stored values", run=run.name)


def _is_close(stored: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Equal up to the rounding of sums, which is relative to the voxel's SD and mean."""
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.abs(expected.astype(np.float64)).max(axis=0)
        return bool(
            np.all((np.abs(stored.astype(np.float64) - expected) <= FLOAT_TOLERANCE * scale) | ~np.isfinite(scale))
        )


def _agree(codes: NDArray[Any], quantization: NDArray[Any], values: NDArray[Any]) -> bool:
    """Whether codes and scale, by numpy, give these values wherever they do not stand elsewhere."""
    step, offset = quantization.astype(np.float64)
    with np.errstate(over="ignore"):
        decoded = (codes * step + offset).astype(values.dtype)
    here = codes != np.iinfo(codes.dtype).min
    return bool(decoded[here].tobytes() == values[here].tobytes())


def _read_through_zarr(dataset: Dataset, reader: RunReader, found: Findings) -> None:
    """First, middle and last frame and the per-voxel arrays, as any tool that reads Zarr would get them."""
    run, name = reader.run, reader.frames_array.name
    try:
        group: Any = dataset.zarr(run)
        for frame in sorted({0, run.frames // 2, run.frames - 1}):
            values = np.asarray(group[name][frame])
            if reader.is_quantized:
                if not _agree(values, np.asarray(group[QUANTIZATION][:]), reader.read_stored(frame, frame + 1)[0]):
                    found.fault(f"frame {frame} reads differently through zarr-python", run=run.name)
                found.frames_cross_read += 1
                continue
            if reader.is_volume:
                values = np.ascontiguousarray(values.transpose(2, 1, 0))  # (z, y, x) to the order of voxels
            elif name == "residual":
                with np.errstate(over="ignore"):
                    values = values + np.asarray(group["reference"][:])
            if values.tobytes() != reader.read_stored(frame, frame + 1).tobytes():
                found.fault(f"frame {frame} reads differently through zarr-python", run=run.name)
            found.frames_cross_read += 1
        if np.asarray(group["moments"][:]).tobytes() != reader.moments.tobytes():
            found.fault("its moments read differently through zarr-python", run=run.name)
        if "mask" in reader.arrays and np.asarray(group["mask"][:]).max(initial=0) > 1:
            found.fault("its own mask holds values beside 0 and 1", run=run.name)
    except (ValueError, LookupError, OSError, RuntimeError, TypeError) as error:  # what zarr and its codecs raise
        found.fault(f"zarr-python cannot read it: {type(error).__name__}: {error}", run=run.name)
