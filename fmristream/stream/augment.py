"""Clips varied at random where the model is: one draw per clip, the same for all its frames and channels.

Each draw is a function of (seed, step, epoch, window, view, position in the stream): no number of ranks, threads or interruptions
changes it. What comes into view from outside is the sample's fill. Nothing is written into a batch that somebody else holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn.functional import grid_sample

from fmristream.errors import SpaceError, UsageError
from fmristream.stream.batch import Batch
from fmristream.stream.draws import key_of, normals, uniforms

# Where scipy.ndimage cuts a Gaussian, in SD.
_TRUNCATE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample on its way through the steps.

    Attributes:
        frames: (c, t, x, y, z), not to be written to.
        fill: (c,) what stands outside the field of view.
        batch: what it belongs to.
        is_reversed: whether time runs backwards.
    """

    frames: torch.Tensor
    fill: torch.Tensor
    batch: Batch
    is_reversed: bool = False


class Step(Protocol):
    """One kind of variation."""

    @property
    def p(self) -> float:
        """Share of clips that it happens to."""
        ...

    def check(self, batch: Batch) -> None:
        """Raise UsageError where the batch lacks what the step needs."""
        ...

    def __call__(self, sample: Sample, key: int) -> Sample:
        """The sample, varied as the key's draws say."""
        ...


def _require(step: Step, is_fine: bool, expected: str) -> None:
    if not is_fine:
        raise UsageError(f"{step}: expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """Rotation, scale and shift about the grid's centre in mm, trilinear; the left-right axis mirrored where asked for.

    Each axis has draws of its own, uniform and symmetric. SwiFT trains with `degrees=10, scale=0.1` on every clip.

    Attributes:
        degrees: rotation about each axis, at most; x first, then y, then z.
        scale: change of size along each axis, at most: .1 means .9 to 1.1.
        shift_mm: along each axis, at most.
        flip: share of clips that are mirrored left to right, exactly. Off by default: hemispheres differ.
        p: share of clips that it happens to.
    """

    degrees: float = 0.0
    scale: float = 0.0
    shift_mm: float = 0.0
    flip: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        _require(self, 0 <= self.scale < 1, "scale in [0, 1)")
        _require(self, min(self.degrees, self.shift_mm) >= 0, "sizes of 0 or more")
        _require(self, 0 <= self.flip <= 1 and 0 <= self.p <= 1, "shares of 0 to 1")

    def check(self, batch: Batch) -> None:
        if self.flip and not batch.orientation:
            raise UsageError(
                "flip mirrors left and right, and nobody knows where these are: the batch has no orientation"
            )
        if batch.voxel_sizes_mm is None:
            raise UsageError("Affine turns and shifts in mm, and the batch has no voxel_sizes_mm")

    def __call__(self, sample: Sample, key: int) -> Sample:
        draws = uniforms(key, 10)
        frames = sample.frames
        if draws[9] < self.flip:
            axis = next(place for place, code in enumerate(sample.batch.orientation) if code in "LR")
            frames = frames.flip(2 + axis)
        matrix = self.matrix(draws, sample.batch.voxel_sizes_mm or (1.0, 1.0, 1.0))
        if not torch.equal(matrix, torch.eye(3, 4, dtype=torch.float64)):
            frames = resample(frames, matrix, sample.fill)
        return replace(sample, frames=frames)

    def matrix(self, draws: Sequence[float], voxel_sizes_mm: tuple[float, float, float]) -> torch.Tensor:
        """(3, 4) float64: a voxel of the result, counted from the grid's centre, shows what lies at matrix @ (voxel, 1)."""
        x, y, z = (math.radians(self.degrees * (2 * draw - 1)) for draw in draws[:3])
        turn = _rotation(2, z) @ _rotation(1, y) @ _rotation(0, x)
        stretch = torch.diag(
            torch.tensor([1 + self.scale * (2 * draw - 1) for draw in draws[3:6]], dtype=torch.float64)
        )
        shift = torch.tensor([self.shift_mm * (2 * draw - 1) for draw in draws[6:9]], dtype=torch.float64)
        sizes = torch.tensor(voxel_sizes_mm, dtype=torch.float64)
        linear = (turn @ stretch) * sizes / sizes[:, None]
        return torch.cat([linear, (shift / sizes)[:, None]], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blur:
    """Gaussian smoothing, an SD for each axis drawn uniformly from a range, in voxels; cut at 4 SD as in scipy.ndimage.

    SwiFT trains with `sd_voxels=(0, 0.5)` on a tenth of clips.
    """

    sd_voxels: tuple[float, float] = (0.0, 0.5)
    p: float = 0.1

    def __post_init__(self) -> None:
        _require(
            self, 0 <= self.sd_voxels[0] <= self.sd_voxels[1] and 0 <= self.p <= 1, "0 <= low <= high, p of 0 to 1"
        )

    def check(self, batch: Batch) -> None:
        pass

    def __call__(self, sample: Sample, key: int) -> Sample:
        low, high = self.sd_voxels
        sds = [low + (high - low) * draw for draw in uniforms(key, 3)]
        return replace(sample, frames=blur(sample.frames, sds, sample.fill))


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """White Gaussian noise of one SD, the same volume added to all frames and channels, outside the mask as well.

    SwiFT trains with `sd=0.1` on three tenths of clips.
    """

    sd: float = 0.1
    p: float = 0.3

    def __post_init__(self) -> None:
        _require(self, self.sd >= 0 and 0 <= self.p <= 1, "sd of 0 or more, p of 0 to 1")

    def check(self, batch: Batch) -> None:
        pass

    def __call__(self, sample: Sample, key: int) -> Sample:
        grid = sample.frames.shape[2:]
        noise = normals(key, math.prod(grid), sample.frames.device).mul_(self.sd).view(grid)
        return replace(sample, frames=sample.frames + noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """Every value times 1 + a, plus b; a and b are uniform and symmetric. The fill changes with them."""

    scale: float = 0.1
    shift: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self,
            0 <= self.scale < 1 and self.shift >= 0 and 0 <= self.p <= 1,
            "scale in [0, 1), shift >= 0, p of 0 to 1",
        )

    def check(self, batch: Batch) -> None:
        pass

    def __call__(self, sample: Sample, key: int) -> Sample:
        by, to = (2 * draw - 1 for draw in uniforms(key, 2))
        factor, summand = 1 + self.scale * by, self.shift * to
        return replace(sample, frames=sample.frames * factor + summand, fill=sample.fill * factor + summand)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reverse:
    """Time backwards, side series, kept frames and all: the control that tells whether a model looks at their order."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _require(self, 0 <= self.p <= 1, "p of 0 to 1")

    def check(self, batch: Batch) -> None:
        if batch.lengths is not None:
            raise UsageError("Reverse needs whole windows, and these have frames after the end of their runs")

    def __call__(self, sample: Sample, key: int) -> Sample:
        return replace(sample, frames=sample.frames.flip(1), is_reversed=not sample.is_reversed)


# What SwiFT's published training does to each clip (Kim et al. 2023; there with MONAI, and the border repeated outside).
SWIFT: tuple[Step, ...] = (
    Affine(degrees=10, scale=0.1),
    Noise(sd=0.1, p=0.3),
    Blur(sd_voxels=(0.0, 0.5), p=0.1),
)


@dataclass(frozen=True, slots=True)
class Compose:
    """Steps one after the other; give it to `Batch.to(device, augment=...)`, or call it with a batch that is placed.

    Attributes:
        steps: what happens, in order.
        seed: another one, other draws.
    """

    steps: tuple[Step, ...]
    seed: int = 0

    def __call__(self, batch: Batch, *, keys: Sequence[int] | None = None, may_overwrite: bool = False) -> Batch:
        """The batch with each of its clips varied.

        Args:
            batch: with its signal placed.
            keys: of its rows, where they were made before it went to a device.
            may_overwrite: nobody else looks at its placed tensor.

        Raises:
            SpaceError: grayordinates, or a batch that was not placed.
            UsageError: the batch lacks what a step needs.
        """
        if batch.placed is None:
            raise SpaceError(
                "only volumes on a grid are augmented; call batch.to(device) first (grayordinates have none)"
            )
        for step in self.steps:
            step.check(batch)
        placed = batch.placed if may_overwrite else batch.placed.clone()
        fill = batch.fill.clone()
        # What goes with the frames, one row a sample: it turns with them.
        side = {name: values.clone() for name, values in batch.side.items()}
        kept = None if batch.kept is None else batch.kept.clone()
        for row, key in enumerate(self.keys(batch) if keys is None else keys):
            sample = self._varied(Sample(frames=placed[row], fill=fill[row], batch=batch), key)
            placed[row], fill[row] = sample.frames, sample.fill
            if sample.is_reversed:
                for values in (*side.values(), *(() if kept is None else (kept,))):
                    values[row] = values[row].flip(0)
        return replace(batch, placed=placed, fill=fill, side=side, kept=kept)

    def keys(self, batch: Batch) -> list[int]:
        """What the draws of each row come from; a batch on a device is waited for.

        Raises:
            UsageError: the batch does not come from a loader.
        """
        if batch.epoch is None or batch.sample is None:
            raise UsageError(
                "the batch does not say which epoch and sample its rows are; take batches from a StreamingLoader"
            )
        of_view = len(batch) // batch.views
        rows = zip(batch.epoch.tolist(), batch.window.tolist(), batch.sample.tolist(), strict=True)
        return [
            key_of(self.seed, epoch, window, batch.first_view + row // of_view, sample)
            for row, (epoch, window, sample) in enumerate(rows)
        ]

    def _varied(self, sample: Sample, key: int) -> Sample:
        whole = replace(
            sample, frames=sample.frames.float()
        )  # half precision cannot tell the places of a 96-voxel axis apart
        varied = whole
        for place, step in enumerate(self.steps):
            if uniforms(key_of(key, place, "p"), 1)[0] < step.p:
                varied = step(varied, key_of(key, place))
        return sample if varied is whole else varied


def resample(frames: torch.Tensor, matrix: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """(c, t, x, y, z) seen through an affine map, trilinear; the fill lies around it.

    Args:
        frames: float32.
        matrix: (3, 4), in voxels from the grid's centre; see `Affine.matrix`.
        fill: (c,).
    """
    grid = frames.shape[2:]
    half = (torch.tensor(grid, dtype=torch.float64) - 1) / 2
    # grid_sample counts from -1 to 1 between the first and the last voxel, z first; an axis of one voxel has no length.
    safe = half.clamp(min=0.5)
    places = [torch.arange(size, dtype=torch.float32, device=frames.device) - (size - 1) / 2 for size in grid]
    linear, shift = (matrix[:, :3] / safe[:, None]).tolist(), (matrix[:, 3] / safe).tolist()
    wanted = [_along(places, linear[axis]).add_(shift[axis]) for axis in (2, 1, 0)]
    background = fill[:, None, None, None, None]
    shifted = (frames - background).flatten(0, 1)[None]
    found = grid_sample(
        shifted, torch.stack(wanted, -1)[None], mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return found[0].view_as(frames).add_(background)


def _along(places: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """(x, y, z) sum of each axis's places times its factor."""
    x, y, z = (place * factor for place, factor in zip(places, factors, strict=True))
    return x[:, None, None] + y[:, None] + z


def blur(frames: torch.Tensor, sds: Sequence[float], fill: torch.Tensor) -> torch.Tensor:
    """(c, t, x, y, z) smoothed along each axis by its SD in voxels; the fill lies around it.

    Sums of shifted copies, not a convolution: those of cuDNN round to TF32 unless told otherwise.
    """
    background = fill[:, None, None, None, None]
    values = frames - background
    for axis, sd in enumerate(sds, start=2):
        weights = gaussian(sd)
        if len(weights) > 1:
            values = _weighted(values, weights, axis)
    return values + background


def gaussian(sd: float) -> list[float]:
    """Weights of the middle voxel and of those at distance 1, 2, ... to either side."""
    radius = int(_TRUNCATE * sd + 0.5)
    weights = [math.exp(-0.5 * (distance / sd) ** 2) if distance else 1.0 for distance in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    return [weight / total for weight in weights]


def _weighted(values: torch.Tensor, weights: Sequence[float], axis: int) -> torch.Tensor:
    size = values.shape[axis]
    found = values * weights[0]
    for distance, weight in enumerate(weights[1:], start=1):
        kept = size - distance
        if kept > 0:
            found.narrow(axis, 0, kept).add_(values.narrow(axis, distance, kept), alpha=weight)
            found.narrow(axis, distance, kept).add_(values.narrow(axis, 0, kept), alpha=weight)
    return found


def _rotation(axis: int, angle: float) -> torch.Tensor:
    """(3, 3) float64, about one axis, right-handed."""
    one, other = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[one, one] = matrix[other, other] = math.cos(angle)
    matrix[one, other], matrix[other, one] = -math.sin(angle), math.sin(angle)
    return matrix
