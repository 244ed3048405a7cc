"""Reading NIfTI runs: equal to nibabel bit for bit on whole files, and a stated reason for everything else."""

import gzip
import logging
import math
import struct
import sys
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
from fmristream.ingest.run_stream import open_run, quick_fingerprint
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
from tests.ingest.reading import SHAPE, as_run, gzipped, read, reason, same_as_nibabel, write

logging.getLogger("nibabel").setLevel(logging.CRITICAL)

EXAMPLES = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    assert "a CIFTI-2 file without its XML" in reason(write(tmp_path, raw, "run.dtseries.nii"))


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


@pytest.mark.parametrize("name", ["run.nii", "run.nii.gz"])
def test_a_frame_stays_as_it_is_until_the_ring_comes_round(tmp_path: Path, name: str) -> None:
    stored = bold_like((4, 3, 2, 7))
    raw = nifti_bytes(stored)
    with open_run(as_run(write(tmp_path, gzip_members(raw) if name.endswith("gz") else raw, name))) as stream:
        frames = list(zip(range(7), stream.frames(3), strict=True))
        assert len({frame.ctypes.data for _, frame in frames}) == 3
        for number, frame in frames[-3:]:
            np.testing.assert_array_equal(frame, stored[..., number])


@given(st.data())
def test_one_member_several_members_and_remote_files_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("files")
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(4))
    extension = comment_extension(16 * data.draw(st.integers(1, 6000)) - 8) if data.draw(st.booleans()) else b""
    raw = nifti_bytes(bold_like(shape), extension=extension)
    cut = data.draw(st.integers(1, len(raw) - 1))
    single = read(write(folder, gzip_members(raw), "run.nii.gz"))
    assert single[1] == bold_like(shape).tobytes("F")
    assert read(write(folder, gzip_members(raw, [cut]), "run.nii.gz"))[:2] == single[:2]
    fsspec.filesystem("memory").pipe_file("/nifti-test/one.nii.gz", gzip_members(raw))
    assert read("memory://nifti-test/one.nii.gz") == single


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
