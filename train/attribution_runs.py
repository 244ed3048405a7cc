"""Attribution run by run: every window of a split, summed over channels and frames, averaged over windows, runs, subjects."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmristream.errors import UsageError
from fmristream.shards.dataset import Dataset
from train.attribution_methods import (
    BaselineKind,
    Regions,
    block_regions,
    evaluating,
    integrated_gradients,
    make_baseline,
    occlusion,
    painted,
)

if TYPE_CHECKING:
    from fmristream.catalog.run import Run
    from fmristream.stream.clips import StreamingDataset
    from train.data import Part

Volume = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Method:
    """How maps are made.

    Attributes:
        name: `gradients` (integrated) or `occlusion`.
        output: which of the network's outputs.
        baseline: see `make_baseline`.
        steps: points of integrated gradients.
        chunk: windows that the network sees at once.
        magnitude: sum of absolute values over channels and frames, not of signed ones, which may cancel over time. Maps of
            occlusion are one signed number a region either way.
        regions: (x, y, z) what occlusion hides at once, numbers from 0, negative for none; on the grid of the windows.
    """

    name: Literal["gradients", "occlusion"] = "gradients"
    output: int = 0
    baseline: BaselineKind = "zero"
    steps: int = 64  # a small trained SwiFT: gaps up to 2 % of the change with 32, .1 to 1 % with 64
    chunk: int = 1
    magnitude: bool = False
    regions: Regions | None = None

    def __post_init__(self) -> None:
        if self.name not in ("gradients", "occlusion"):
            raise UsageError(f"method {self.name!r} must be gradients or occlusion")
        if self.name == "occlusion" and self.regions is None:
            raise UsageError("occlusion needs regions to hide; give block_regions or parcel_regions")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunMap:
    """What a network's score rests on in one run.

    Attributes:
        run: which.
        values: (x, y, z) on the grid of the windows: mean over them of each voxel's sum over channels and frames. Signed
            integrated gradients sum to the mean change of the output.
        windows: how many.
        change: mean over windows of the output minus the baseline's; NaN for occlusion.
        gap: largest difference, over windows, between what attributions sum to and that change; NaN for occlusion.
    """

    run: "Run"
    values: Volume
    windows: int
    change: float
    gap: float


def attribute_runs(network: nn.Module, part: "Part", method: Method, *, device: torch.device) -> Iterator[RunMap]:
    """One map a run, in stored order; memory is that of a few windows.

    Args:
        network: a volume network.
        part: a split in stored order (`seed=None`), on one rank.
        method: how.
        device: where the network is.

    Raises:
        UsageError: the order is shuffled or shared between ranks.
    """
    clips = part.clips
    if clips.seed is not None or part.loader.world.size != 1 or clips.views != 1:
        raise UsageError("attribution goes run by run: open the split with seed=None, one view, on one rank")
    number, sums = -1, _Sums(clips.grid)
    with evaluating(network):
        for batch in part.loader:
            bold = batch.bold
            for row in np.flatnonzero(batch.valid.numpy()).tolist():
                found = clips.clip(int(batch.window[row])).run
                if found != number:
                    if number >= 0:
                        yield sums.finished(clips.runs[number])
                    number, sums = found, _Sums(clips.grid)
                # Padding of whole runs is no frame of theirs, and the network is not told where it begins.
                own = slice(None if batch.lengths is None else int(batch.lengths[row]))
                one = bold[row : row + 1, ..., own].to(device=device, dtype=torch.float32)
                sums.add(*_window_map(network, one, batch.fill[row : row + 1], method))
    if number >= 0:
        yield sums.finished(clips.runs[number])


class SubjectMean:
    """The mean over subjects of the mean over each one's runs, fed run by run in stored order."""

    def __init__(self, grid: tuple[int, int, int]) -> None:
        self._total, self._subjects = np.zeros(grid), 0
        self._own, self._runs, self._subject = np.zeros(grid), 0, ""

    def add(self, found: RunMap) -> None:
        """Take in the map of a run."""
        if found.run.subject != self._subject:
            self._close()
            self._subject = found.run.subject
        self._own += found.values
        self._runs += 1

    @property
    def value(self) -> Volume:
        """(x, y, z) of those so far."""
        self._close()
        return (self._total / max(1, self._subjects)).astype(np.float32)

    @property
    def subjects(self) -> int:
        """How many so far."""
        return self._subjects + (self._runs > 0)

    def _close(self) -> None:
        if self._runs:
            self._total += self._own / self._runs
            self._subjects += 1
        self._own[:], self._runs, self._subject = 0, 0, ""


def cube_regions(clips: "StreamingDataset", block: int) -> Regions:
    """Cubes of the grid of the windows, those that hold a voxel of the brain."""
    inside = np.zeros(int(np.prod(clips.grid)), dtype=bool)
    inside[clips.positions[clips.positions >= 0]] = True
    return block_regions(inside.reshape(clips.grid), block)


def parcel_regions(clips: "StreamingDataset", atlas: str | None = None) -> Regions:
    """Parcels of an atlas that is stored with the runs, on the grid of the windows: each voxel in that which weighs most.

    Raises:
        UsageError: there is no such atlas, or the recipe pools or cuts voxels.
    """
    from fmristream.shards.side import parcel_spaces_of, read_parcel_space

    dataset: Dataset = clips.dataset
    spaces = [
        read_parcel_space(dataset, digest)
        for digest in parcel_spaces_of(dataset, dataset.reader(clips.runs[0])).values()
    ]
    wanted = [space for space in spaces if space.atlas.startswith(atlas or "")]
    if len(wanted) != 1:
        known = ", ".join(space.atlas[:12] for space in spaces) or "none"
        raise UsageError(f"parcels of atlas {atlas or '(any)'}: runs have {known}; give the first digits of one")
    weights = wanted[0].weights
    if len(clips.positions) != clips.runs[0].voxels:
        raise UsageError(
            "parcels are known for the voxels of the runs, this recipe pools or cuts them; occlude by cubes"
        )
    parcel_of = np.full(len(clips.positions), -1, dtype=np.int64)
    parcels = np.repeat(np.arange(weights.parcels), np.diff(weights.indptr))
    heaviest_last = np.argsort(weights.weights, kind="stable")
    parcel_of[weights.voxels[heaviest_last]] = parcels[heaviest_last]
    regions = np.full(int(np.prod(clips.grid)), -1, dtype=np.int64)
    inside = clips.positions >= 0
    regions[clips.positions[inside]] = parcel_of[inside]
    return regions.reshape(clips.grid)


class _Sums:
    """Over the windows of a run."""

    def __init__(self, grid: tuple[int, int, int]) -> None:
        self._values, self._windows, self._change, self._gap = np.zeros(grid), 0, 0.0, 0.0

    def add(self, values: Volume, change: float, gap: float) -> None:
        self._values += values
        self._windows += 1
        self._change += change
        self._gap = max(self._gap, abs(gap)) if np.isfinite(gap) else float("nan")

    def finished(self, run: "Run") -> RunMap:
        return RunMap(
            run=run,
            values=(self._values / self._windows).astype(np.float32),
            windows=self._windows,
            change=self._change / self._windows,
            gap=self._gap,
        )


def _window_map(network: nn.Module, one: Tensor, fill: Tensor, method: Method) -> tuple[Volume, float, float]:
    """(map, change, gap) of one window (1, c, x, y, z, t)."""
    baseline = make_baseline(one, method.baseline, fill=fill)
    if method.name == "occlusion":
        assert method.regions is not None, "Method checks it"
        falls = occlusion(network, one, method.regions, baseline=baseline, output=method.output, chunk=method.chunk)
        return painted(falls[0].numpy(), method.regions), float("nan"), float("nan")
    found = integrated_gradients(
        network, one, baseline=baseline, output=method.output, steps=method.steps, chunk=method.chunk
    )
    values: Tensor = found.values.abs() if method.magnitude else found.values
    return values.sum((0, 1, 5), dtype=torch.float64).float().cpu().numpy(), float(found.change), float(found.gap)
