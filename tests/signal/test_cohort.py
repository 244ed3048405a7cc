"""Statistics of cohorts against numpy and scikit-learn, exact or within what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from fmristream.errors import UsageError
from fmristream.signal.cohort import Components, Moments, Quantiles, Ranges


def fed(accumulator, values: np.ndarray, *, step: int = 7) -> dict[str, np.ndarray]:
    for start in range(0, len(values), step):
        block = values[start : start + step]
        accumulator.add(np.arange(start, start + len(block)), block)
    return accumulator.finish()


def quartiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(median of all, interquartile range of what is not 0) in float64."""
    wide = values.astype(np.float64)
    some = np.where(wide == 0, np.nan, wide)
    low, high = np.nanpercentile(some, (25, 75), axis=0)
    return np.median(wide, axis=0), high - low


def test_moments_are_numpys_also_far_from_zero():
    values = (1e6 + np.random.default_rng(0).standard_normal((300, 5))).astype(np.float32)
    found = fed(Moments(5), values)
    wide = values.astype(np.float64)
    np.testing.assert_allclose(found["mean"], wide.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found["sd"], wide.std(0), rtol=1e-9)


def test_ranges_are_of_all_of_voxels_or_of_frames():
    values = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    for kind, axis in (("range", None), ("voxel-range", 0), ("frame-range", 1)):
        accumulator = Ranges(5, kind=kind, frames=30)
        accumulator.add(np.arange(4), values[:4] + 0.5)  # another run, shorter
        found = fed(accumulator, values)
        both = np.stack([values, values])
        both[0, :4] += 0.5
        both[0, 4:] = values[4:]
        expected = both.min() if axis is None else both.min(axis=(0, 1) if axis == 0 else (0, 2))
        np.testing.assert_array_equal(found["low"], np.atleast_1d(expected))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 900), zeros=st.floats(0, 0.9), shift=st.sampled_from([0.0, -3.0, 1e3]),
    drift=st.sampled_from([0.0, 0.05, -1.0]), max_bytes=st.sampled_from([8 * 3 * 64, 8 * 3 * 300, 8 * 3 * 2000]),
)  # fmt: skip
def test_quantiles_are_exact_or_off_by_no_more_than_they_say(seed, count, zeros, shift, drift, max_bytes):
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, (count, 3)) * np.array([1, 30, 1e-4]) + shift + drift * np.arange(count)[:, None]
    values[rng.random(values.shape) < zeros] = 0
    values = values.astype(np.float32)
    found = fed(Quantiles(3, max_bytes=max_bytes), values)
    if (np.count_nonzero(values, axis=0) == 0).any():
        return
    median, iqr = quartiles(values)
    if count <= max_bytes // 24:
        assert (found["error"] == 0).all()
        np.testing.assert_allclose(found["median"], median, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found["iqr"], iqr, rtol=1e-6, atol=1e-12)
    else:
        # Between two values far apart any number is a median; what is stated is how far off the nearer one is.
        wide = np.sort(values.astype(np.float64), axis=0)
        low, high = wide[(count - 1) // 2], wide[count // 2]
        beyond = np.maximum(low - found["median"], found["median"] - high)
        assert (beyond <= found["error"]).all()
        for column in range(3):
            some = np.sort(values[:, column][values[:, column] != 0].astype(np.float64))
            ends = [np.quantile(some, q, method=m) for q in (0.25, 0.75) for m in ("lower", "higher")]
            error = found["error"][column]
            assert ends[2] - ends[1] - error <= found["iqr"][column] <= ends[3] - ends[0] + error


def test_a_parcel_that_is_always_zero_has_no_iqr():
    for max_bytes in (10**6, 8 * 64 * 2):
        found = fed(Quantiles(2, max_bytes=max_bytes), np.stack([np.zeros(200), np.arange(200)], 1).astype(np.float32))
        assert np.isnan(found["iqr"][0])
        assert found["median"][0] == 0


def test_too_little_memory_for_a_quantile_is_refused():
    with pytest.raises(UsageError, match="give max_bytes="):
        Quantiles(200_000, max_bytes=10**6)


@pytest.mark.parametrize("is_exact", [True, False])
def test_components_are_scikit_learns(monkeypatch, is_exact):
    if not is_exact:
        monkeypatch.setattr("fmristream.signal.cohort._EXACT_PCA", 10)
    rng = np.random.default_rng(3)
    mixing = np.linalg.qr(rng.standard_normal((60, 60)))[0] * (0.6 ** np.arange(60))
    values = (100 + rng.standard_normal((500, 60)) @ mixing.T).astype(np.float32)
    found = fed(Components(60, components=5), values)
    expected = PCA(5, svd_solver="full").fit(values.astype(np.float64))
    np.testing.assert_allclose(found["mean"], expected.mean_, rtol=1e-9)
    np.testing.assert_allclose(found["variance"], expected.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(np.abs((found["components"] * expected.components_).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(
        found["variance"].sum() / found["total"][0], expected.explained_variance_ratio_.sum(), rtol=1e-5
    )
    assert (found["components"][np.arange(5), np.abs(found["components"]).argmax(1)] > 0).all()
