"""Directions of voxel axes, held against nibabel's."""

import nibabel
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fmristream.report.orientation import axis_codes, to_world_order, voxel_sizes_mm


@st.composite
def affines(draw):
    """Any order and direction of axes, any size, tilted by up to 30 degrees, which leaves no doubt which axis is which."""
    order = draw(st.permutations(range(3)))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))
    sizes = draw(st.lists(st.floats(0.3, 8), min_size=3, max_size=3))
    tilt = draw(st.floats(-0.5, 0.5))
    turned = np.zeros((3, 3))
    for voxel, world in enumerate(order):
        turned[world, voxel] = signs[voxel] * sizes[voxel]
    rotation = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ turned
    affine[:3, 3] = draw(st.lists(st.floats(-100, 100), min_size=3, max_size=3))
    return affine


@given(affines())
def test_codes_and_sizes_are_those_of_nibabel(affine):
    assert axis_codes(affine) == "".join(nibabel.aff2axcodes(affine))
    np.testing.assert_allclose(voxel_sizes_mm(affine), nibabel.affines.voxel_sizes(affine))


@given(affines())
def test_world_order_is_the_closest_canonical_image_of_nibabel(affine):
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume, affine))
    np.testing.assert_array_equal(to_world_order(volume, affine), canonical.get_fdata())


def test_an_affine_without_volume_still_gets_an_answer():
    assert sorted(axis_codes(np.zeros((4, 4)))) == sorted("LPI") or len(axis_codes(np.zeros((4, 4)))) == 3
    assert to_world_order(np.zeros((2, 3, 4), np.float32), np.zeros((4, 4))).size == 24
