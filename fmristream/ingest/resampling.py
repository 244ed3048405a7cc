"""Runs on another grid or at another repetition time: what was asked for, what that means for a run, and its frames."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import FormatError, SourceError, StorageError, UsageError
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.run_stream import Closing, Frame, RunHeader, RunStream
from fmristream.signal import kernels
from fmristream.signal.grid import Grid, same_grid
from fmristream.signal.resample import (
    SPACE_METHOD,
    TIME_METHOD,
    SpaceWeights,
    TimeResampler,
    frames_after,
    is_finite_grid,
    is_same_tr,
    points_of,
    resized,
    space_weights,
)
from fmristream.storage.urls import display_url

STORED = np.dtype("<f4")
# A mask's voxel is inside where at least half of it is.
_INSIDE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Resample:
    """What every run of a dataset is resampled to.

    Attributes:
        tr_s: repetition time in seconds; None leaves that of each run.
        grid: a grid that all runs are put on; None leaves each on its own.
        voxel_mm: edge length of cubic voxels, on each run's own field of view, in place of a grid.
    """

    tr_s: float | None = None
    grid: Grid | None = None
    voxel_mm: float | None = None

    def __post_init__(self) -> None:
        if self.tr_s is not None and not 0.01 <= self.tr_s <= 1000:
            raise UsageError(f"--resample-tr {self.tr_s}: expected seconds, .01 to 1000")
        if self.voxel_mm is not None and not 0.1 <= self.voxel_mm <= 100:
            raise UsageError(f"--resample-mm {self.voxel_mm}: expected millimetres, .1 to 100")
        if self.grid is not None and self.voxel_mm is not None:
            raise UsageError("--resample-to and --resample-mm: a template has voxels of its own; leave one of them out")
        if self.grid is not None and not is_finite_grid(self.grid):
            raise UsageError("--resample-to: the template's affine has no volume, or its grid is too large for frames")
        if self.tr_s is None and self.grid is None and self.voxel_mm is None:
            raise UsageError("nothing to resample to: give a repetition time, a grid or a voxel size")

    @property
    def record(self) -> dict[str, Any]:
        """What enters the content digest."""
        found: dict[str, Any] = {}
        if self.tr_s is not None:
            found |= {"time": TIME_METHOD, "tr_s": float(self.tr_s)}
        if self.grid is not None:
            found |= {"affine": [float(number) for number in self.grid.affine], "shape": list(self.grid.shape)}
        if self.voxel_mm is not None:
            found["voxel_mm"] = float(self.voxel_mm)
        return found if self.grid is None and self.voxel_mm is None else {**found, "space": SPACE_METHOD}

    def of(self, header: RunHeader, tr_s: float | None, *, name: str) -> "Resampling | None":
        """What it means for a run; None where it is so already.

        Raises:
            SourceError: the run cannot be resampled.
        """
        if header.models:
            raise SourceError(
                f"{name}: grayordinates are not resampled; leave --resample-tr, --resample-to and -mm out"
            )
        source = Grid(shape=header.shape, affine=_flat(header.affine))
        grid = self.grid
        if not is_finite_grid(source) and (grid is not None or self.voxel_mm is not None):
            raise SourceError(f"{name}: its affine has no volume, so that it cannot be put on another grid")
        if self.voxel_mm is not None:
            grid = resized(source, self.voxel_mm)
        if grid is not None and same_grid(source, grid):
            grid = None
        if self.tr_s is not None and tr_s is None:
            raise SourceError(
                f"{name}: its repetition time is not known, so that it cannot be resampled; give --tr SECONDS"
            )
        new_tr_s = None if self.tr_s is None or tr_s is None or is_same_tr(tr_s, self.tr_s) else self.tr_s
        if grid is None and new_tr_s is None:
            return None
        try:
            if grid is not None:
                points_of(source, grid)
        except ValueError as error:
            raise SourceError(f"{name}: cannot be resampled: {error}") from error
        return Resampling(source=header, tr_s=tr_s, grid=grid, new_tr_s=new_tr_s)


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How one run is resampled.

    Attributes:
        source: what the file declares.
        tr_s: the source's repetition time, None if unknown (and then it stays unknown).
        grid: the target; None leaves it.
        new_tr_s: likewise.
    """

    source: RunHeader
    tr_s: float | None
    grid: Grid | None
    new_tr_s: float | None

    @classmethod
    def of_record(
        cls, record: Mapping[str, Any], *, affine: tuple[float, ...], shape: tuple[int, int, int], tr_s: float | None
    ) -> "Resampling":
        """From what is stored with a run, and the run's own grid and repetition time.

        Raises:
            FormatError: it was resampled by a method that this release does not know.
        """
        if record["space"] not in (None, SPACE_METHOD) or record["time"] not in (None, TIME_METHOD):
            raise FormatError(f"resampled by {record['space']}, {record['time']}: this release cannot do that again")
        x, y, z = record["shape"]
        rows = record["affine"]
        return cls(
            source=RunHeader(
                shape=(x, y, z),
                frames=record["frames"],
                dtype=np.dtype(record["dtype"]),
                slope=record["slope"],
                inter=record["inter"],
                affine=tuple(tuple(rows[4 * i : 4 * i + 4]) for i in range(4)),
                tr_s=record["tr_s"],
                space="",
            ),
            tr_s=record["tr_s"],
            grid=None if record["space"] is None else Grid(shape=shape, affine=tuple(affine)),
            new_tr_s=None if record["time"] is None else tr_s,
        )

    @property
    def space(self) -> SpaceWeights | None:
        """Weights between the grids; computed once for runs on one grid."""
        if self.grid is None:
            return None
        return space_weights(Grid(shape=self.source.shape, affine=_flat(self.source.affine)), self.grid)

    @cached_property
    def header(self) -> RunHeader:
        """What is stored."""
        frames, affine = self.source.frames, self.source.affine
        if self.new_tr_s is not None and self.tr_s is not None:
            frames = frames_after(frames, self.tr_s, self.new_tr_s)
        if self.grid is not None:
            affine = tuple(tuple(self.grid.affine[4 * i : 4 * i + 4]) for i in range(4))
        return replace(
            self.source,
            shape=self.source.shape if self.grid is None else self.grid.shape,
            frames=frames,
            dtype=STORED,
            slope=1.0,
            inter=0.0,
            affine=affine,
            tr_s=self.new_tr_s or self.tr_s,
        )

    @property
    def record(self) -> dict[str, Any]:
        """What is stored with the run: what its source was, in numbers."""
        return {
            "affine": list(_flat(self.source.affine)),
            "dtype": self.source.dtype.str,
            "frames": self.source.frames,
            "inter": float(self.source.inter),
            "shape": list(self.source.shape),
            "slope": float(self.source.slope),
            "space": None if self.grid is None else SPACE_METHOD,
            "time": None if self.new_tr_s is None else TIME_METHOD,
            "tr_s": None if self.tr_s is None else float(self.tr_s),
        }

    def mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The source's mask (x, y, z) on the grid of what is stored: voxels of which half or more is inside."""
        if (space := self.space) is None:
            return mask
        share = np.empty(int(np.prod(space.shape)))
        space.apply(np.asfortranarray(mask, dtype=np.uint8), 1.0, 0.0, share)
        # The least that rounding of weights makes of a half.
        inside = share.reshape(space.shape, order="F") >= _INSIDE - 1e-6
        return np.ascontiguousarray(inside)

    def frames(self, volumes: Iterator[Frame], ring: int = 1) -> Iterator[Frame]:
        """Resampled frames of stored volumes, (x, y, z) float32 in Fortran order; the one `ring` later overwrites."""
        header, source, space = self.header, self.source, self.space
        voxels = int(np.prod(header.shape))
        scaled = np.empty(voxels)
        buffers = [np.empty(voxels, dtype=STORED) for _ in range(min(ring, header.frames))]
        in_time = None
        if self.new_tr_s is not None and self.tr_s is not None:
            in_time = TimeResampler(frames=source.frames, tr_s=self.tr_s, new_tr_s=self.new_tr_s, voxels=voxels)
        number = 0
        for volume in volumes:
            if space is None:
                kernels.scale(volume.reshape(-1, order="F"), source.slope, source.inter, scaled)
            else:
                space.apply(volume, source.slope, source.inter, scaled)
            for values in [scaled] if in_time is None else in_time.add(scaled):
                stored = buffers[number % ring]
                with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinite
                    stored[:] = values
                number += 1
                yield stored.reshape(header.shape, order="F")
        assert number == header.frames, "the source gives as many frames as it declares"


class ResampledStream(Closing):
    """An open run under resampling (a `RunStream`); reading it to its end proves the whole source."""

    prefix = b""  # the source's header is not that of what is stored
    models = None  # grayordinates are not resampled

    def __init__(self, stream: RunStream, resampling: Resampling) -> None:
        self._stream = stream
        self._resampling = resampling

    @property
    def header(self) -> RunHeader:
        """Of what is stored; that of a source which is another now does not go with it."""
        if self._stream.header != self._resampling.source:
            return self._stream.header
        return self._resampling.header

    def frames(self, ring: int = 1) -> Iterator[Frame]:
        """Every resampled frame, once."""
        return self._resampling.frames(self._stream.frames(), ring)

    def fingerprint(self) -> Fingerprint:
        """Of the source."""
        return self._stream.fingerprint()

    def close(self) -> None:
        self._stream.close()


def read_grid(url: str) -> Grid:
    """The grid of a template: a 3-D NIfTI file, of which the header is read.

    Raises:
        UsageError: it is none.
    """
    from fmristream.ingest.nifti import open_nifti

    name = display_url(url).rstrip("/").rpartition("/")[2]
    try:
        with open_nifti(url, name=name, is_mask=True) as stream:
            return Grid(shape=stream.header.shape, affine=_flat(stream.header.affine))
    except (SourceError, StorageError) as error:
        raise UsageError(f"--resample-to {display_url(url)}: {error}") from error


def _flat(affine: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    return tuple(float(value) for row in affine for value in row)
