"""Brain masks: read from files and synthetic cohorts, refused where they are on another grid."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmristream.errors import SourceError
from fmristream.ingest.mask_file import read_mask
from fmristream.ingest.run_stream import open_run
from fmristream.ingest.sources import find_runs
from tests.ingest.nifti_files import AFFINE, nifti_bytes

SHAPE = (3, 4, 5)
GRID = (*AFFINE, (0.0, 0.0, 0.0, 1.0))


def mask_file(folder: Path, stored: "np.ndarray[Any, Any]", **lies: Any) -> str:
    path = folder / "mask.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(stored, **lies)))
    return str(path)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_voxel_is_inside_where_its_value_is_not_zero(tmp_path: Path, dtype: str, order: str) -> None:
    inside = np.random.default_rng(0).random(SHAPE) < 0.5
    found = read_mask(mask_file(tmp_path, inside.astype(dtype), order=order), SHAPE, GRID)
    assert found.dtype == np.bool_
    assert np.array_equal(found, inside)


def test_values_that_are_not_finite_or_scale_to_zero_are_outside(tmp_path: Path) -> None:
    stored = np.zeros(SHAPE, "f4")
    stored[0, 0, :4] = [np.nan, np.inf, 2.0, 3.0]
    found = read_mask(mask_file(tmp_path, stored, scl_slope=1.0, scl_inter=-2.0), SHAPE, GRID)
    assert not found[0, 0, :3].any()
    assert found[0, 0, 3]
    assert found[1:].all()  # 0 scales to -2


def test_a_fourth_dimension_of_one_is_a_mask_and_a_run_is_not(tmp_path: Path) -> None:
    assert read_mask(mask_file(tmp_path, np.ones((*SHAPE, 1), "u1")), SHAPE, GRID).all()
    with pytest.raises(SourceError, match="not a mask"):
        read_mask(mask_file(tmp_path, np.ones((*SHAPE, 2), "u1")), SHAPE, GRID)


def test_a_mask_on_another_grid_is_refused_with_both_sizes_or_the_distance(tmp_path: Path) -> None:
    url = mask_file(tmp_path, np.ones(SHAPE, "u1"))
    with pytest.raises(SourceError, match="the mask has 3 x 4 x 5 voxels, the run 3 x 4 x 6"):
        read_mask(url, (3, 4, 6), GRID)
    shifted = np.array(GRID)
    shifted[0, 3] += 0.002
    with pytest.raises(SourceError, match=r"0\.002 mm away"):
        read_mask(url, SHAPE, tuple(map(tuple, shifted.tolist())))
    shifted[0, 3] -= 0.0015
    assert read_mask(url, SHAPE, tuple(map(tuple, shifted.tolist()))).all()


def test_a_damaged_or_missing_mask_is_refused(tmp_path: Path) -> None:
    path = Path(mask_file(tmp_path, np.ones(SHAPE, "u1")))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="cut short"):
        read_mask(str(path), SHAPE, GRID)
    with pytest.raises(SourceError, match="not there"):
        read_mask(str(tmp_path / "absent.nii"), SHAPE, GRID)


def test_the_mask_of_a_synthetic_cohort_fits_its_runs() -> None:
    run = find_runs("synth://?subjects=1&shape=12x14x10&frames=3").runs[0]
    assert run.mask_url is not None
    with open_run(run) as stream:
        frames = [frame.copy() for frame in stream.frames()]
        mask = read_mask(run.mask_url, stream.header.shape, stream.header.affine)
    assert 0 < mask.sum() < mask.size
    assert not any(frame[~mask].any() for frame in frames)
