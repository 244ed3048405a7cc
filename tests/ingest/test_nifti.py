"""Reading NIfTI runs: equal to nibabel bit for bit on whole files, and a stated reason for everything else."""

import gzip
import logging
import math
import random
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmristream.errors import SourceError
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.nifti import open_nifti
from fmristream.ingest.run_stream import RunHeader, open_run, quick_fingerprint
from fmristream.ingest.sources import SourceRun
from tests.ingest.nifti_files import (
    AFFINE,
    DATATYPES,
    MICROSECONDS,
    MILLIMETRES,
    MILLISECONDS,
    SECONDS,
    bold_like,
    comment_extension,
    gzip_members,
    nifti_bytes,
)

logging.getLogger("nibabel").setLevel(logging.CRITICAL)

SHAPE = (3, 4, 2, 5)
EXAMPLES = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def as_run(path: Path | str) -> SourceRun:
    url = str(path)
    return SourceRun(key=url.rpartition("/")[2], name="run", url=url, subject="01")


def read(path: Path | str) -> tuple[RunHeader, bytes, Fingerprint]:
    """Header, the bytes of all frames in file order, and fingerprint."""
    with open_run(as_run(path)) as stream:
        frames = [frame.tobytes("F") for frame in stream.frames()]
        assert len(frames) == stream.header.frames
        return stream.header, b"".join(frames), stream.fingerprint()


def write(folder: Path, data: bytes, name: str = "run.nii") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def reason(path: Path) -> str:
    """Why the file is refused."""
    with pytest.raises(SourceError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(path.name + ": ")
    return text


def gzipped(folder: Path, data: bytes, *cuts: int) -> Path:
    return write(folder, gzip_members(data, cuts), "run.nii.gz")


def same_as_nibabel(path: Path) -> None:
    header, frames, fingerprint = read(path)
    with np.errstate(all="ignore"):
        image = nibabel.load(path)
        stored = np.asanyarray(image.dataobj.get_unscaled())
    assert (*header.shape, header.frames) == image.shape
    assert header.dtype == stored.dtype.newbyteorder("<")
    assert stored.astype(header.dtype).tobytes("F") == frames
    assert (header.slope, header.inter) == (image.dataobj.slope, image.dataobj.inter)
    assert np.array_equal(np.array(header.affine), image.affine)
    assert fingerprint == quick_fingerprint(as_run(path))
    assert fingerprint.size == path.stat().st_size


scalings = st.tuples(
    st.sampled_from([1.0, 0.0, -2.0, 0.5, math.nan, math.inf, 1e-30]), st.sampled_from([0.0, -3.5, 1024.0])
)


@EXAMPLES
@given(data=st.data())
def test_any_real_dtype_order_version_extension_scaling_and_packing_reads_as_nibabel_reads_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(sorted(DATATYPES)))
    version, order = data.draw(st.sampled_from([(1, "<"), (1, ">"), (2, "<"), (2, ">")]))
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 4))
    slope, inter = data.draw(scalings)
    comment = data.draw(st.sampled_from([0, 1, 200, 100_000]))
    stored = bold_like(shape, dtype, seed=data.draw(st.integers(0, 9)))
    raw = nifti_bytes(
        stored,
        version=version,
        order=order,
        extension=comment_extension(comment, order) if comment else b"",
        scl_slope=slope,
        scl_inter=inter,
    )
    members = data.draw(st.none() | st.lists(st.integers(0, len(raw)), max_size=4))
    path = write(tmp_path, raw) if members is None else gzipped(tmp_path, raw, *members)
    same_as_nibabel(path)
    assert read(path)[1] == stored.tobytes("F")


odd_floats = st.sampled_from([0.0, 1.0, -1.0, 2.5, -3.0, math.nan, math.inf, 1e30, 0.3, 0.9])


@EXAMPLES
@given(data=st.data())
def test_whatever_the_geometry_says_the_affine_is_nibabels_or_the_file_is_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    codes = st.integers(-2, 7)
    lies = {
        "qform_code": data.draw(codes),
        "sform_code": data.draw(codes),
        "pixdim": data.draw(st.tuples(*[odd_floats] * 8)),
        "quaternion": data.draw(st.tuples(*[odd_floats] * 3)),
        "qoffset": data.draw(st.tuples(*[odd_floats] * 3)),
        "srow": data.draw(st.sampled_from([AFFINE, ((0.0,) * 4,) * 3, ((math.nan,) * 4,) * 3, ((1e38,) * 4,) * 3])),
    }
    path = write(tmp_path, nifti_bytes(bold_like(SHAPE), version=data.draw(st.sampled_from([1, 2])), **lies))
    try:
        header = read(path)[0]
    except SourceError as error:
        assert "qform" in str(error) or "affine" in str(error)  # noqa: PT017
        return
    with np.errstate(all="ignore"):
        assert np.array_equal(np.array(header.affine), nibabel.load(path).affine)
    assert np.isfinite(header.affine).all()


@EXAMPLES
@given(data=st.data())
def test_a_header_with_random_bytes_is_refused_with_a_reason_or_read_as_nibabel_reads_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    version = data.draw(st.sampled_from([1, 2]))
    raw = bytearray(nifti_bytes(bold_like(SHAPE), version=version, order=data.draw(st.sampled_from("<>"))))
    places = st.integers(0, (352 if version == 1 else 544) - 1)
    for place, value in data.draw(st.dictionaries(places, st.integers(0, 255), min_size=1, max_size=6)).items():
        raw[place] = value
    path = write(tmp_path, bytes(raw))
    try:
        read(path)
    except SourceError:
        return
    same_as_nibabel(path)


def test_frames_are_fortran_ordered_little_endian_views_of_one_buffer(tmp_path: Path) -> None:
    stored = bold_like(SHAPE)
    with open_run(as_run(write(tmp_path, nifti_bytes(stored, order=">")))) as stream:
        first, second, *_ = frames = list(stream.frames())
    assert len(frames) == 5
    assert first.flags.f_contiguous
    assert first.dtype == np.dtype("<i2")
    assert np.shares_memory(first, second)


def test_the_time_unit_gives_the_repetition_time_in_seconds(tmp_path: Path) -> None:
    def tr_s(step: float, unit: int) -> float | None:
        pixdim = (1.0, 2.0, 2.0, 2.0, step, 0.0, 0.0, 0.0)
        raw = nifti_bytes(bold_like(SHAPE), pixdim=pixdim, xyzt_units=MILLIMETRES | unit)
        header = read(write(tmp_path, raw))[0]
        return header.tr_s

    hertz = 32
    assert tr_s(0.72, SECONDS) == 0.72
    assert tr_s(720.0, MILLISECONDS) == 0.72
    assert tr_s(720_000.0, MICROSECONDS) == 0.72
    for step, unit in [(0.0, SECONDS), (-2.0, SECONDS), (math.nan, SECONDS), (2.0, 0), (2.0, hertz)]:
        assert tr_s(step, unit) is None


def test_oddities_of_the_header_are_noted(tmp_path: Path) -> None:
    def notes(**lies: Any) -> str:
        return " ".join(read(write(tmp_path, nifti_bytes(bold_like(SHAPE), **lies)))[0].notes)

    assert notes() == ""
    assert "2000 s" in notes(pixdim=(1, 2, 2, 2, 2000, 0, 0, 0))
    assert "no time unit" in notes(xyzt_units=MILLIMETRES)
    assert "qform and sform" in notes(qform_code=1, quaternion=(0.0, 1.0, 0.0))
    assert "no rotation" in notes(qform_code=1, quaternion=(1.0, 1.0, 1.0))
    assert "bitpix" in notes(bitpix=8)
    assert "singular" in notes(srow=((0.0,) * 4,) * 3)


@pytest.mark.parametrize(
    ("sform", "qform", "space"),
    [
        (4, 1, "MNI"),
        (3, 0, "Talairach"),
        (5, 0, "template"),
        (2, 0, "native"),
        (1, 4, "native"),
        (0, 4, "MNI"),
        (0, 0, "unknown"),
        (9, 0, "unknown"),
    ],
)
def test_the_code_of_the_affine_in_use_names_the_space(tmp_path: Path, sform: int, qform: int, space: str) -> None:
    raw = nifti_bytes(bold_like(SHAPE), sform_code=sform, qform_code=qform)
    assert read(write(tmp_path, raw))[0].space == space


@pytest.mark.parametrize(
    ("shape", "lies", "expected"),
    [
        ((4, 4), {}, "a 2-D image (4 x 4), not a run"),
        ((3, 4, 2), {}, "a 3-D image (3 x 4 x 2), not a run"),
        ((3, 4, 2, 1, 3), {}, "a 5-D image (3 x 4 x 2 x 1 x 3), not a run"),
        ((3, 4, 2, 5, 1), {}, "a 5-D image"),
        (SHAPE, {"datatype": 32}, "complex64"),
        (SHAPE, {"datatype": 1792}, "complex128"),
        (SHAPE, {"datatype": 128}, "RGB"),
        (SHAPE, {"datatype": 2304}, "RGBA"),
        (SHAPE, {"datatype": 1536}, "float128"),
        (SHAPE, {"datatype": 77}, "code 77"),
        (SHAPE, {"scl_inter": math.inf}, "cannot be scaled"),
        (SHAPE, {"srow": ((math.nan,) * 4,) * 3}, "not finite"),
        (SHAPE, {"sform_code": 0, "qform_code": 1, "quaternion": (1.0, 1.0, 1.0)}, "no rotation"),
        (SHAPE, {"magic": b"ni1\0"}, "pair"),
        (SHAPE, {"magic": b"\0\0\0\0"}, "ANALYZE"),
        (SHAPE, {"sizeof_hdr": 349}, "not a NIfTI file"),
    ],
)
def test_what_is_not_a_run_of_real_numbers_is_refused_with_the_reason(
    tmp_path: Path, shape: tuple[int, ...], lies: dict[str, Any], expected: str
) -> None:
    assert expected in reason(write(tmp_path, nifti_bytes(bold_like(shape), **lies)))


def test_a_cifti_file_is_named_as_such(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like((1, 1, 1, 1, 2, 9), "f4"), version=2, intent_code=3002)
    assert "CIFTI-2 file (intent 3002)" in reason(write(tmp_path, raw, "run.dtseries.nii"))


@pytest.mark.parametrize("name", ["run.hdr", "run.img", "run.mgz", "run.mgh", "run.hdr.gz", "RUN.HDR"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    assert "write" in reason(write(tmp_path, nifti_bytes(bold_like(SHAPE)), name))


def test_a_suffix_that_lies_is_refused(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    assert "rename it to .nii" in reason(write(tmp_path, raw, "run.nii.gz"))
    assert "rename it to .nii.gz" in reason(write(tmp_path, gzip.compress(raw), "run.nii"))
    assert "not a NIfTI file" in reason(write(tmp_path, b"P6 not an image at all", "run.nii"))
    assert "the file is empty" in reason(write(tmp_path, b"", "run.nii.gz"))
    assert "not there" in reason(tmp_path / "absent.nii")


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

    assert "bytes follow" in assert_refused_cheaply(bomb(honest, 30))
    far = nifti_bytes(bold_like(SHAPE), vox_offset=2.5e8)[:352]
    assert "extensions" in assert_refused_cheaply(bomb(far, 3))
    large = nifti_bytes(np.zeros((1, 1, 1, 1), "i2"), dim=(4, 1300, 1300, 640, 1, 1, 1, 1))[:352]
    assert "one frame" in assert_refused_cheaply(bomb(large, 22))


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
    start = time.perf_counter()
    tracemalloc.start()
    try:
        text = reason(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 1.0
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


def test_plain_zlib_reads_the_same_where_zlib_ng_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    path = gzipped(tmp_path, raw, 7, 400)
    expected = read(path)
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    assert read(path) == expected
    packed = bytearray(path.read_bytes())
    packed[-8] ^= 1
    path.write_bytes(packed)
    assert "incorrect data check" in reason(path)


def test_memory_is_a_frame_and_not_a_run(tmp_path: Path) -> None:
    frame_bytes = 64 * 64 * 32 * 2
    path = gzipped(tmp_path, nifti_bytes(np.zeros((64, 64, 32, 160), "<i2")))
    with open_run(as_run(path)) as stream:
        tracemalloc.start()
        try:
            assert sum(1 for _ in stream.frames()) == 160
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak_bytes < frame_bytes + 4 * 2**20


def test_the_fingerprint_is_the_gzip_trailer_or_the_crc32c_of_the_file(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    packed = gzip_members(raw)
    crc, length = struct.unpack("<2I", packed[-8:])
    assert read(write(tmp_path, packed, "run.nii.gz"))[2] == Fingerprint(size=len(packed), crc=f"gz:{crc:08x}:{length}")
    plain = read(write(tmp_path, raw))[2]
    assert plain.crc.startswith("crc32c:")
    assert plain != read(write(tmp_path, raw[:-1] + b"?"))[2]


def test_runs_are_read_through_any_store(tmp_path: Path) -> None:
    raw = nifti_bytes(bold_like(SHAPE))
    memory = fsspec.filesystem("memory")
    for name, data in {"run.nii": raw, "run.nii.gz": gzip_members(raw, [300])}.items():
        memory.pipe_file(f"/nifti-test/{name}", data)
        url = f"memory://nifti-test/{name}"
        assert read(url) == read(write(tmp_path, data, name))
        assert quick_fingerprint(as_run(url)) == read(url)[2]
    memory.rm("/nifti-test", recursive=True)


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
