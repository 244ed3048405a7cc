"""A brain mask from a mean image: nilearn's, with its failures on unusual images turned into an empty mask."""

import warnings

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import MissingExtraError


def compute_mask(mean: NDArray[np.float64], affine: tuple[float, ...]) -> NDArray[np.bool_]:
    """EPI mask of a mean image (x, y, z), C-ordered; empty where nilearn finds no brain.

    Source: `nilearn.masking.compute_epi_mask` with its defaults (Nichols' histogram criterion).

    Raises:
        MissingExtraError: nilearn is not installed.
    """
    try:
        import nibabel
        from nilearn.masking import compute_epi_mask
    except ImportError as error:
        raise MissingExtraError(
            "computing brain masks needs nilearn: pip install 'fmristream[neuro]', or give --mask PATH or --mask none"
        ) from error
    if mean.min() == mean.max():
        return np.zeros(mean.shape, dtype=bool)  # nilearn would take half of it: every voxel reaches the threshold
    largest = float(np.finfo(np.float32).max)
    image = nibabel.Nifti1Image(np.clip(mean, -largest, largest).astype(np.float32), np.array(affine).reshape(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the mask is empty" and the like: said in our own words by the planner
        try:
            found = compute_epi_mask(image)
        except (ValueError, TypeError, IndexError):
            # Single slices and near-constant images break the histogram or the opening: no believable brain in them.
            return np.zeros(mean.shape, dtype=bool)
    return np.ascontiguousarray(np.asanyarray(found.dataobj), dtype=bool)
