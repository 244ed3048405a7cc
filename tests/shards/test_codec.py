"""One chunk: what is encoded comes back equal, and nothing damaged is ever decoded."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmristream.errors import CorruptDataError, FormatError
from fmristream.shards import codec

DTYPES = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
chunks = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(1, 60).map(lambda n: 8 * n)))


def decoded(data: bytes, like: np.ndarray) -> np.ndarray:
    out = np.zeros_like(like)
    codec.decode_into(data, out, what="the chunk")
    return out


@given(chunks)
def test_a_chunk_comes_back_bit_for_bit(chunk):
    assert decoded(codec.encode(chunk), chunk).tobytes() == chunk.tobytes()


@given(chunks)
def test_equal_chunks_give_equal_bytes(chunk):
    assert codec.encode(chunk) == codec.encode(chunk.copy())


def test_every_single_bit_flip_is_noticed():
    chunk = np.arange(24, dtype="<i2")
    data = codec.encode(chunk)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError, match="checksum"):
            decoded(bytes(damaged), chunk)


@given(chunks, st.data())
def test_a_chunk_cut_short_is_noticed(chunk, data):
    whole = codec.encode(chunk)
    with pytest.raises(CorruptDataError):
        decoded(whole[: data.draw(st.integers(0, len(whole) - 1))], chunk)


@pytest.mark.parametrize("length", [8, 32])
def test_a_chunk_of_another_size_is_refused_before_decoding(length):
    with pytest.raises(CorruptDataError, match="index does not fit"):
        decoded(codec.encode(np.arange(16, dtype="<i2")), np.empty(length, dtype="<i2"))


@given(st.binary(max_size=80), st.integers(1, 20))
def test_any_bytes_with_a_right_checksum_are_decoded_or_refused(payload, eighths):
    out = np.zeros(8 * eighths, dtype="<i2")
    header = struct.pack("<4B3I", 2, 1, 0, 2, out.nbytes, 32, 16 + len(payload))
    for data in (payload, header + payload):
        with suppress(CorruptDataError):  # and nothing else
            codec.decode_into(data + codec.checksum(data), out, what="x")


def test_objects_are_never_decoded_into():
    data = codec.encode(np.zeros(8, dtype="<i8"))
    for dtype in (object, "<M8[s]", "<c8", "S8", "V8"):
        with pytest.raises(FormatError, match="dtype"):
            codec.decode_into(data, np.empty(8, dtype=dtype), what="x")


@pytest.mark.parametrize(("voxels", "padded"), [(1, 8), (8, 8), (9, 16), (235_375, 235_376)])
def test_chunks_are_padded_to_whole_eights(voxels, padded):
    assert codec.padded_length(voxels) == padded


def test_small_frames_are_shuffled_because_they_are_padded():
    rng = np.random.default_rng(0)
    frame = rng.normal(0, 20, 5028).astype("<i2")
    padded = np.full(codec.padded_length(5028), codec.fill_value(frame.dtype), dtype=frame.dtype)
    padded[:5028] = frame
    assert len(codec.encode(padded)) < 0.75 * len(codec.encode(frame))


HALFWAY = {"|i1": -128, "<i2": -32768, "<i4": -(2**31), "<i8": -(2**63),
           "|u1": 128, "<u2": 32768, "<u4": 2**31, "<u8": 2**63}  # fmt: skip


@pytest.mark.parametrize(("dtype", "fill"), HALFWAY.items())
def test_the_fill_value_of_integers_is_half_a_circle_away_from_zero(dtype, fill):
    value = codec.fill_value(np.dtype(dtype))
    assert value == fill
    assert value.dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_the_fill_value_of_floats_is_nan(dtype):
    assert np.isnan(codec.fill_value(np.dtype(dtype)))


def test_the_checksum_is_crc32c_little_endian():
    # the check value of CRC-32C (iSCSI) for the nine digits, from the catalogue of parametrised CRC algorithms
    assert codec.checksum(b"123456789") == (0xE3069283).to_bytes(4, "little")
