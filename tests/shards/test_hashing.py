"""Our SHA-256 of two streams is hashlib's, however the streams are cut."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.shards import hashing
from fmristream.signal import sha256

needs_instructions = pytest.mark.skipif(not sha256.is_available(), reason="a processor without SHA instructions")
pieces = st.lists(st.binary(max_size=300), max_size=6)


@needs_instructions
def test_the_kernel_is_used_where_the_processor_has_the_instructions():
    assert type(hashing.new_hash()) is not type(hashlib.sha256())


@given(pieces)
def test_a_stream_in_any_pieces_has_the_digest_of_the_whole(data):
    ours = hashing.new_hash()
    for piece in data:
        ours.update(piece)
    assert ours.hexdigest() == ours.hexdigest() == hashlib.sha256(b"".join(data)).hexdigest()


@given(pieces, pieces)
def test_two_streams_at_once_have_the_digests_of_each(data, others):
    one, other = hashing.new_hash(), hashing.new_hash()
    longest = max(len(data), len(others))
    data, others = (half + [b""] * (longest - len(half)) for half in (data, others))
    for piece, another in zip(data, others, strict=True):
        hashing.update_both(one, memoryview(bytearray(piece)), other, another)
    assert one.hexdigest() == hashlib.sha256(b"".join(data)).hexdigest()
    assert other.hexdigest() == hashlib.sha256(b"".join(others)).hexdigest()


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 100_003])
def test_every_length_of_the_last_block_is_padded_right(length):
    data = np.random.default_rng(length).bytes(length)
    ours = hashing.new_hash()
    ours.update(data)
    assert ours.hexdigest() == hashlib.sha256(data).hexdigest()


def test_values_of_any_dtype_count_as_their_bytes():
    values = np.arange(1000, dtype="<i4")
    one, other = hashing.new_hash(), hashing.new_hash()
    hashing.update_both(one, values.data, other, b"")
    assert one.hexdigest() == hashlib.sha256(values.tobytes()).hexdigest()
    assert other.hexdigest() == hashlib.sha256(b"").hexdigest()


def test_hashlib_does_it_where_there_are_no_instructions(monkeypatch):
    monkeypatch.setattr(sha256, "is_available", lambda: False)
    hashing._is_usable.cache_clear()
    try:
        one, other = hashing.new_hash(), hashing.new_hash()
    finally:
        hashing._is_usable.cache_clear()
    assert type(one) is type(hashlib.sha256())
    hashing.update_both(one, memoryview(b"abc"), other, b"d")
    assert (one.hexdigest(), other.hexdigest()) == tuple(hashlib.sha256(data).hexdigest() for data in (b"abc", b"d"))


@needs_instructions
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(sha256, "INITIAL", (0,) * 8)
    hashing._is_usable.cache_clear()
    try:
        assert type(hashing.new_hash()) is type(hashlib.sha256())
    finally:
        hashing._is_usable.cache_clear()


@needs_instructions
def test_the_kernel_refuses_to_read_behind_the_data():
    state = np.array(sha256.INITIAL, dtype=np.uint32)
    data = np.zeros(128, dtype=np.uint8)
    with pytest.raises(AssertionError):
        sha256.hash_blocks(state, data, 1, 2)
    with pytest.raises(AssertionError):
        sha256.hash_blocks_of_two(state, data, 0, state.copy(), data, 64, 2)
