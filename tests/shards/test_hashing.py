"""Digests of bulk data are BLAKE3 and SHA-256 as published, however their input is cut."""

import hashlib

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import FormatError
from fmristream.shards.hashing import BLAKE3, SHA256, bulk_hash, bulk_hexdigest

# From test_vectors.json of the BLAKE3 team: so many bytes 0, 1, … 250, 0, 1, …
PUBLISHED = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


@pytest.mark.parametrize("length", PUBLISHED)
def test_blake3_is_the_published_one(length):
    assert bulk_hexdigest(bytes(n % 251 for n in range(length)), BLAKE3) == PUBLISHED[length]


@pytest.mark.parametrize(("name", "function"), [(SHA256, hashlib.sha256), (BLAKE3, blake3)])
@given(pieces=st.lists(st.binary(max_size=3000), max_size=6))
def test_a_stream_in_any_pieces_has_the_digest_of_the_whole(name, function, pieces):
    ours = bulk_hash(name)
    for piece in pieces:
        ours.update(memoryview(bytearray(piece)))
    assert ours.hexdigest() == ours.hexdigest() == function(b"".join(pieces)).hexdigest()


@pytest.mark.parametrize(("name", "function"), [(SHA256, hashlib.sha256), (BLAKE3, blake3)])
@pytest.mark.parametrize("dtype", ["|i1", "<u2", "<i4", "<i8", "<f4", "<f8"])
def test_values_of_any_dtype_count_as_their_bytes(name, function, dtype):
    values = np.arange(1000).astype(dtype)
    ours = bulk_hash(name)
    ours.update(values.data)
    assert ours.hexdigest() == function(values.tobytes()).hexdigest()


def test_an_unknown_name_is_refused_with_advice():
    with pytest.raises(FormatError, match=r"digest 'md5', this release knows blake3 and sha256; install a newer"):
        bulk_hash("md5")
