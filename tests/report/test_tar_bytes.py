"""Hand-made tar and .npy headers are what Python's tarfile and numpy read."""

import io
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from fmristream.report.tar_bytes import BLOCK, MAX_MEMBER_BYTES, RECORD, end_of_tar, member_header, npy_header, padding


def tar_of(members: dict[str, bytes]) -> bytes:
    data = b"".join(member_header(name, len(body)) + body + padding(len(body)) for name, body in members.items())
    return data + end_of_tar(len(data))


@pytest.mark.parametrize("sizes", [(0,), (1, 511, 512, 513), (7 * BLOCK, 8 * BLOCK), (19 * BLOCK, 20 * BLOCK - 1)])
def test_tarfile_reads_every_member(sizes):
    members = {f"a-{size:09d}.bold.npy": bytes(index % 251 for index in range(size)) for size in sizes}
    data = tar_of(members)
    assert len(data) % RECORD == 0
    assert data.endswith(bytes(2 * BLOCK))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
        assert {info.name: tar.extractfile(info).read() for info in infos} == members
    for info in infos:
        assert (info.mode, info.uid, info.gid, info.uname, info.gname, info.mtime) == (0o644, 0, 0, "", "", 0)


@pytest.mark.parametrize(
    ("name", "size"), [("x", 0), ("train-000000012.json", 8**6 + 5), ("y" * 100, MAX_MEMBER_BYTES)]
)
def test_a_header_is_read_as_what_it_was_made_of(name, size):
    info = tarfile.TarInfo.frombuf(member_header(name, size), "ascii", "strict")  # checks the sum
    assert (info.name, info.size, info.type) == (name, size, tarfile.REGTYPE)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_the_command_tar_finds_no_fault(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.json": b"{}", "b.bold.npy": bytes(1000)}))
    done = subprocess.run(["tar", "tf", str(tmp_path / "a.tar")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a.json", "b.bold.npy"]
    assert not done.stderr


@pytest.mark.parametrize("dtype", ["<i2", "|u1", "<f2", "<f4", "<f8", "|b1"])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 4, 5)])
def test_numpy_reads_the_header(dtype, shape):
    values = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    header = npy_header(values.dtype, shape)
    assert len(header) % 64 == 0
    found = np.load(io.BytesIO(header + values.tobytes()), allow_pickle=False)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
