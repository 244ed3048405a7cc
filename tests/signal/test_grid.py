"""Grids: when two are one, in which order voxels are stored, how a volume is padded or cut."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmristream.signal.grid import (
    MIN_MASK_VOXELS,
    SAME_GRID_MM,
    Grid,
    corner_shift_mm,
    fortran_positions,
    is_believable,
    masked_columns,
    pad_before,
    same_grid,
    stored_order,
    target_positions,
)

sizes = st.integers(1, 12)
shapes = st.tuples(sizes, sizes, sizes)
masks = shapes.flatmap(lambda shape: hnp.arrays(np.bool_, shape))
MNI = (-2.0, 0, 0, 90, 0, 2, 0, -126, 0, 0, 2, -72, 0, 0, 0, 1)


def grid(shape=(91, 109, 91), **changes: float) -> Grid:
    affine = list(map(float, MNI))
    for place, change in changes.items():
        affine[int(place[1:])] += change
    return Grid(shape=shape, affine=tuple(affine))


def test_a_grid_is_the_same_as_itself():
    assert same_grid(grid(), grid())
    assert corner_shift_mm(grid(), grid()) == 0


def test_another_shape_is_another_grid():
    assert not same_grid(grid(), grid(shape=(91, 109, 90)))
    assert corner_shift_mm(grid(), grid(shape=(91, 109, 90))) == float("inf")


@pytest.mark.parametrize("place", [3, 7, 11])
def test_a_shift_counts_as_it_is(place):
    assert same_grid(grid(), grid(**{f"a{place}": 0.9e-3}))
    assert not same_grid(grid(), grid(**{f"a{place}": 1.1e-3}))


def test_a_change_of_voxel_size_counts_at_the_far_corner():
    assert corner_shift_mm(grid(), grid(a0=1e-5)) == pytest.approx(90 * 1e-5, rel=1e-9)
    assert same_grid(grid(), grid(a0=1e-5))
    assert not same_grid(grid(), grid(a0=1.2e-5))


def test_an_affine_that_is_not_finite_is_the_same_as_none():
    assert not same_grid(grid(a3=float("nan")), grid(a3=float("nan")))


affine_noise = hnp.arrays(np.float64, 12, elements=st.floats(-1e-4, 1e-4))


@given(shapes, affine_noise)
def test_no_voxel_moves_further_than_the_corner_that_moves_most(shape, noise):
    one = Grid(shape=shape, affine=tuple(map(float, MNI)))
    moved = np.array(MNI) + np.concatenate([noise, np.zeros(4)])
    other = Grid(shape=shape, affine=tuple(moved.tolist()))
    voxels = np.array([[*index, 1] for index in product(*map(range, shape))], dtype=float)
    shifts = np.linalg.norm(((voxels @ one.matrix().T) - (voxels @ other.matrix().T))[:, :3], axis=1)
    assert corner_shift_mm(one, other) == pytest.approx(shifts.max(), rel=1e-6, abs=1e-9)
    assert corner_shift_mm(other, one) == corner_shift_mm(one, other)
    assert same_grid(one, other) == (corner_shift_mm(one, other) <= SAME_GRID_MM)


@given(masks)
def test_voxels_are_stored_in_c_order_whatever_the_memory_layout(mask):
    in_order = [index for index in np.ndindex(mask.shape) if mask[index]]
    for layout in (mask, np.asfortranarray(mask), mask[::-1][::-1]):
        flat = stored_order(layout)
        assert [tuple(int(i) for i in np.unravel_index(p, mask.shape)) for p in flat] == in_order


@given(masks)
def test_positions_in_a_nifti_volume_give_the_same_voxels_in_the_same_order(mask):
    volume = np.arange(mask.size).reshape(mask.shape)
    flat = np.asfortranarray(volume).reshape(-1, order="F")
    np.testing.assert_array_equal(flat[fortran_positions(mask)], volume[mask])
    np.testing.assert_array_equal(
        flat[fortran_positions(np.asfortranarray(mask))], volume.reshape(-1)[stored_order(mask)]
    )


@given(masks)
def test_the_pieces_of_columns_are_the_mask_and_number_its_voxels_in_stored_order(mask):
    for layout in (mask, np.asfortranarray(mask)):
        numbers = np.full(mask.shape, -1)
        for place, z, number, length in masked_columns(layout).tolist():
            y, x = divmod(place, mask.shape[0])
            assert (numbers[x, y, z : z + length] == -1).all()
            numbers[x, y, z : z + length] = range(number, number + length)
        np.testing.assert_array_equal(numbers[mask], range(mask.sum()))
        assert (numbers[~mask] == -1).all()


@pytest.mark.parametrize(
    ("shape", "inside", "expected"),
    [((10, 10, 10), 99, False), ((10, 10, 10), 100, True), ((100, 100, 10), 999, False), ((100, 100, 10), 1000, True),
     ((4, 4, 4), 64, False)],
)  # fmt: skip
def test_a_mask_is_believed_from_100_voxels_and_one_percent_on(shape, inside, expected):
    mask = np.zeros(shape, dtype=bool)
    mask.reshape(-1)[:inside] = True
    assert is_believable(mask) == expected
    assert MIN_MASK_VOXELS == 100


# What SwiFT's loader pads by hand to 96 voxels (before, after); negative is cut off.
PUBLISHED = {75: (11, 10), 93: (2, 1), 81: (8, 7), 91: (3, 2), 109: (-7, -6)}


@pytest.mark.parametrize(("size", "padding"), PUBLISHED.items())
def test_the_rule_gives_the_published_paddings(size, padding):
    before = pad_before(size, 96)
    assert (before, 96 - size - before) == padding


@given(st.integers(1, 300), st.integers(1, 300))
def test_padding_is_centred_with_the_odd_voxel_in_front(size, target):
    before = pad_before(size, target)
    after = target - size - before
    assert abs(before) - abs(after) in (0, 1)
    assert before * (target - size) >= 0
    assert after * (target - size) >= 0


def padded_or_cut(volume: np.ndarray, target: tuple[int, int, int]) -> np.ndarray:
    """Explicitly: cut what is too long, then np.pad what is too short; odd voxels in front."""
    for axis, wanted in enumerate(target):
        surplus = volume.shape[axis] - wanted
        if surplus > 0:
            front = surplus - surplus // 2
            volume = np.take(volume, range(front, front + wanted), axis=axis)
        else:
            front = -surplus - (-surplus) // 2
            widths = [(0, 0)] * 3
            widths[axis] = (front, -surplus - front)
            volume = np.pad(volume, widths, constant_values=-1)
    return volume


@given(masks, shapes)
def test_target_positions_are_those_of_an_explicit_pad_and_crop(mask, target):
    values = np.arange(int(mask.sum()))
    volume = np.full(mask.shape, -1)
    volume[mask] = values
    placed = np.full(target, -1)
    positions = target_positions(mask, target)
    assert positions.shape == values.shape
    assert positions.dtype == np.int64
    kept = positions >= 0
    placed.reshape(-1)[positions[kept]] = values[kept]
    np.testing.assert_array_equal(placed, padded_or_cut(volume, target))
    assert len(set(positions[kept].tolist())) == kept.sum(), "no two voxels in one place"


@pytest.mark.parametrize("shape", [(75, 93, 81), (91, 109, 91)])
def test_full_grids_reach_96_voxels_as_published(shape):
    positions = target_positions(np.ones(shape, dtype=bool), (96, 96, 96))
    first = positions[positions >= 0].min()
    expected = [max(PUBLISHED[size][0], 0) for size in shape]
    assert np.unravel_index(first, (96, 96, 96)) == tuple(expected)
    assert (positions >= 0).sum() == np.prod([min(size, 96) for size in shape])
