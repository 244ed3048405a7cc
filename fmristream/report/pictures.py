"""Draw a run on one page. The only importer of matplotlib; figures are made and dropped, no global state is touched."""

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.errors import MissingExtraError
from fmristream.report.look import Look, Volume
from fmristream.report.orientation import axis_codes, voxel_sizes_mm
from fmristream.report.slices import Slice, choose_slices, cropped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

PAGE_INCHES = (13.5, 7.6)
DPI = 110
GREY = "0.35"

# Name, colour map; limits are taken of what is shown.
ROWS = (("mean", "gray"), ("SD", "magma"), ("tSNR", "viridis"))
PERCENTILES = (1, 99)
CARPET_LIMIT_Z = 2.0
CARPET_PIXELS = 600


def require_matplotlib() -> None:
    """Raise before the work starts if it cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib: pip install 'fmristream[neuro]'") from error


def draw(look: Look, run: Run) -> bytes:
    """The page as PNG."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=PAGE_INCHES, dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    head, body = figure.subfigures(2, 1, height_ratios=(0.085, 1))
    _draw_title(head, run, is_volume=look.mean is not None)
    if look.mean is None or look.sd is None or look.tsnr is None:
        _draw_time(body, look, run)
    else:
        images, time = body.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.02)
        _draw_images(images, (look.mean, look.sd, look.tsnr), run)
        _draw_time(time, look, run)
    page = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a run's name may be in any script
        canvas.print_png(page)
    return page.getvalue()


def _draw_title(head: "SubFigure", run: Run, *, is_volume: bool) -> None:
    sizes = "×".join(f"{edge:.3g}" for edge in voxel_sizes_mm(run.affine_matrix))
    shape = "×".join(str(count) for count in run.shape)
    place = (
        f"grid {shape} {axis_codes(run.affine_matrix)}, {sizes} mm",
        f"{run.voxels:,} voxels stored ({run.voxels / np.prod(run.shape):.0%})",
    )
    facts = (
        f"{run.frames} frame{'s' if run.frames != 1 else ''}",
        "TR unknown" if run.tr_s is None else f"TR {run.tr_s:g} s",
        *(place if is_volume else (f"{run.voxels:,} grayordinates",)),
        run.numpy_dtype.name,
        f"space {run.space or 'unknown'}",
        *([run.split] if run.split else []),
    )
    head.text(0.01, 0.62, run.name, fontsize=13, fontweight="bold", va="center", parse_math=False)
    head.text(0.01, 0.12, "  ·  ".join(facts), fontsize=9.5, color=GREY, va="center", parse_math=False)


def _draw_images(panel: "SubFigure", shown: tuple[Volume, Volume, Volume], run: Run) -> None:
    volumes = cropped(shown, run.affine_matrix)
    cuts = choose_slices(volumes[0], run.affine_matrix)
    axes = panel.subplots(len(ROWS), len(cuts), squeeze=False, width_ratios=[cut.width_mm for cut in cuts])
    for row, ((name, colours), volume) in enumerate(zip(ROWS, volumes, strict=True)):
        limits = _limits(volume)
        for column, cut in enumerate(cuts):
            image = _draw_slice(axes[row][column], cut, volume, colours, limits)
        axes[row][0].set_ylabel(name, fontsize=11)
        if limits is None:
            continue
        bar = panel.colorbar(image, ax=list(axes[row]), shrink=0.8, aspect=18, pad=0.02)
        bar.ax.tick_params(labelsize=8, colors=GREY, length=2)
        bar.outline.set_visible(False)
    panel.supxlabel("sides from the affine; the left of the brain is on the left", fontsize=8, color=GREY)


def _draw_slice(
    axes: "Axes", cut: Slice, volume: NDArray[np.float32], colours: str, limits: tuple[float, float] | None
) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if limits is None:
        axes.text(0.5, 0.5, "no change over time", transform=axes.transAxes, fontsize=8, color=GREY, ha="center")
        return None
    image = axes.imshow(
        cut.of(volume),
        origin="lower",
        extent=(0, cut.width_mm, 0, cut.height_mm),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
    )
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    for place, side, ha in ((0.0, cut.sides[0], "left"), (1.0, cut.sides[1], "right")):
        axes.text(place, 0.0, side, transform=axes.transAxes, fontsize=8, color=GREY, ha=ha, va="bottom", bbox=paper)
    return image


def _limits(volume: NDArray[np.float32]) -> tuple[float, float] | None:
    """What the colours span; None where there is nothing to show."""
    values = volume[np.isfinite(volume)]
    if not values.size:
        return None
    low, high = (float(limit) for limit in np.percentile(values, PERCENTILES))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _draw_time(panel: "SubFigure", look: Look, run: Run) -> None:
    signal, change, carpet = panel.subplots(3, 1, sharex=True, height_ratios=(1, 1, 5.5))
    unit, step = _time_unit(run)
    times = (np.arange(run.frames) + 0.5) * step
    _draw_trace(signal, times, look.global_signal, name="global signal\n(mean z)", colour="tab:blue")
    _draw_trace(change, times, look.change, name="frame change\n(RMS of Δz)", colour="tab:red")
    carpet.set_xlim(0, run.frames * step)
    carpet.set_xlabel(unit, fontsize=9)
    carpet.tick_params(labelsize=8, colors=GREY, length=2)
    carpet.set_yticks([])
    if look.carpet.size == 0:
        carpet.text(0.5, 0.5, "no voxel changes over time", transform=carpet.transAxes, ha="center", color=GREY)
        return
    image = carpet.imshow(
        # Rows are averaged to pixels; columns are to stay columns, so they are made at least as wide as pixels.
        np.repeat(look.carpet, -(-CARPET_PIXELS // run.frames), axis=1),
        aspect="auto",
        extent=(0, run.frames * step, look.carpet.shape[0], 0),
        cmap="gray",
        vmin=-CARPET_LIMIT_Z,
        vmax=CARPET_LIMIT_Z,
        interpolation="antialiased",
    )
    which = "all" if len(look.carpet) == look.voxels else f"{len(look.carpet):,} of"
    carpet.set_ylabel(f"{which} {look.voxels:,} voxels, by correlation\nwith the global signal", fontsize=8)
    bar = panel.colorbar(image, ax=carpet, shrink=0.3, aspect=18, pad=0.01)
    bar.ax.set_title("z", fontsize=8)
    bar.set_ticks([-CARPET_LIMIT_Z, 0, CARPET_LIMIT_Z])
    bar.ax.tick_params(labelsize=8, colors=GREY, length=2)
    bar.outline.set_visible(False)


def _draw_trace(
    axes: "Axes", times: NDArray[np.floating[Any]], values: NDArray[np.float32], *, name: str, colour: str
) -> None:
    axes.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    axes.tick_params(labelsize=8, colors=GREY, length=2)
    axes.tick_params(bottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.margins(y=0.15)
    if np.isfinite(values).any():
        axes.plot(times, values, color=colour, linewidth=0.9, marker="." if len(values) < 3 else "")
    else:
        axes.set_yticks([])


def _time_unit(run: Run) -> tuple[str, float]:
    """What the time axis counts, and how much of it a frame takes."""
    if run.tr_s is None:
        return "frame", 1.0
    return ("minutes", run.tr_s / 60) if run.tr_s * run.frames > 180 else ("seconds", run.tr_s)
