"""Kernels of the read path against numpy: float16 bit by bit, the grid voxel by voxel."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.signal import read_kernels
from fmristream.signal.grid import stretches_of


def around_every_half() -> np.ndarray:
    """Every float16, what lies exactly between two of them, and float32's neighbours of these; both signs."""
    halves = np.arange(2**15, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    between = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, between, np.float32([65519.99, 65520, 65521, 1e38, np.inf])])
    near = np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))])
    return np.concatenate([near, -near])


def as_half(values: np.ndarray) -> np.ndarray:
    out = np.empty(values.size, dtype=np.uint16)
    read_kernels.to_half(values, out)
    return out


def test_float16_is_numpys_in_every_bit():
    values = around_every_half()
    with np.errstate(over="ignore"):
        assert np.array_equal(as_half(values), values.astype(np.float16).view(np.uint16))


def test_float16_of_nan_is_nan():
    assert np.isnan(as_half(np.float32([np.nan])).view(np.float16)).all()


def test_a_processor_without_the_instruction_rounds_the_same(tmp_path):
    program = (
        "import numpy as np\n"
        "from tests.signal.test_read_kernels import around_every_half, as_half\n"
        "from fmristream.signal.read_kernels import HAS_HALF\n"
        "values = around_every_half()\n"
        "np.seterr(all='ignore')\n"
        "print(HAS_HALF, np.array_equal(as_half(values), values.astype(np.float16).view(np.uint16)))\n"
    )
    machine = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={**os.environ, **machine}
    )
    assert done.stdout.split()[1] == "True"


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 1000), st.sampled_from(["<f4", "<u2"]))
def test_stretches_put_every_voxel_where_its_position_says(mask, seed, dtype):
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(mask)
    positions[rng.random(len(positions)) < 0.2] = -1
    row = rng.integers(1, 60_000, len(positions)).astype(dtype)
    out = np.empty(len(mask), dtype=dtype)
    read_kernels.place(row, stretches_of(positions), out.dtype.type(7), out)
    expected = np.full(len(mask), 7, dtype=dtype)
    expected[positions[positions >= 0]] = row[positions >= 0]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["<i1", "<i2", "<f4"])
def test_a_scale_for_each_voxel_is_applied_as_by_numpy(dtype):
    rng = np.random.default_rng(0)
    frames = rng.integers(-100, 100, (3, 5003)).astype(dtype)
    if dtype == "<f4":
        frames[1, 7], frames[2, 9] = np.nan, np.inf
    delta, inverse = rng.standard_normal((2, 5000)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = (frames[:, :5000].astype(np.float32) - delta) * inverse
    expected[~np.isfinite(expected)] = 0
    for out in (np.empty((3, 5000), np.float32), np.empty((3, 5000), np.uint16)):
        read_kernels.normalize_voxels(frames, delta, inverse, out)
        found = out if out.dtype == np.float32 else out.view(np.float16)
        assert np.array_equal(found, expected.astype(found.dtype))
