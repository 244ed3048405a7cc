"""Grids turned by whole axes, held against nibabel's orientations."""

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import SpaceError, UsageError
from fmristream.signal.grid import target_positions
from fmristream.signal.orientation import Turn, axis_codes, placed_positions, turn_to
from tests.report.test_orientation import affines

SIZES = st.tuples(*[st.integers(1, 6)] * 3)
CODES = ["RAS", "LAS", "LPI", "PIR", "SRA", "ASL"]


def turned_by_nibabel(volume: np.ndarray, affine: np.ndarray, codes: str) -> np.ndarray:
    here = nibabel.io_orientation(affine)
    wanted = nibabel.orientations.axcodes2ornt(codes)
    return nibabel.apply_orientation(volume, nibabel.orientations.ornt_transform(here, wanted))


@given(affines(), SIZES, st.sampled_from(CODES))
def test_a_turned_volume_is_nibabels(affine, shape, codes):
    volume = np.arange(np.prod(shape)).reshape(shape)
    turn = turn_to(codes, affine)
    expected = turned_by_nibabel(volume, affine, codes)
    np.testing.assert_array_equal(turn.of(volume), expected)
    assert turn.shape(shape) == expected.shape
    assert axis_codes(turn.matrix(affine)) == codes


@given(affines(), SIZES, SIZES, st.sampled_from(CODES), st.integers(0, 99))
def test_one_map_turns_pads_and_scatters(affine, shape, grid, codes, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.6
    packed = rng.standard_normal(int(mask.sum()))
    volume = np.zeros(shape)
    volume[mask] = packed
    turned = turned_by_nibabel(volume, affine, codes)
    whole = target_positions(np.ones(turned.shape, dtype=bool), grid)  # held against padding by hand in test_place
    expected = np.zeros(int(np.prod(grid)))
    expected[whole[whole >= 0]] = turned.reshape(-1)[whole >= 0]
    positions = placed_positions(mask, grid, turn_to(codes, affine))
    placed = np.zeros(int(np.prod(grid)))
    placed[positions[positions >= 0]] = packed[positions >= 0]
    np.testing.assert_array_equal(placed, expected)


@given(SIZES, SIZES, st.integers(0, 99))
def test_without_a_turn_the_map_is_that_of_padding(shape, grid, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.6
    np.testing.assert_array_equal(placed_positions(mask, grid, Turn()), target_positions(mask, grid))


@pytest.mark.parametrize("codes", ["", "RA", "RRS", "RAX", "ras", "RASL"])
def test_codes_that_are_none_are_refused(codes):
    with pytest.raises(UsageError, match="one letter each"):
        turn_to(codes, np.eye(4))


@pytest.mark.parametrize("affine", [np.diag([0.0, 1, 1, 1]), np.diag([np.nan, 1, 1, 1])])
def test_an_affine_that_tells_no_directions_is_refused(affine):
    with pytest.raises(SpaceError, match="no volume"):
        turn_to("RAS", affine)
