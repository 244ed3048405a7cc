"""Damaged, lying and hostile NIfTI files: refused with a reason, at once, whatever they claim."""

import gzip
import math
import random
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmristream.errors import SourceError
from fmristream.ingest.nifti import open_nifti
from fmristream.ingest.run_stream import open_run, quick_fingerprint
from tests.ingest.nifti_files import bold_like, comment_extension, gzip_members, nifti_bytes
from tests.ingest.reading import SHAPE, as_run, gzipped, read, reason, same_as_nibabel, write

HUGE = {
    "16-bit sizes, all at their limit": {"dim": (4, 32767, 32767, 32767, 32767, 1, 1, 1)},
    "a terabyte": {"dim": (4, 1000, 1000, 1000, 1000, 1, 1, 1)},
    "a size of 0": {"dim": (4, 3, 0, 2, 5, 1, 1, 1)},
    "a negative size": {"dim": (4, 3, -4, 2, 5, 1, 1, 1)},
    "two negative sizes": {"dim": (4, -3, -4, 2, 5, 1, 1, 1)},
    "no dimensions": {"dim": (0, 3, 4, 2, 5, 1, 1, 1)},
    "8 dimensions": {"dim": (8, 3, 4, 2, 5, 1, 1, 1)},
    "a folded surface": {"dim": (4, 27307, 1, 6, 1, 1, 1, 1)},
}
OFFSETS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 351.0, 352.5, 353.0, 1e9, 3e38]


@pytest.mark.parametrize("is_gzip", [False, True])
@pytest.mark.parametrize("lies", [*HUGE.values(), *[{"vox_offset": offset} for offset in OFFSETS]], ids=str)
def test_a_lying_header_is_refused_at_once_and_before_anything_is_allocated(
    tmp_path: Path, lies: dict[str, Any], *, is_gzip: bool
) -> None:
    raw = nifti_bytes(bold_like(SHAPE), **lies)
    assert_refused_cheaply(gzipped(tmp_path, raw) if is_gzip else write(tmp_path, raw))


@pytest.mark.parametrize("is_gzip", [False, True])
@pytest.mark.parametrize(
    "lies",
    [
        {"dim": (4, 2**62, 2**62, 2**62, 2**62, 1, 1, 1)},
        {"dim": (4, 2**32, 2**32, 1, 1, 1, 1, 1)},  # a product that is 0 in 64 bits
        {"dim": (4, 2**63 - 1, 3, 1, 1, 1, 1, 1)},
        {"vox_offset": 2**62},
        {"vox_offset": -(2**62)},
        {"vox_offset": 543},
    ],
    ids=str,
)
def test_a_lying_nifti_2_header_is_refused_at_once(tmp_path: Path, lies: dict[str, Any], *, is_gzip: bool) -> None:
    raw = nifti_bytes(bold_like(SHAPE), version=2, **lies)
    assert_refused_cheaply(gzipped(tmp_path, raw) if is_gzip else write(tmp_path, raw))


def test_a_gzip_bomb_is_refused_at_once(tmp_path: Path) -> None:
    honest = nifti_bytes(bold_like(SHAPE))
    zeros = gzip.compress(bytes(10**8), mtime=0)

    def bomb(head: bytes, members: int) -> Path:
        return write(tmp_path, gzip.compress(head) + zeros * members, "run.nii.gz")

    assert "bytes follow" in assert_refused_cheaply(bomb(honest, 150))
    far = nifti_bytes(bold_like(SHAPE), vox_offset=2.5e8)[:352]
    assert "extensions" in assert_refused_cheaply(bomb(far, 3))
    large = nifti_bytes(np.zeros((1, 1, 1, 1), "i2"), dim=(4, 1300, 1300, 640, 1, 1, 1, 1))[:352]
    assert "one frame" in assert_refused_cheaply(bomb(large, 22))


def test_gzip_that_cannot_hold_what_its_header_declares_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = gzipped(tmp_path, nifti_bytes(bold_like(SHAPE), dim=(4, 100, 100, 100, 1, 1, 1, 1)))
    with pytest.raises(SourceError, match="bytes of gzip cannot hold that"):
        open_run(as_run(path))


def test_many_empty_gzip_members_do_not_waste_time(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    path = write(tmp_path, gzip.compress(b"") * 200_000 + gzip.compress(raw), "run.nii.gz")
    assert "hold nothing" in assert_refused_cheaply(path)


def test_a_run_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, nifti_bytes(bold_like(SHAPE)))
    with pytest.raises(SourceError, match="at most 239 bytes"):
        open_run(as_run(path), max_run_bytes=239)
    open_run(as_run(path), max_run_bytes=240).close()


def assert_refused_cheaply(path: Path) -> str:
    start_s = time.process_time()
    tracemalloc.start()
    try:
        text = reason(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start_s < 1.0
    assert peak_bytes < 16 * 2**20
    return text


# Inside the first 4 bytes, the header, the extender, an extension, a voxel, a frame; after a frame; the last byte.
CUTS = [1, 3, 4, 347, 348, 350, 352, 360, 399, 400, 401, 447, 448, 449, 639]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE), extension=comment_extension(40))
    assert len(raw) == 640
    for cut in CUTS:
        reason(write(tmp_path, raw[:cut]))
        reason(gzipped(tmp_path, raw[:cut]))


def test_a_gzip_stream_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    packed = gzip_members(raw, [400])
    between = len(gzip_members(raw[:400]))
    for cut in range(1, len(packed)):
        text = reason(write(tmp_path, packed[:cut], "run.nii.gz"))
        assert cut == 1 or cut == between or "cut short" in text or "not gzip" in text


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    assert "1 bytes follow" in reason(write(tmp_path, raw + b"\0"))
    assert "1 bytes follow" in reason(gzipped(tmp_path, raw + b"\0"))
    assert "2 bytes follow" in reason(gzipped(tmp_path, raw + b"ab", len(raw)))
    for junk in (b"\0", b"\x1f", bytes(512), b"junk", b"\x1f\x8b"):
        reason(write(tmp_path, gzip_members(raw) + junk, "run.nii.gz"))


def test_an_empty_member_at_the_end_as_bgzip_writes_it_is_accepted(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    same_as_nibabel(gzipped(tmp_path, raw, 10, len(raw)))


def test_no_flipped_bit_of_a_gzip_file_changes_what_is_read(tmp_path: Path) -> None:
    path = gzipped(tmp_path, nifti_bytes(bold_like((2, 2, 1, 2))), 360)
    whole = path.read_bytes()
    header, frames, _ = read(path)
    accepted = []
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            found = read(path)
        except SourceError:
            continue
        assert found[:2] == (header, frames)
        accepted.append(bit // 8)
    # Time, compression level and system in the two members' headers; beyond them a few bits that no symbol uses.
    second = whole.index(b"\x1f\x8b", 2)
    idle = {start + place for start in (0, second) for place in range(3, 10)}
    assert idle == set(accepted) & (idle | set(range(10)))
    assert sum(byte not in idle for byte in accepted) < 0.01 * len(whole) * 8


def test_damage_that_lengthens_the_stream_is_called_damage(tmp_path: Path) -> None:
    raw = nifti_bytes(np.zeros((16, 16, 8, 20), "<i2"))
    longer = gzip_members(raw + bytes(1000))
    packed = longer[:-8] + struct.pack("<2I", 0, len(raw))
    assert "damaged" in reason(write(tmp_path, packed, "run.nii.gz"))


def test_random_bit_flips_of_a_larger_file_are_found(tmp_path: Path) -> None:
    draws = random.Random(7)
    path = gzipped(tmp_path, nifti_bytes(bold_like((8, 9, 10, 20)) // 64))
    whole = path.read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draws.randrange(10, len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        reason(path)


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like((64, 64, 40, 10)))  # longer than what is read ahead
    path = write(tmp_path, raw)
    with open_nifti(str(path), name="run.nii") as stream:
        path.write_bytes(raw + b"more")
        with pytest.raises(SourceError, match="follow"):
            list(stream.frames())
    path.write_bytes(raw)
    with open_nifti(str(path), name="run.nii") as stream:
        path.write_bytes(raw[:-1])
        with pytest.raises(SourceError, match="the data end in frame 10 of the 10"):
            list(stream.frames())


def test_a_gzip_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    packed = gzip_members(nifti_bytes(bold_like((64, 64, 40, 10))), level=0)  # longer than what is read ahead
    path = write(tmp_path, packed, "run.nii.gz")

    def reason_after(change: bytes) -> str:
        path.write_bytes(packed)
        with open_nifti(str(path), name="run.nii.gz") as stream:
            frames = stream.frames()
            next(frames)
            path.write_bytes(change)
            with pytest.raises(SourceError) as caught:
                list(frames)
        return str(caught.value)

    assert "being changed" in reason_after(packed + bytes(3))
    assert "damaged" in reason_after(packed[:-1])
    assert "damaged" in reason_after(packed[:-8] + bytes(4) + packed[-4:])
    assert "bytes follow" in reason_after(packed + gzip_members(b"more"))


@pytest.mark.parametrize("junk", [b"junk", bytes(4), bytes(300_000), b"\x1f\x8b\x08\0" + bytes(20)])
def test_junk_that_ends_like_a_whole_file_is_refused_like_any_other(tmp_path: Path, junk: bytes) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    packed, length = gzip_members(raw), struct.pack("<I", len(raw))
    reason(write(tmp_path, packed + junk + length, "run.nii.gz"))
    reason(write(tmp_path, packed[:-8] + junk + length, "run.nii.gz"))
    reason(write(tmp_path, packed + junk + packed[-8:], "run.nii.gz"))
    reason(write(tmp_path, packed[:-20] + junk + packed[-8:], "run.nii.gz"))


def test_a_local_file_that_cannot_be_read_is_refused_like_any_other_bad_input(tmp_path: Path) -> None:
    folder = tmp_path / "run.nii"
    folder.mkdir()
    assert "Is a directory" in reason(folder)
    with pytest.raises(SourceError, match="Is a directory"):
        quick_fingerprint(as_run(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file whose bytes cannot be read")
def test_a_read_error_is_told() -> None:
    with pytest.raises(SourceError, match="mem: the file cannot be read: Input/output error"):
        open_run(as_run("/proc/self/mem"))
