"""A map of a run back in the run's own space: on its grid, as a NIfTI file, and drawn over the mean image."""

import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import StorageError, UsageError
from fmristream.report.export import export_volume
from fmristream.report.look import mean_image
from fmristream.report.pictures import require_matplotlib
from fmristream.report.slices import Slice, choose_slices, cropped

if TYPE_CHECKING:
    from fmristream.catalog.run import Run
    from fmristream.stream.clips import StreamingDataset

Volume = NDArray[np.float32]

# The colours' limit: voxels above it are as dark as those at it.
PERCENTILE = 99.5
# What is below this share of the limit is transparent, so that the anatomy is seen.
FAINT_SHARE = 0.1
_GREY = "0.35"


def native_volume(clips: "StreamingDataset", values: Volume) -> Volume:
    """A map (x, y, z) on the grid of the windows, on the stored grid: padding, cutting and turning undone.

    The affine of the result is `clips.affine`. Voxels outside the mask, and those that the windows lack, are 0.

    Raises:
        UsageError: it is not on the grid of the windows.
    """
    if values.shape != clips.grid:
        raise UsageError(f"a map on {values.shape} was given, the windows have the grid {clips.grid}")
    place, flat = clips.positions, values.reshape(-1)
    volume = np.zeros(clips.mask.shape, dtype=np.float32)
    volume[clips.mask] = np.where(place >= 0, flat[np.maximum(place, 0)], 0)
    return volume


def write_map(clips: "StreamingDataset", run: "Run", values: Volume, path: Path) -> None:
    """Write a map on the grid of the windows as NIfTI in the run's space; a file that is there is replaced.

    Raises:
        StorageError: it cannot be written.
    """
    # Runs of one selection share a grid; where they are cut or pooled by the recipe, it is the recipe's.
    affine = run.affine_matrix if is_stored_grid(clips) else clips.affine
    export_volume(native_volume(clips, values), path, affine=affine, space=run.space, force=True)


def is_stored_grid(clips: "StreamingDataset") -> bool:
    """Whether windows have the voxels of the runs, and not those that a recipe pooled or cut out."""
    return clips.mask.shape == clips.runs[0].shape and bool(np.array_equal(clips.affine, clips.runs[0].affine_matrix))


def write_picture(
    clips: "StreamingDataset", run: "Run", values: Volume, path: Path, *, title: str, colours: str = ""
) -> None:
    """Draw a map on the grid of the windows: slices through its peak over the mean image of a run.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError: it cannot be written.
    """
    require_matplotlib()
    volume = native_volume(clips, values)
    # A pooled grid has no stored mean: the brain's outline stands for it.
    ground = mean_image(clips.dataset, run) if is_stored_grid(clips) else np.where(clips.mask, 0, np.nan)
    page = draw_map(volume, ground.astype(np.float32), clips.affine, title=title, colours=colours)
    try:
        path.write_bytes(page)
    except OSError as error:
        raise StorageError(f"{path}: the picture cannot be written: {error.strerror or error}") from error


def draw_map(volume: Volume, ground: Volume, affine: NDArray[np.float64], *, title: str, colours: str = "") -> bytes:
    """Three orthogonal slices through the largest value (slices side by side where the grid is flat), as PNG.

    Args:
        volume: (x, y, z) the map.
        ground: (x, y, z) what it is drawn over; NaN outside the brain.
        affine: (4, 4) voxel to mm of both.
        title: above the slices.
        colours: what they mean, beside their bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ground, volume = cropped([ground, volume], affine)
    limit = _limit(volume)
    cuts = _through_peak(choose_slices(ground, affine), volume)
    figure: Any = Figure(figsize=(11, 4.2), dpi=110, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(1, len(cuts), squeeze=False, width_ratios=[cut.width_mm for cut in cuts])[0]
    for one, cut in zip(axes, cuts, strict=True):
        image = _draw_slice(one, cut, ground, volume, limit)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=22, pad=0.02)
    bar.ax.tick_params(labelsize=8, colors=_GREY, length=2)
    bar.set_label(colours, fontsize=8, color=_GREY)
    figure.supxlabel("sides from the affine; the left of the brain is on the left", fontsize=8, color=_GREY)
    page = io.BytesIO()
    canvas.print_png(page)
    return page.getvalue()


def _draw_slice(axes: Any, cut: Slice, ground: Volume, volume: Volume, limit: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    where = {"origin": "lower", "extent": (0, cut.width_mm, 0, cut.height_mm), "interpolation": "nearest"}
    low, high = _grey_limits(ground)
    axes.imshow(cut.of(ground), cmap="gray", vmin=low, vmax=high, **where)
    values = cut.of(volume)
    strength = np.clip(np.abs(values) / limit, 0, 1)
    alpha = np.where(strength < FAINT_SHARE, 0, strength)
    norm = Normalize(-limit, limit)
    axes.imshow(values, cmap="RdBu_r", norm=norm, alpha=alpha, **where)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    for place, side, ha in ((0.0, cut.sides[0], "left"), (1.0, cut.sides[1], "right")):
        axes.text(place, 0.0, side, transform=axes.transAxes, fontsize=8, color=_GREY, ha=ha, va="bottom", bbox=paper)
    return ScalarMappable(norm=norm, cmap="RdBu_r")


def _through_peak(cuts: list[Slice], volume: Volume) -> list[Slice]:
    """Orthogonal slices moved to where the map is largest; slices of one orientation stay where they are."""
    if len({cut.axis for cut in cuts}) < len(cuts) or not volume.any():
        return cuts
    peak = np.unravel_index(int(np.abs(volume).argmax()), volume.shape)
    return [dataclasses.replace(cut, index=int(peak[cut.axis])) for cut in cuts]


def _limit(volume: Volume) -> float:
    sizes = np.abs(volume[np.isfinite(volume) & (volume != 0)])
    return float(np.percentile(sizes, PERCENTILE)) if len(sizes) else 1.0


def _grey_limits(ground: Volume) -> tuple[float, float]:
    values = ground[np.isfinite(ground)]
    if not len(values):
        return 0.0, 1.0
    low, high = (float(limit) for limit in np.percentile(values, (1, 99)))
    return (low, high) if high > low else (low - 1, low + 1)
