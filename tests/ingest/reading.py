"""Short ways for tests to write a file, to read it as a run, and to ask why it was refused."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from fmristream.errors import SourceError
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.run_stream import RunHeader, open_run, quick_fingerprint
from fmristream.ingest.sources import SourceRun
from tests.ingest.nifti_files import gzip_members

SHAPE = (3, 4, 2, 5)


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
    """Everything that nibabel tells about the file is what we read, voxels bit for bit."""
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
