"""Read a brain mask: a 3-D NIfTI file, or the mask of a synthetic cohort."""

import numpy as np
import numpy.typing as npt

from fmristream.errors import SourceError
from fmristream.ingest.nifti import open_nifti
from fmristream.ingest.sources.synth import is_synth_mask, synth_mask
from fmristream.signal.grid import SAME_GRID_MM, Grid, Shape3, corner_shift_mm, same_grid
from fmristream.storage.urls import display_url


def read_mask(url: str, shape: Shape3, affine: tuple[tuple[float, ...], ...]) -> npt.NDArray[np.bool_]:
    """The mask (x, y, z) on the given grid; a voxel is inside where its scaled value is finite and not 0.

    Raises:
        SourceError: the file is damaged, no mask, or on another grid.
        StorageError: it cannot be read.
    """
    mask, mask_affine = synth_mask(url) if is_synth_mask(url) else _read_file(url)
    x, y, z = mask.shape
    _check_grid(
        Grid(shape=(x, y, z), affine=_flat(mask_affine)), Grid(shape=shape, affine=_flat(affine)), name=_name(url)
    )
    return mask


def _name(url: str) -> str:
    # Reasons are stored with the dataset: where somebody keeps their files is not for its readers.
    return display_url(url).rstrip("/").rpartition("/")[2]


def _read_file(url: str) -> tuple[npt.NDArray[np.bool_], tuple[tuple[float, ...], ...]]:
    with open_nifti(url, name=_name(url), is_mask=True) as stream:
        header = stream.header
        mask = np.zeros(header.shape, dtype=np.bool_)
        for stored in stream.frames():  # one, and then the end of the file is checked
            values = stored.astype(np.float64) * header.slope + header.inter
            mask = np.ascontiguousarray(np.isfinite(values) & (values != 0))
    return mask, header.affine


def _check_grid(mask: Grid, run: Grid, name: str) -> None:
    if mask.shape != run.shape:
        raise SourceError(
            f"{name}: the mask has {_times(mask.shape)} voxels, the run {_times(run.shape)}; give a mask on the run's grid"
        )
    if not same_grid(mask, run):
        raise SourceError(
            f"{name}: the mask's affine places a corner voxel {corner_shift_mm(mask, run):.3g} mm away from the run's "
            f"(allowed: {SAME_GRID_MM:g} mm); give a mask on the run's grid"
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _flat(affine: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    return tuple(value for row in affine for value in row)
