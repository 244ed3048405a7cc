"""Where each frame lies: blocks of lengths, and byte ranges of windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import CorruptDataError
from fmristream.shards.index import decode_block, encode_block, ranges_of

lengths_of = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


@given(lengths_of)
def test_a_block_comes_back_equal(lengths):
    block = encode_block(lengths)
    assert len(block) == 4 * len(lengths) + 4
    assert decode_block(block, frames=len(lengths), what="x").tolist() == lengths


def test_every_single_bit_flip_of_a_block_is_noticed():
    block = encode_block([300, 301, 302])
    for bit in range(8 * len(block)):
        damaged = bytearray(block)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError, match="index block"):
            decode_block(bytes(damaged), frames=3, what="x")


@given(lengths_of, st.integers(0, 60))
def test_a_block_of_another_number_of_frames_is_refused(lengths, frames):
    if frames != len(lengths):
        with pytest.raises(CorruptDataError):
            decode_block(encode_block(lengths), frames=frames, what="x")


def test_the_worked_example_of_the_format_document():
    lengths = np.array([100, 110, 120, 130, 140])
    (one,) = ranges_of(lengths, start=1, stop=2, frames_per_shard=2)
    assert (one.shard, one.start, one.stop, one.lengths) == (0, 100, 210, (110,))
    parts = ranges_of(lengths, start=1, stop=5, frames_per_shard=2)
    assert [(p.shard, p.start, p.stop, p.lengths) for p in parts] == [
        (0, 100, 210, (110,)),
        (1, 0, 250, (120, 130)),
        (2, 0, 140, (140,)),
    ]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 45), st.data())
def test_ranges_cut_exactly_the_wanted_chunks_out_of_the_shards(lengths, frames_per_shard, data):
    start = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(start + 1, len(lengths)))
    chunks = [bytes([number % 256]) * length for number, length in enumerate(lengths)]
    shards = [b"".join(chunks[i : i + frames_per_shard]) for i in range(0, len(chunks), frames_per_shard)]
    parts = ranges_of(np.array(lengths), start=start, stop=stop, frames_per_shard=frames_per_shard)
    assert b"".join(shards[part.shard][part.start : part.stop] for part in parts) == b"".join(chunks[start:stop])
    assert [length for part in parts for length in part.lengths] == lengths[start:stop]
    assert len({part.shard for part in parts}) == len(parts), "at most one request a shard"


def test_an_empty_window_needs_no_range():
    assert ranges_of(np.array([1, 2]), start=1, stop=1, frames_per_shard=2) == []
