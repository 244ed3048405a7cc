"""Statistics of a run against slow oracles: Python integers for integer data, extended precision for floats."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmristream.signal.kernels import BLOCK, LANES
from fmristream.signal.measure import (
    MAX_HALF_MEAN_ERROR,
    MAX_HALF_SD_ERROR,
    REFERENCE_FRAMES,
    RunMeasure,
    Statistics,
    background_value,
    moments_of,
    reference_of,
)

SMALL = ("|i1", "|u1", "<i2", "<u2")
LARGE = ("<i4", "<u4", "<i8", "<u8")
FLOATS = ("<f4", "<f8")
SCALES = st.sampled_from([(1.0, 0.0), (0.5, 0.0), (2.0, -10.0), (-1.5, 3.0), (0.1, 0.7), (1e-3, 5.0)])


def measured(
    frames: np.ndarray, *, slope: float = 1.0, inter: float = 0.0
) -> tuple[Statistics, np.ndarray, np.ndarray]:
    """(statistics, reference, residuals) of (t, v) frames, as the run writer computes them."""
    reference = reference_of(list(frames[:REFERENCE_FRAMES]))
    measure = RunMeasure(reference, dtype=frames.dtype, slope=slope, inter=inter)
    residuals = np.zeros_like(frames)
    for frame, residual in zip(frames, residuals, strict=True):
        measure.add(frame.copy(), residual if frames.dtype.kind in "iu" else None)
    return measure.finish(), reference, residuals


@st.composite
def integer_frames(draw, dtypes):
    """(t, v): anything the dtype holds, or a run-like spread about a mean of any size."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = (draw(st.integers(1, 24)), draw(st.integers(1, 5)))
    info = np.iinfo(dtype)
    if draw(st.booleans()):
        return draw(hnp.arrays(dtype, shape))
    centre = draw(st.integers(info.min, info.max))
    spread = draw(st.integers(0, 50))
    low, high = max(info.min, centre - spread), min(info.max, centre + spread)
    return draw(hnp.arrays(dtype, shape, elements=st.integers(low, high)))


def exact_moments(column: list[int], reference: int) -> tuple[Fraction, Fraction]:
    """(mean minus reference, variance), exactly."""
    differences = [value - reference for value in column]
    mean = Fraction(sum(differences), len(differences))
    return mean, Fraction(sum(d * d for d in differences), len(differences)) - mean * mean


@given(integer_frames(SMALL + LARGE))
@example(np.array([[-128], [127]], dtype="|i1"))
@example(np.array([[0, 255]] * 3 + [[255, 0]] * 3, dtype="|u1"))
@example(np.full((20, 2), 2**60, dtype="<i8") + np.arange(40, dtype="<i8").reshape(20, 2) % 7)
@example(np.array([[2**63 - 1], [-(2**63)]], dtype="<i8"))
@example(np.array([[2**64 - 1], [0]], dtype="<u8"))
def test_residual_and_reference_add_up_to_the_value_in_the_stored_dtype(frames):
    _, reference, residuals = measured(frames)
    assert reference.dtype == residuals.dtype == frames.dtype
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(residuals + reference, frames)


@given(integer_frames(SMALL + LARGE))
@example(np.array([[-(2**63)], [2**63 - 1]], dtype="<i8"))
@example(np.array([[2**64 - 1], [2**64 - 2]], dtype="<u8"))
@example(np.array([[-1], [0]], dtype="|i1"))
def test_the_reference_is_the_rounded_mean_of_the_first_frames(frames):
    first = frames[:REFERENCE_FRAMES]
    reference = reference_of(list(first))
    for got, column in zip(reference.tolist(), first.T.tolist(), strict=True):
        assert abs(Fraction(sum(column), len(column)) - got) <= Fraction(1, 2)


@given(integer_frames(SMALL + LARGE))
@example(np.full((20, 2), 2**60, dtype="<i8") + np.arange(40, dtype="<i8").reshape(20, 2) % 7)
@example(np.array([[2**63 - 1], [-(2**63)]], dtype="<i8"))
@example(np.array([[2**64 - 1]] * 17 + [[2**64 - 3]], dtype="<u8"))
@example(np.array([[2**63 - 1]] * 17 + [[-(2**63)]], dtype="<i8"))
def test_mean_and_sd_of_integers_are_those_of_exact_arithmetic(frames):
    statistics, reference, _ = measured(frames)
    for voxel, column in enumerate(frames.T.tolist()):
        delta, variance = exact_moments(column, int(reference[voxel]))
        sd = math.sqrt(variance)
        assert statistics.delta[voxel] == pytest.approx(float(delta), rel=1e-12, abs=1e-9 * sd)
        assert statistics.sd[voxel] == pytest.approx(sd, rel=1e-9)
        assert (statistics.sd[voxel] == 0) == (len(set(column)) == 1)


@given(integer_frames(SMALL + LARGE))
@example(np.array([[-128], [127]] + [[-128]] * 14, dtype="|i1"))
@example(np.array([[0]] * 16 + [[-128]], dtype="|i1"))
@example(np.array([[1]] * 16 + [[-128]], dtype="|i1"))
@example(np.array([[0]] * 16 + [[-(2**31)]], dtype="<i4"))
@example(np.array([[200]] * 16 + [[72]], dtype="|u1"))
@example(np.array([[200]] * 16 + [[71]], dtype="|u1"))
@example(np.array([[0]] * 16 + [[128]], dtype="|u1"))
@example(np.array([[0]] * 16 + [[127]], dtype="|u1"))
@example(np.array([[0]] * 16 + [[2**63]], dtype="<u8"))
@example(np.array([[0]] * 16 + [[2**63 - 1]], dtype="<u8"))
@example(np.array([[-1]] * 16 + [[2**63 - 1]], dtype="<i8"))
def test_wrapping_is_noticed_exactly_when_a_difference_leaves_the_signed_dtype(frames):
    statistics, reference, _ = measured(frames)
    half = 2 ** (8 * frames.dtype.itemsize - 1)
    differences = [
        value - ref for frame in frames.tolist() for value, ref in zip(frame, reference.tolist(), strict=True)
    ]
    assert statistics.residual_wraps == any(not -half <= difference < half for difference in differences)


@given(integer_frames(SMALL + LARGE))
@example(np.array([[2**53 + 1, 2**53 + 3]], dtype="<i8"))
@example(np.array([[-(2**53) - 1, 2**64 - 1 - 2**63]], dtype="<i8"))
@example(np.array([[2**64 - 1, 2**53 + 1]], dtype="<u8"))
def test_every_value_lies_in_the_valid_range_and_the_range_is_tight(frames):
    statistics, _, _ = measured(frames)
    low, high = int(frames.min()), int(frames.max())
    assert statistics.valid_min <= low
    assert high <= statistics.valid_max
    if frames.dtype.itemsize < 8:
        assert (statistics.valid_min, statistics.valid_max) == (low, high)
    assert statistics.valid_min == pytest.approx(low, rel=1e-15)
    assert statistics.valid_max == pytest.approx(high, rel=1e-15)
    assert statistics.nonfinite == 0


def foreground_oracle(values: list[Fraction], slope: float, inter: float) -> tuple[int, float, float, float, float]:
    scaled = [value * Fraction(slope) + Fraction(inter) for value in values]
    mean = sum(scaled) / len(scaled)
    variance = sum((x - mean) ** 2 for x in scaled) / max(len(scaled) - 1, 1)
    return len(scaled), float(mean), math.sqrt(variance), float(min(scaled)), float(max(scaled))


def assert_foreground(
    statistics: Statistics, values: list[Fraction], slope: float, inter: float, *, rel: float
) -> None:
    if not values:
        assert statistics.foreground_count == 0
        assert math.isnan(statistics.foreground_mean)
        assert math.isnan(statistics.foreground_sd)
        return
    count, mean, sd, low, high = foreground_oracle(values, slope, inter)
    size = max(abs(low), abs(high), abs(inter))
    assert statistics.foreground_count == count
    assert statistics.foreground_mean == pytest.approx(mean, abs=rel * size)
    assert statistics.foreground_sd == pytest.approx(sd, rel=rel, abs=rel * size)
    assert statistics.foreground_min == pytest.approx(low, abs=1e-15 * size)
    assert statistics.foreground_max == pytest.approx(high, abs=1e-15 * size)


@given(integer_frames(SMALL), SCALES)
@example(np.zeros((3, 2), dtype="<i2"), (1.0, 0.0))
@example(np.full((3, 2), 5, dtype="<i2"), (2.0, -10.0))
@example(np.full((3, 2), 65535, dtype="<u2"), (1.0, 0.0))
def test_the_foreground_of_small_integers_is_exact(frames, scale):
    slope, inter = scale
    statistics, _, _ = measured(frames, slope=slope, inter=inter)
    values = [Fraction(v) for v in frames.ravel().tolist() if v * slope + inter != 0]
    assert_foreground(statistics, values, slope, inter, rel=1e-14)


@given(integer_frames(LARGE), SCALES)
@example(np.full((3, 2), 2**31 - 1, dtype="<i4"), (1.0, 0.0))
@example(np.zeros((3, 2), dtype="<i4"), (1.0, 0.0))
def test_the_foreground_of_large_integers_is_that_of_double_precision(frames, scale):
    slope, inter = scale
    statistics, _, _ = measured(frames, slope=slope, inter=inter)
    background, exists = background_value(frames.dtype, slope, inter)
    values = [Fraction(v) for v in frames.ravel().tolist() if not (exists and v == int(background))]
    assert_foreground(statistics, values, slope, inter, rel=1e-7)


@st.composite
def float_frames(draw):
    """(t, v): BOLD-like values, constant voxels, zeros, and NaN or infinity here and there."""
    dtype = np.dtype(draw(st.sampled_from(FLOATS)))
    shape = (draw(st.integers(1, 24)), draw(st.integers(1, 5)))
    elements = st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0]))
    if draw(st.booleans()):
        elements |= st.sampled_from([math.nan, math.inf, -math.inf])
    frames = draw(hnp.arrays(dtype, shape, elements=elements))
    if draw(st.booleans()):
        frames[:, draw(st.integers(0, shape[1] - 1))] = draw(st.floats(-1e6, 1e6, width=8 * dtype.itemsize))
    return frames


@given(float_frames(), SCALES)
@example(np.full((5, 1), 0.1), (1.0, 0.0))
@example(np.full((3, 1), 1 / 3), (1.0, 0.0))
@example(np.array([[math.nan, 1.0], [math.nan, 2.0]]), (1.0, 0.0))
@example(np.array([[math.inf, 1.0], [-math.inf, 2.0], [3.0, math.nan]], dtype="<f4"), (2.0, -10.0))
def test_statistics_of_floats_are_over_the_finite_values_only(frames, scale):
    slope, inter = scale
    statistics, _, _ = measured(frames, slope=slope, inter=inter)
    finite = np.isfinite(frames)
    assert statistics.nonfinite == int((~finite).sum())
    assert not statistics.residual_wraps
    for voxel in range(frames.shape[1]):
        column = [Fraction(float(x)) for x in frames[finite[:, voxel], voxel]]
        if not column:
            assert statistics.sd[voxel] == 0
            continue
        mean = sum(column) / len(column)
        sd = math.sqrt(sum((x - mean) ** 2 for x in column) / len(column))
        assert statistics.delta[voxel] == pytest.approx(float(mean), rel=1e-12, abs=1e-9 * sd)
        assert statistics.sd[voxel] == pytest.approx(sd, rel=1e-6)
        if len(set(column)) == 1:
            assert statistics.sd[voxel] == 0, "a voxel that never changes has an SD of exactly 0"
            assert statistics.delta[voxel] == column[0]
    values = frames[finite]
    if values.size:
        assert (statistics.valid_min, statistics.valid_max) == (values.min(), values.max())
    else:
        assert statistics.valid_min > statistics.valid_max
    foreground = [Fraction(float(x)) for x in values if float(x) * slope + inter != 0]
    assert_foreground(statistics, foreground, slope, inter, rel=1e-7)


@pytest.mark.parametrize("huge", [1e300, -1e300, 1.7e308])
def test_doubles_beyond_what_can_be_squared_neither_warn_nor_stop(huge):
    statistics, _, _ = measured(np.array([[huge, 1.0], [-huge, 2.0], [huge, 3.0]]))
    assert statistics.sd[1] == pytest.approx(math.sqrt(2 / 3))
    assert moments_of(statistics, dtype=np.dtype("<f8")).shape == (2, 2)


def test_a_voxel_that_starts_far_from_its_mean_keeps_its_sd():
    rng = np.random.default_rng(0)
    frames = (10_000 + rng.normal(0, 1, (2000, 3))).astype("<f4")
    frames[:REFERENCE_FRAMES] *= 3
    statistics, _, _ = measured(frames)
    np.testing.assert_allclose(statistics.sd, frames.astype(np.longdouble).std(axis=0).astype(float), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "spread"), [("<i2", 3000), ("<u2", 30_000), ("|i1", 120)])
def test_sums_of_recent_frames_are_carried_over_exactly_whatever_the_block(dtype, spread):
    info = np.iinfo(dtype)
    rng = np.random.default_rng(1)
    centre = (info.min + info.max) // 2
    voxels = 2 * BLOCK + 7
    frames = rng.integers(max(info.min, centre - spread), min(info.max, centre + spread), (700, voxels)).astype(dtype)
    frames[:, BLOCK:] = np.clip(frames[:, BLOCK:], centre - 1, centre + 1)  # a block that grows slowly
    frames[500:, -1] = info.max
    statistics, reference, _ = measured(frames)
    differences = frames.astype(np.int64) - reference
    mean = differences.sum(axis=0) / 700
    np.testing.assert_array_equal(statistics.delta, mean)
    np.testing.assert_array_equal(statistics.sd, np.sqrt(np.maximum((differences**2).sum(axis=0) / 700 - mean**2, 0)))
    inside = frames[frames != 0].astype(np.int64)
    total, squares = int(inside.sum()), int((inside**2).sum())
    assert statistics.foreground_count == len(inside)
    assert statistics.foreground_mean == total / len(inside)
    exact = Fraction(squares * len(inside) - total * total, len(inside) * (len(inside) - 1))
    assert statistics.foreground_sd == pytest.approx(math.sqrt(exact), rel=1e-15)


def test_a_value_that_is_not_finite_touches_only_its_own_voxel():
    rng = np.random.default_rng(2)
    frames = rng.normal(1000, 10, (40, 2 * LANES + 5)).astype("<f4")
    frames[7, LANES + 3] = math.nan
    frames[8:30, LANES + 4] = -math.inf
    frames[:, 1] = 0
    frames[3, 1] = -5
    statistics, _, _ = measured(frames)
    kept = np.ma.masked_invalid(frames.astype(np.float64))
    np.testing.assert_allclose(statistics.delta, kept.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sd, kept.std(axis=0), rtol=1e-9)
    assert statistics.nonfinite == 23
    inside = kept[kept != 0].compressed()
    assert statistics.foreground_count == len(inside)
    assert statistics.foreground_mean == pytest.approx(inside.mean(), rel=1e-12)
    assert statistics.foreground_sd == pytest.approx(inside.std(ddof=1), rel=1e-12)
    assert (statistics.foreground_min, statistics.valid_min, statistics.valid_max) == (-5, -5, inside.max())


def test_a_long_run_of_16_bit_extremes_is_summed_without_overflow():
    frames = np.tile(np.array([[0, 65535], [65535, 0]], dtype="<u2"), (3000, 1))
    statistics, reference, _ = measured(frames)
    np.testing.assert_allclose(statistics.sd, 32767.5, rtol=1e-12)
    np.testing.assert_allclose(statistics.delta + reference, 32767.5, rtol=1e-12)
    assert statistics.foreground_count == 6000


@settings(max_examples=300)
@given(integer_frames(SMALL))
def test_moments_in_half_precision_move_no_z_score_by_more_than_promised(frames):
    statistics, _, residuals = measured(frames)
    moments = moments_of(statistics, dtype=frames.dtype).astype(np.float64)
    changing = statistics.sd > 0
    np.testing.assert_array_equal(moments[1][~changing], 0)
    assert (moments[1][changing] > 0).all()
    sd, delta = statistics.sd[changing], statistics.delta[changing]
    stored_delta, stored_sd = moments[:, changing]
    assert (np.abs(stored_sd / sd - 1) <= MAX_HALF_SD_ERROR).all()
    wide = frames[:, changing].astype(np.float64) - (frames - residuals)[:, changing]  # residuals without wrap-around
    exact = (wide - delta) / sd
    stored = (wide - stored_delta) / stored_sd
    assert (np.abs(stored * (stored_sd / sd) - exact) <= MAX_HALF_MEAN_ERROR * (1 + 1e-9)).all()
    bound = (MAX_HALF_MEAN_ERROR + np.abs(exact) * MAX_HALF_SD_ERROR) / (1 - MAX_HALF_SD_ERROR)
    assert (np.abs(stored - exact) <= bound * (1 + 1e-9) + 1e-12).all()


def statistics_of(delta: list[float], sd: list[float]) -> Statistics:
    return Statistics(
        delta=np.array(delta), sd=np.array(sd), valid_min=0, valid_max=1, nonfinite=0, residual_wraps=False,
        foreground_count=0, foreground_mean=0, foreground_sd=0, foreground_min=0, foreground_max=0,
    )  # fmt: skip


sds = st.floats(2**-20, 2**12)
deltas = st.floats(-30_000, 30_000)


@settings(max_examples=500)
@given(st.lists(st.tuples(deltas, sds), min_size=1, max_size=3))
@example([(1000.49, 256.0)])
@example([(2000.9, 100.0)])
@example([(0.0, 2**-16 * (1 + 2**-9))])  # float16 has gaps of 2^-24 down there
@example([(0.0, 2**-14 * 1.0005)])
def test_half_precision_is_never_used_beyond_its_bounds_nor_refused_within_them(voxels):
    statistics = statistics_of([delta for delta, _ in voxels], [sd for _, sd in voxels])
    half = np.array(voxels).T.astype(np.float16).astype(np.float64)
    mean_errors = np.abs(half[0] - statistics.delta) / statistics.sd
    sd_errors = np.abs(half[1] / statistics.sd - 1)
    harmless = (mean_errors <= MAX_HALF_MEAN_ERROR).all() and (sd_errors <= MAX_HALF_SD_ERROR).all()
    assert (moments_of(statistics, dtype=np.dtype("<i2")).dtype == np.float16) == harmless


def test_moments_are_half_precision_only_for_small_integers():
    fine = statistics_of([0.25, -3.0], [10.0, 20.0])
    for dtype in SMALL:
        assert moments_of(fine, dtype=np.dtype(dtype)).dtype == np.float16
    for dtype in (*LARGE, *FLOATS):
        expected = np.float64 if dtype == "<f8" else np.float32
        assert moments_of(fine, dtype=np.dtype(dtype)).dtype == expected


@pytest.mark.parametrize(
    ("delta", "sd"),
    [([100.3], [0.01]), ([70_000.0], [1.0]), ([0.0], [1e-6]), ([0.0], [1e-8]), ([1000.3], [10.0]), ([0.0], [70_000.0])],
)
def test_one_voxel_that_half_precision_would_harm_makes_all_single(delta, sd):
    stats = statistics_of([0.0, *delta], [1.0, *sd])
    moments = moments_of(stats, dtype=np.dtype("<i2"))
    assert moments.dtype == np.float32
    np.testing.assert_allclose(moments, [stats.delta, stats.sd], rtol=2**-24)


def test_a_voxel_that_never_changes_does_not_forbid_half_precision():
    assert moments_of(statistics_of([0.123456, 0.0], [0.0, 5.0]), dtype=np.dtype("<i2")).dtype == np.float16


float32s = st.floats(-1e6, 1e6, width=32)


@given(st.sampled_from(SMALL), float32s.filter(lambda slope: slope != 0), float32s)
@example("<i2", 1.0, 0.0)
@example("|u1", 2.0, -10.0)
@example("|u1", -1.0, 255.0)
@example("<u2", 1e-45, 1.0)
@example("<i2", 0.1, 0.3)
def test_the_background_is_the_one_stored_integer_that_scales_to_zero(dtype, slope, inter):
    value, exists = background_value(np.dtype(dtype), slope, inter)
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1, dtype=np.float64)
    zeros = every[every * slope + inter == 0]
    assert exists == (len(zeros) == 1)
    assert value.dtype == np.dtype(dtype)
    if exists:
        assert value == zeros[0]


@given(st.sampled_from(FLOATS), float32s.filter(lambda slope: slope != 0), float32s)
@example("<f4", 1e-45, 1.0)
@example("<f8", 1.0, 0.0)
def test_a_float_background_scales_to_exactly_zero(dtype, slope, inter):
    value, exists = background_value(np.dtype(dtype), slope, inter)
    assert value.dtype == np.dtype(dtype)
    if exists:
        assert float(value) * slope + inter == 0


@given(st.floats(-1e6, 1e6, width=32), float32s.filter(lambda slope: abs(slope) > 1e-3))
def test_a_float_background_is_found_where_there_is_one(stored, slope):
    inter = -(stored * slope)
    value, exists = background_value(np.dtype("<f4"), slope, inter)
    assert exists
    assert value == np.float32(stored)
