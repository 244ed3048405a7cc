"""Layout `volume` read by the reader that was written from FORMAT.md: its section 15 is enough to get a NIfTI file back."""

import hashlib
import json
from itertools import pairwise

import google_crc32c
import numpy as np
import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions
from fmristream.shards import frames
from tests.ingest.odd_files import odd_file
from tests.shards.test_format_reader import Folder, decode, find, newest, run_digest, vector


def stored_volumes(folder: Folder, found: tuple) -> np.ndarray:
    """(t, z, y, x) as the source stored them. Sections 6 and 15."""
    run, arrays, index_key = found
    array = arrays["0"]
    assert array["encoding"] == "volume"
    shape = tuple(array["shape"])
    assert shape == (run["frames"], *run["shape"][::-1])
    block = folder.read(index_key, array["index_offset"], array["index_offset"] + array["index_bytes"])
    assert int(google_crc32c.value(block[:-4])).to_bytes(4, "little") == block[-4:]
    lengths = np.frombuffer(block[:-4], "<u4").astype(int)
    out = []
    for first in range(0, shape[0], array["frames_per_shard"]):
        ends = np.concatenate([[0], np.cumsum(lengths[first : first + array["frames_per_shard"]])])
        data = folder.read(f"{array['object']}/c/{first // array['frames_per_shard']}/0/0/0", 0, int(ends[-1]))
        for start, stop in pairwise(ends):
            out.append(decode(data[start:stop], run["dtype"], int(np.prod(shape[1:]))).reshape(shape[1:]))
    return np.stack(out)


@pytest.mark.parametrize("number", [0, 7, 13, 22, 39])
def test_the_image_is_the_header_and_then_the_frames(tmp_path, monkeypatch, number):
    monkeypatch.setattr(frames, "frames_per_shard", lambda **_: 4)
    file = odd_file(number)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "run.nii").write_bytes(file.image)
    options = ConvertOptions(split="none", layout="volume", header="keep")
    fmristream.convert(str(tmp_path / "in"), str(tmp_path / "out"), options=options)
    folder = Folder(tmp_path / "out")
    document = newest(folder)
    run, arrays, _ = found = find(folder, document, "run")
    volumes, prefix = stored_volumes(folder, found), vector(folder, arrays["nifti"]).tobytes()
    swapped = volumes.astype(volumes.dtype.newbyteorder(">")) if file.big_endian else volumes
    assert prefix + swapped.tobytes() == file.image
    told = json.loads(folder.read(f"{run['object']}/zarr.json"))["attributes"]["fmristream"]
    assert told["nifti"]["stream_sha256"] == hashlib.sha256(file.image).hexdigest()
    assert (told["nifti"]["big_endian"], told["nifti"]["headers"]) == (file.big_endian, "keep")
    x, y, z = run["shape"]
    order = [(k * y + j) * x + i for i in range(x) for j in range(y) for k in range(z)]
    values = np.ascontiguousarray(volumes.reshape(len(volumes), -1)[:, order])
    assert run["digest"].hex() == run_digest("blake3", run, values)
    if "reference" in arrays:
        with np.errstate(over="ignore"):
            residual = values - vector(folder, arrays["reference"])
        if not run["residual_wraps"]:
            signed = residual.view(f"i{residual.itemsize}").astype(np.float64)
            np.testing.assert_allclose(vector(folder, arrays["stats"])[0], signed.mean(axis=0), rtol=1e-5, atol=1e-6)
