"""Lossy codes against numpy in float64: the bound holds for every value, and what must stay exact does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmristream.errors import SourceError
from fmristream.signal.quantize import LOSSY_CODECS, Quantizer, RangeMeasure, dequantize, quantization_of

FRAMES, VOXELS = 21, 9
INTEGERS = ("|u1", "|i1", "<i2", "<u2", "<i4", "<u4")
FLOATS = ("<f4", "<f8")


def coded(values: np.ndarray, codec: str, *, slope: float = 1.0, inter: float = 0.0):
    """(quantizer, codes, decoded values, escapes of each frame)."""
    measure = RangeMeasure(frames=len(values), dtype=values.dtype)
    for frame in values:
        measure.add(frame)
    scale = measure.finish(LOSSY_CODECS[codec])
    quantizer = Quantizer(codec=LOSSY_CODECS[codec], scale=scale, dtype=values.dtype, slope=slope, inter=inter)
    codes = np.empty(values.shape, dtype=quantizer.codec.code_dtype)
    decoded = np.empty(values.shape, dtype=quantizer.decoded.dtype)
    escapes = []
    for t, frame in enumerate(values):
        positions, exact = quantizer.encode(frame, codes[t])
        escapes.append((positions.copy(), exact.copy()))
        decoded[t] = quantizer.decoded
    return quantizer, codes, decoded, escapes


def errors_sd(values: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """(t, v) by the definition; finite values only, infinite where a constant voxel is off."""
    wide = np.where(np.isfinite(values), values, np.nan).astype(np.longdouble)
    with np.errstate(all="ignore"):
        count = np.maximum(np.isfinite(wide).sum(0), 1)
        mean = np.nansum(wide, axis=0) / count
        sd = np.sqrt(np.nansum((wide - mean) ** 2, axis=0) / count)
        constant = np.nanmin(np.where(np.isnan(wide), np.inf, wide), axis=0) == np.nanmax(
            np.where(np.isnan(wide), -np.inf, wide), axis=0
        )
        error = np.abs(decoded.astype(np.longdouble) - wide)
        relative = np.where(error == 0, 0, np.where(constant, np.inf, error / np.where(sd > 0, sd, np.nan)))
    return np.where(np.isfinite(wide), relative, 0).astype(np.float64)


def assert_faithful(values: np.ndarray, codec: str, **scaling) -> None:
    quantizer, codes, decoded, escapes = coded(values, codec, **scaling)
    errors, record = errors_sd(values, decoded), quantizer.record()
    assert errors.max() <= record["bound_sd"] * (1 + 1e-9)
    assert record["max_error_sd"] == pytest.approx(errors.max(), rel=1e-6, abs=1e-9)
    assert record["escaped"] == sum(len(positions) for positions, _ in escapes)
    finite = np.isfinite(values)
    assert np.array_equal(np.isnan(decoded), np.isnan(values))
    assert np.array_equal(decoded[np.isinf(values)], values[np.isinf(values)].astype(decoded.dtype))
    assert np.array_equal(decoded[finite] == 0, values[finite] == 0), "the background stays, and nothing else joins it"
    # What a reader makes of codes and escapes, by numpy: the very same bits.
    step, offset = quantization_of(quantizer.scale).astype(np.float64)
    with np.errstate(all="ignore"):
        again = (codes * step + offset).astype(decoded.dtype)
    for t, (positions, exact) in enumerate(escapes):
        assert np.array_equal(np.flatnonzero(codes[t] == quantizer.codec.escape), positions)
        again[t, positions] = exact
    assert again.tobytes() == decoded.tobytes()
    ours = np.empty_like(decoded[0])
    dequantize(codes[0], quantization_of(quantizer.scale), ours)
    here = codes[0] != quantizer.codec.escape
    assert ours[here].tobytes() == decoded[0][here].tobytes()


def bold(dtype: str, *, sd: float = 30.0, mean: float = 1000.0) -> np.ndarray:
    noise = np.random.default_rng(5).normal(mean, sd, (FRAMES, VOXELS))
    return noise.clip(*((-100, 127) if dtype == "|i1" else (0, 255) if dtype == "|u1" else (-1e9, 1e9))).astype(dtype)


@pytest.mark.parametrize("codec", ["int8", "int16"])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_bold_is_held_within_the_bound(dtype, codec):
    values = bold(dtype, mean=60 if dtype[1:] in ("u1", "i1") else 1000)
    values[:, 0] = 0
    values[:, 1] = 7
    values[3:5, 2] = 0
    assert_faithful(values, codec)


@pytest.mark.parametrize("codec", ["int8", "int16"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_infinity_and_voxels_without_a_value_survive(dtype, codec):
    values = bold(dtype)
    values[4, 0], values[5, 1], values[6, 1] = np.nan, np.inf, -np.inf
    values[:, 2], values[:, 3], values[1:, 4] = np.nan, np.inf, np.nan
    assert_faithful(values, codec)
    _, _, _, escapes = coded(values, codec)
    assert sum(len(positions) for positions, _ in escapes) == 3 + FRAMES - 1, "a voxel that is always NaN costs nothing"


def test_a_spike_is_stored_exactly_and_does_not_coarsen_the_rest():
    values = np.random.default_rng(0).normal(1000, 10, (200, 3)).astype("<f4")
    values[50, 1] = 90_000
    _, codes, decoded, _ = coded(values, "int8")
    assert codes[50, 1] == -128
    assert decoded[50, 1] == values[50, 1]
    assert np.abs(decoded - values).max() <= 0.025 * values[:, 1].std()
    assert_faithful(values, "int8")


@pytest.mark.parametrize("dtype", ["|u1", "<i2", "<u2"])
def test_integers_of_a_small_range_lose_nothing(dtype):
    values = np.random.default_rng(1).integers(3, 250, (FRAMES, VOXELS)).astype(dtype)
    _, _, decoded, escapes = coded(values, "int8")
    assert np.array_equal(decoded, values)
    assert not any(len(positions) for positions, _ in escapes)


def test_a_background_that_is_not_stored_as_zero_stays_what_it_is():
    values = bold("<i2", sd=400)
    values[2:9, 3] = 200
    _, _, decoded, _ = coded(values, "int8", slope=0.5, inter=-100.0)
    assert np.array_equal(decoded == 200, values == 200)


@pytest.mark.parametrize("dtype", ["<i8", "<u8"])
def test_integers_that_doubles_cannot_tell_apart_are_refused(dtype):
    values = np.full((4, 2), 2**60, dtype=dtype) + np.arange(4, dtype=dtype)[:, None]
    with pytest.raises(SourceError, match="beyond 2\\^53"):
        coded(values, "int8")


def test_doubles_without_a_finite_sd_are_refused():
    values = np.array([[1e200, 1.0], [-1e200, 2.0], [0.0, 3.0]])
    with pytest.raises(SourceError, match="too far apart"):
        coded(values, "int8")


def test_a_mean_of_many_sds_is_still_held_within_the_bound():
    """Beside a large mean float32 is coarser than the steps: what it cannot say is escaped."""
    values = (1e6 + np.random.default_rng(2).normal(0, 0.5, (FRAMES, VOXELS))).astype("<f4")
    assert_faithful(values, "int8")
    assert_faithful((values.astype("<f8") * 1e3), "int16")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([np.dtype("<f4"), np.dtype("<f8")]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            (5, 4),
            elements=st.floats(-(2.0**99), 2.0**99, width=8 * dtype.itemsize, allow_subnormal=False).map(
                lambda x: 0.0 if abs(x) < 1e-30 else x
            )
            | st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]),
        )
    ),
    st.sampled_from(["int8", "int16"]),
)
def test_any_floats_are_held_within_the_bound(values, codec):
    assert_faithful(values, codec)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["|u1", "|i1", "<i2", "<u2", "<i4", "<u4"]).flatmap(lambda dtype: hnp.arrays(dtype, (5, 4))),
    st.sampled_from(["int8", "int16"]),
)
def test_any_integers_are_held_within_the_bound(values, codec):
    assert_faithful(values, codec)
