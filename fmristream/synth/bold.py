"""One run of synthetic BOLD, frame by frame: still images times time courses, plus noise smooth in space and time.

A frame costs a few sums over the voxels; a run holds one copy of the still images, whatever its length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fmristream.synth.anatomy import Coordinates, brain_mask, grid_coordinates
from fmristream.synth.courses import Courses, Effect, Timing, run_courses
from fmristream.synth.draws import Purpose, generator
from fmristream.synth.subject import DRIFT_SD, GLOBAL_SD, Images, subject_images

# Lag-one correlation of the noise between networks: .4 at a TR of 2 s, as in unsmoothed grey matter.
NOISE_MEMORY_S = 2.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """How a run is taken."""

    shape: tuple[int, int, int]
    timing: Timing
    voxel_size_mm: float
    dtype: np.dtype[Any]
    brain_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKey:
    """Which run: all that its random numbers depend on."""

    seed: int
    subject: int
    run: int


def bold_frames(scan: Scan, effect: Effect, key: RunKey) -> Iterator[npt.NDArray[Any]]:
    """Frames (x, y, z) in Fortran order."""
    inside = brain_mask(scan.shape) if scan.brain_only else np.ones(scan.shape[::-1], dtype=np.bool_)
    voxels = np.flatnonzero(inside)
    images = _images(scan, key, voxels)
    courses = _courses(scan.timing, effect, key, images)
    maps, weights = _components(scan, images, courses, voxels)
    for weight, noise in zip(weights.T, _noise(scan, key, inside), strict=True):
        signal = images.mean + noise * images.noise_sd
        # A sum in a fixed order: a matrix product rounds differently on every processor.
        for image, now in zip(maps, weight, strict=True):
            signal += now * image
        frame = np.zeros(scan.shape[::-1], dtype=scan.dtype)
        frame.reshape(-1)[voxels] = _stored(signal, scan.dtype)
        yield frame.T


def motion_mm(scan: Scan, effect: Effect, key: RunKey) -> npt.NDArray[np.float32]:
    """(3, frame): how far the head was displaced along x, y and z."""
    voxels = np.flatnonzero(brain_mask(scan.shape))
    return _courses(scan.timing, effect, key, _images(scan, key, voxels)).motion_mm


def _images(scan: Scan, key: RunKey, voxels: npt.NDArray[np.intp]) -> Images:
    at = Coordinates(*(axis.reshape(-1)[voxels] for axis in grid_coordinates(scan.shape)))
    return subject_images(at, seed=key.seed, subject=key.subject, shape=scan.shape)


def _courses(timing: Timing, effect: Effect, key: RunKey, images: Images) -> Courses:
    return run_courses(
        timing,
        effect,
        seed=key.seed,
        subject=key.subject,
        run=key.run,
        num_backgrounds=len(images.backgrounds),
        restlessness=images.restlessness,
    )


def _components(
    scan: Scan, images: Images, courses: Courses, voxels: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Maps (component, voxel) and their weights (component, frame)."""
    volume = np.zeros(scan.shape[::-1], dtype=np.float32)
    volume.reshape(-1)[voxels] = images.mean
    maps = [
        *images.networks,
        *images.backgrounds,
        images.pulsation,
        images.mean,
        *(_slope(volume, axis).reshape(-1)[voxels] for axis in (2, 1, 0)),
    ]
    shared = np.float32(GLOBAL_SD) * courses.whole_brain + np.float32(DRIFT_SD) * courses.drift + courses.spike_share
    weights = [
        *courses.networks,
        *courses.backgrounds,
        courses.pulsation,
        shared,
        *(courses.motion_mm / np.float32(scan.voxel_size_mm)),
    ]
    return np.stack(maps), np.stack(weights)


def _slope(volume: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Change per voxel along an axis; 0 along an axis of one voxel."""
    if volume.shape[axis] == 1:
        return np.zeros_like(volume)
    slope: npt.NDArray[np.float32] = np.gradient(volume, axis=axis)
    return slope


def _noise(scan: Scan, key: RunKey, inside: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.float32]]:
    """Per frame the noise of the voxels inside: SD 1, correlated with its neighbours and with the frame before."""
    rng = generator(key.seed, Purpose.NOISE, key.subject, key.run)
    box = tuple(slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(inside))
    voxels = np.flatnonzero(inside[box])
    keep = np.float32(round(float(np.exp(-scan.timing.tr_s / NOISE_MEMORY_S)), 6))
    renew = np.float32(round(float(np.sqrt(1 - keep**2)), 6))
    shape = inside[box].shape
    state = _blurred_white(rng, shape)[voxels]
    for _ in range(scan.timing.frames):
        yield state
        state = keep * state + renew * _blurred_white(rng, shape)[voxels]


def _blurred_white(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """White noise blurred by (1, 2, 1) along every axis and brought back to SD 1, flat."""
    padded = rng.standard_normal(tuple(n + 2 for n in shape), dtype=np.float32)
    for axis in range(3):
        front, middle, back = (
            tuple(slice(start, stop) if a == axis else slice(None) for a in range(3))
            for start, stop in ((0, -2), (1, -1), (2, None))
        )
        padded = padded[front] + padded[back] + 2 * padded[middle]
    # Each axis multiplies the variance by 1 + 4 + 1.
    return (padded * np.float32(6**-1.5)).reshape(-1)


def _stored(signal: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """As the scanner writes it: magnitudes, and whole numbers in integer types."""
    magnitude = np.maximum(signal, 0)
    if dtype.kind == "f":
        return magnitude.astype(dtype)
    return np.minimum(np.rint(magnitude), np.iinfo(dtype).max).astype(dtype)
