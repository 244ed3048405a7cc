"""The compiled loops against numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmristream.signal import kernels
from fmristream.signal.grid import masked_columns

DTYPES = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8")


@pytest.mark.parametrize("shape", [(3, 4, 5), (70, 2, 3), (129, 3, 1), (1, 1, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathering_takes_the_masked_voxels_in_c_order_from_a_fortran_volume(dtype, shape):
    rng = np.random.default_rng(0)
    volume = np.asfortranarray(rng.integers(0, 100, shape).astype(dtype))
    mask = rng.random(shape) < 0.6
    values = np.empty(mask.sum(), dtype=dtype)
    kernels.gather(volume.reshape(-1, shape[2], order="F").T, masked_columns(mask), values)
    np.testing.assert_array_equal(values, volume[mask])


@pytest.mark.parametrize("dtype", DTYPES[:8])
def test_adding_the_reference_wraps_as_numpy_does(dtype):
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    residual = rng.integers(info.min, info.max, (5, 9), dtype=dtype, endpoint=True)
    reference = rng.integers(info.min, info.max, 9, dtype=dtype, endpoint=True)
    values = np.empty_like(residual)
    kernels.add_reference(residual, reference, values)
    np.testing.assert_array_equal(values, residual + reference)


@given(
    hnp.arrays(np.float32, (3, 6), elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.nan, np.inf])),
    hnp.arrays(np.float32, 6, elements=st.floats(-1e3, 1e3, width=32)),
    hnp.arrays(np.float32, 6, elements=st.floats(0, 1e3, width=32)),
)
def test_voxelwise_normalisation_is_a_shift_and_a_scale_and_never_nan(frames, delta, inverse_sd):
    packed = np.full(frames.shape, np.nan, dtype=np.float32)
    kernels.normalize_voxelwise(frames, delta, inverse_sd, packed)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = (frames - delta) * inverse_sd
    assert np.isfinite(packed).all()
    finite = np.isfinite(expected)
    np.testing.assert_allclose(packed[finite], expected[finite], rtol=1e-6)
    np.testing.assert_array_equal(packed[~np.isfinite(frames)], 0)


@pytest.mark.parametrize("dtype", ["<i2", "<f4"])
def test_global_normalisation_fills_the_background_and_what_is_not_finite(dtype):
    frames = np.array([[0, 1, 2], [3, 0, 5]], dtype=dtype)
    expected = frames * 0.5 + 1.0
    expected[frames == 0] = -7
    if dtype == "<f4":
        frames[1, 2] = np.nan
        expected[1, 2] = -7
    packed = np.empty(frames.shape, dtype=np.float32)
    kernels.normalize_globally(frames, 0.5, 1.0, frames.dtype.type(0), True, -7.0, packed)
    np.testing.assert_allclose(packed, expected)


def test_without_a_background_value_nothing_is_filled():
    frames = np.array([[0, 1]], dtype="<i2")
    packed = np.empty(frames.shape, dtype=np.float32)
    kernels.normalize_globally(frames, 2.0, 1.0, np.int16(0), False, -7.0, packed)
    np.testing.assert_array_equal(packed, [[1, 3]])


def test_placing_puts_each_voxel_in_its_position_and_drops_the_negative_ones():
    packed = np.arange(6, dtype=np.float32).reshape(2, 3)
    grid = np.full((2, 5), -1, dtype=np.float32)
    kernels.place(packed, np.array([4, -1, 0]), grid)
    np.testing.assert_array_equal(grid, [[2, -1, -1, -1, 0], [5, -1, -1, -1, 3]])
