"""Every normalisation against its definition, written out again in float64 over the scaled values of the whole run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fmristream
from fmristream.errors import CorruptDataError, UsageError
from fmristream.signal.normalize import RECIPES
from tests.stream.nifti_runs import converted, streamed

SHAPE = (5, 4, 3, 23)
INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4")
FLOATS = ("f4", "f8")


def voxel_z(bold: np.ndarray) -> np.ndarray:
    """Per voxel over its finite frames, population SD; 0 where nothing changes or nothing is known."""
    known = np.isfinite(bold)
    count = np.maximum(known.sum(-1, keepdims=True), 1)
    mean = np.where(known, bold, 0).sum(-1, keepdims=True) / count
    difference = np.where(known, bold, mean) - mean
    sd = np.sqrt((difference**2).sum(-1, keepdims=True) / count)
    ends = [end(np.where(known, bold, mean), axis=-1, keepdims=True) for end in (np.min, np.max)]
    # The mean of equal floats is off by a rounding, which is no change.
    return np.where(ends[0] < ends[1], difference / np.where(sd > 0, sd, 1), 0)


def global_z(bold: np.ndarray, *, background: str) -> np.ndarray:
    """Over all finite values that are not 0; the rest becomes the smallest of them, or 0."""
    inside = np.isfinite(bold) & (bold != 0)
    center, spread = bold[inside].mean(), bold[inside].std(ddof=1)
    return filled(bold, inside, center, spread, background)


def global_minmax(bold: np.ndarray, *, background: str) -> np.ndarray:
    """Finite values that are not 0 onto [0, 1]."""
    inside = np.isfinite(bold) & (bold != 0)
    low, high = bold[inside].min(), bold[inside].max()
    return filled(bold, inside, low, high - low, background)


def filled(bold: np.ndarray, inside: np.ndarray, center: float, spread: float, background: str) -> np.ndarray:
    z = (np.where(inside, bold, center) - center) / spread
    return np.where(inside, z, z[inside].min() if background == "min" else 0.0)


ORACLES = {
    "none": lambda bold: np.where(np.isfinite(bold), bold, 0.0),
    "voxel-zscore": voxel_z,
    "global-zscore": lambda bold: global_z(bold, background="min"),
    "global-zscore-zeroback": lambda bold: global_z(bold, background="zero"),
    "global-minmax": lambda bold: global_minmax(bold, background="min"),
    "global-minmax-zeroback": lambda bold: global_minmax(bold, background="zero"),
}


def brain_like(dtype: str, *, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """An anatomy with fluctuations, a background of zeros, and three voxels that never change."""
    rng = np.random.default_rng(seed)
    top = 100.0 if dtype in ("u1", "i1") else 4000.0
    anatomy = rng.uniform(0.3, 1.0, shape[:3]) * top
    bold = anatomy[..., None] * (1 + 0.05 * rng.standard_normal(shape))
    bold[0] = 0
    bold[1, 0, :3] = anatomy[1, 0, :3, None]
    return np.asfortranarray(bold.astype(f"<{dtype}"))


def full_range(dtype: str, *, seed: int = 0) -> np.ndarray:
    """Every value of the dtype is as likely as any other: differences to the reference wrap."""
    info = np.iinfo(dtype)
    values = np.random.default_rng(seed).integers(info.min, info.max, SHAPE, dtype=np.dtype(dtype), endpoint=True)
    return np.asfortranarray(values.astype(f"<{dtype}"))


def scaled(stored: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> np.ndarray:
    return stored.astype(np.float64) * slope + inter


def check(url: str, bold: np.ndarray, normalize: str, *, atol: float = 2e-5, **options) -> None:
    ours, expected = streamed(url, normalize, **options).astype(np.float64), ORACLES[normalize](bold)
    assert ours.shape == expected.shape
    # What the stored value and float32 leave of a large scaled value counts relative to it.
    np.testing.assert_allclose(ours, expected, atol=atol, rtol=2e-6)


def test_every_recipe_has_an_oracle_here():
    assert set(ORACLES) == set(RECIPES)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_recipes_are_what_they_say_for_every_dtype(tmp_path, dtype):
    stored = brain_like(dtype)
    url = converted(tmp_path, {"1": stored})
    for normalize in ORACLES:
        check(url, scaled(stored), normalize, exact=True)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize(("slope", "inter"), [(0.5, -8.0), (-2.0, 0.0), (-0.25, 16.0), (3.0, 1.5)])
def test_slope_and_intercept_count_and_a_negative_slope_turns_signs(tmp_path, dtype, slope, inter):
    stored = brain_like(dtype)
    stored[2, 2, :, 3] = 16  # (0.5, -8): scales to exactly 0, and is background in this frame
    stored[2, 2, :, 4] = 64  # the same for (-0.25, 16)
    url = converted(tmp_path, {"1": stored}, scl_slope=slope, scl_inter=inter)
    for normalize in ORACLES:
        check(url, scaled(stored, slope, inter), normalize, exact=True)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("slope", [1.0, -0.5])
def test_sources_that_use_their_whole_range_wrap_and_come_out_right(tmp_path, dtype, slope):
    stored = full_range(dtype)
    url = converted(tmp_path, {"1": stored}, scl_slope=slope)
    assert fmristream.open(url).runs[0].residual_wraps
    for normalize in ORACLES:
        check(url, scaled(stored, slope), normalize, exact=True)


@pytest.mark.parametrize("dtype", ["u8", "i8"])
def test_64_bit_integers_of_any_size_are_read_exactly_and_normalised(tmp_path, dtype):
    stored = full_range(dtype)
    url = converted(tmp_path, {"1": stored})
    for normalize in ORACLES:
        check(url, scaled(stored), normalize, exact=True)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2"])
def test_float16_moments_move_no_z_score_by_more_than_they_may(tmp_path, dtype):
    stored = brain_like(dtype)
    url = converted(tmp_path, {"1": stored})
    z = voxel_z(scaled(stored))
    ours = streamed(url, "voxel-zscore").astype(np.float64)
    assert (np.abs(ours - z) <= 2.0**-9 + np.abs(z) * 2.0**-10 + 1e-5).all()
    check(url, scaled(stored), "voxel-zscore", exact=True)


def test_float64_signals_that_ride_on_a_huge_constant_keep_their_z_scores(tmp_path):
    stored = 1e7 + np.random.default_rng(0).standard_normal(SHAPE)
    check(converted(tmp_path, {"1": stored}), stored, "voxel-zscore", atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_left_out_of_statistics_and_filled(tmp_path, dtype):
    stored = brain_like(dtype)
    stored[3, :, :, 5] = np.nan
    stored[3, 1, :, 6] = np.inf
    stored[3, 2, 0, 7] = -np.inf
    stored[4, 3, 2] = np.nan  # never known
    stored[4, 3, 1, 1:] = np.nan  # known once
    url = converted(tmp_path, {"1": stored})
    assert fmristream.open(url).runs[0].nonfinite == int((~np.isfinite(stored)).sum())
    for normalize in ORACLES:
        ours = streamed(url, normalize, exact=True)
        assert np.isfinite(ours).all()
        check(url, scaled(stored), normalize, exact=True)


@pytest.mark.parametrize("dtype", ["i2", "u2", "f4"])
def test_voxels_that_never_change_have_a_z_of_exactly_zero(tmp_path, dtype):
    stored = brain_like(dtype)
    stored[2] = stored[2, ..., :1]
    url = converted(tmp_path, {"1": stored})
    for exact in (False, True):
        assert (streamed(url, "voxel-zscore", exact=exact)[2] == 0).all()


@pytest.mark.parametrize("normalize", sorted(set(ORACLES) - {"none"}))
def test_a_window_is_normalised_by_its_whole_run(tmp_path, normalize):
    stored = brain_like("i2")
    url = converted(tmp_path, {"1": stored})
    clips = fmristream.StreamingDataset(url, window=5, stride=3, normalize=normalize, exact=True)
    expected = ORACLES[normalize](scaled(stored))
    for number in range(len(clips)):
        item = clips[number]
        part = expected[..., item["start"] : item["start"] + 5]
        np.testing.assert_allclose(item["bold"][0], part, atol=2e-5)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(("u1", "i2", "u2", "i4", "f4")), frames=st.integers(1, 40))
def test_any_run_of_any_length_is_normalised_as_defined(tmp_path_factory, seed, dtype, frames):
    stored = brain_like(dtype, seed=seed, shape=(*SHAPE[:3], frames))
    url = converted(tmp_path_factory.mktemp("run"), {"1": stored})
    bold = scaled(stored)
    check(url, bold, "global-zscore", exact=True)
    z = voxel_z(bold)
    # The mean of a float32 source is stored in float32: off by up to half a spacing, which counts where an SD is small.
    sd = bold.std(-1, keepdims=True)
    spacing = np.spacing(bold.mean(-1, keepdims=True).astype(np.float32)) if dtype == "f4" else np.zeros_like(sd)
    rounding = np.divide(spacing, sd, out=np.zeros_like(sd), where=sd > 0)
    ours = streamed(url, "voxel-zscore", exact=True).astype(np.float64)
    assert (np.abs(ours - z) <= 2e-5 + 2e-6 * np.abs(z) + rounding).all()


@pytest.mark.parametrize("stored", [np.zeros(SHAPE, "<i2"), np.full(SHAPE, 7, "<i2")])
@pytest.mark.parametrize("normalize", ["global-zscore", "global-minmax-zeroback"])
def test_a_run_without_spread_is_refused_by_name_only_where_it_is_divided_by_it(tmp_path, stored, normalize):
    url = converted(tmp_path, {"1": stored})
    with pytest.raises(CorruptDataError, match=r"sub-1_bold: its foreground has no spread"):
        streamed(url, normalize)
    assert (streamed(url, "none") == stored).all()
    assert (streamed(url, "voxel-zscore") == 0).all()


def test_a_run_without_spread_raises_when_its_batch_is_due(tmp_path):
    url = converted(tmp_path, {"1": brain_like("i2"), "2": np.zeros(SHAPE, "<i2")})
    clips = fmristream.StreamingDataset(url, window=5, normalize="global-zscore")
    arrived = []
    with fmristream.StreamingLoader(clips, batch_size=2, prefetch_batches=4) as loader:
        with pytest.raises(CorruptDataError, match="sub-2_bold"):
            arrived.extend(loader)
        assert loader.state_dict()["consumed"] == 2 * len(arrived) == 4


def test_an_unknown_recipe_is_refused_and_the_known_ones_are_named(tmp_path):
    url = converted(tmp_path, {"1": brain_like("i2")})
    with pytest.raises(UsageError, match=r"normalize='zscore'.*voxel-zscore"):
        fmristream.StreamingDataset(url, window=5, normalize="zscore")
