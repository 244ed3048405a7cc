"""The shuffled order: a permutation for every size and key, always the same one, and without visible pattern."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.sampling.order import Locality, order_key, permute, permute_locally

KEYS = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1
DIGEST = "0" * 64


def splitmix_finaliser(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permuted_by_hand(position: int, *, size: int, key: int) -> int:
    """The published order in whole numbers of Python, one position at a time."""
    half = 4
    while 4**half < size:
        half += 1
    round_keys = [splitmix_finaliser((key + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, 9)]
    while True:
        left, right = position >> half, position & (2**half - 1)
        for round_key in round_keys:
            left, right = right, left ^ (splitmix_finaliser((right + round_key) & MASK) & (2**half - 1))
        position = left << half | right
        if position < size:
            return position


def chi_square(counts: np.ndarray) -> float:
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


@given(size=st.integers(1, 3000), key=KEYS)
def test_every_number_comes_exactly_once_for_any_size_and_key(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 2**16 + 1])
def test_sizes_around_powers_of_two_are_permuted_too(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=size)), np.arange(size))


@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_the_order_is_the_one_that_plain_integers_give(size, key, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    ours = permute(np.array(positions, dtype=np.int64), size=size, key=key)
    assert ours.tolist() == [permuted_by_hand(position, size=size, key=key) for position in positions]


@given(size=st.integers(1, 10**6), key=KEYS, data=st.data())
def test_a_position_does_not_depend_on_the_others_asked_for(size, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)), dtype=np.int64)
    one_by_one = [int(permute(positions[i : i + 1], size=size, key=key)[0]) for i in range(len(positions))]
    assert permute(positions, size=size, key=key).tolist() == one_by_one


def test_the_positions_that_are_given_are_left_as_they_are():
    positions = np.arange(50)
    permute(positions, size=50, key=3)
    assert np.array_equal(positions, np.arange(50))


def test_an_empty_request_gives_nothing():
    assert permute(np.empty(0, dtype=np.int64), size=10, key=1).shape == (0,)


def test_keys_are_those_of_the_first_release():
    assert order_key(DIGEST, seed=7, epoch=0) == 17682499026900092881
    assert order_key("ab" * 32, seed=0, epoch=3) == 11395463603512587452
    assert order_key("", seed=-1, epoch=0) == 13899186046665894360


def test_a_key_is_the_first_8_bytes_of_a_sha256():
    text = f"fmristream-order-v1|{DIGEST}|7|12"
    assert order_key(DIGEST, seed=7, epoch=12).to_bytes(8, "little") == hashlib.sha256(text.encode()).digest()[:8]


def test_the_order_is_that_of_the_first_release():
    key = order_key(DIGEST, seed=7, epoch=0)
    assert permute(np.arange(10), size=10, key=0).tolist() == [6, 1, 8, 5, 2, 3, 0, 4, 7, 9]
    assert permute(np.arange(10), size=10, key=2**64 - 1).tolist() == [0, 5, 3, 7, 1, 9, 4, 8, 2, 6]
    assert permute(np.arange(8), size=300, key=key).tolist() == [59, 0, 191, 26, 33, 280, 53, 258]
    assert permute(np.arange(5), size=10**6, key=key).tolist() == [291101, 39402, 688759, 380400, 240217]
    far = np.array([0, 1, 2, 10**9, 53 * 10**9 - 1])
    wanted = [5353011347, 51381926161, 46597051382, 36314769590, 45329318133]
    assert permute(far, size=53 * 10**9, key=key).tolist() == wanted


def test_another_seed_epoch_or_dataset_gives_another_order():
    keys = {order_key(digest, seed=seed, epoch=epoch) for digest in ("a", "b") for seed in (0, 1) for epoch in (0, 1)}
    assert len(keys) == 8
    assert len({tuple(permute(np.arange(100), size=100, key=key).tolist()) for key in keys}) == 8


@pytest.mark.parametrize(("size", "epochs"), [(7, 280), (20, 600), (300, 3000)])
def test_every_number_comes_equally_often_at_every_position(size, epochs):
    # Fixed keys, so the statistic is a constant; 5 SDs of chi-square with size - 1 degrees of freedom.
    positions = np.array([0, 1, size // 2, size - 1])
    keys = [order_key("uniform", seed=1, epoch=epoch) for epoch in range(epochs)]
    orders = np.stack([permute(positions, size=size, key=key) for key in keys])
    limit = size - 1 + 5 * np.sqrt(2 * (size - 1))
    for column in orders.T:
        assert chi_square(np.bincount(column, minlength=size)) < limit


def test_what_follows_a_number_is_as_good_as_random():
    size, epochs = 16, 600
    pairs = np.zeros((size, size))
    for epoch in range(epochs):
        order = permute(np.arange(size), size=size, key=order_key("pairs", seed=2, epoch=epoch))
        np.add.at(pairs, (order[:-1], order[1:]), 1)
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    assert pairs.diagonal().sum() == 0
    assert chi_square(off_diagonal) < off_diagonal.size + 5 * np.sqrt(2 * off_diagonal.size)


LOCALITIES = st.builds(Locality, windows=st.integers(1, 12), visits=st.integers(1, 9))


@settings(max_examples=25)
@given(size=st.integers(1, 150), key=st.integers(0, 2**64 - 1), locality=LOCALITIES)
def test_with_blocks_kept_together_it_is_still_a_permutation(size, key, locality):
    images = permute_locally(np.arange(size), size=size, key=key, locality=locality)
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(max_examples=25)
@given(size=st.integers(1, 150), key=st.integers(0, 2**64 - 1), locality=LOCALITIES, data=st.data())
def test_with_blocks_any_position_alone_has_the_same_image(size, key, locality, data):
    some = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    every = permute_locally(np.arange(size), size=size, key=key, locality=locality)
    assert np.array_equal(permute_locally(some, size=size, key=key, locality=locality), every[some])


@settings(max_examples=25)
@given(size=st.integers(60, 200), key=st.integers(0, 2**64 - 1), locality=LOCALITIES)
def test_a_stretch_of_a_superblock_holds_few_blocks_each_of_them_whole(size, key, locality):
    chunk = locality.windows * locality.visits
    images = permute_locally(np.arange(size), size=size, key=key, locality=locality)
    for start in range(0, size - 2 * chunk, chunk):  # the last superblock also takes what fills none
        part = np.sort(images[start : start + chunk])
        # Consecutive numbers, wherever blocks begin in this epoch; one stretch may lie across the end.
        assert int((np.diff(part) != 1).sum()) + 1 <= locality.visits + 1


def test_blocks_and_superblocks_differ_between_epochs():
    locality = Locality(windows=4, visits=3)
    orders = [permute_locally(np.arange(100), size=100, key=key, locality=locality).tolist() for key in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert len({tuple(sorted(order[:12])) for order in orders}) == 5


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"windows": 3, "visits": 0}])
def test_a_locality_of_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match="expected 1 or more each"):
        Locality(**wrong)
