"""A conversion needs the memory of a few frames, however long the run is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ingest.nifti_files import gzip_members, nifti_bytes

SHAPE = (64, 64, 40)
BLOCK = 50  # frames that are repeated: a gigabyte is written in a second, and reads as any other


def write_long_run(folder: Path, frames: int, *, dtype: str = "i2", shape: tuple[int, ...] = SHAPE) -> str:
    """A .nii.gz of so many frames: one gzip member of the header, then the same member of noise over and over."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    anatomy = rng.uniform(500, 2000, shape)[..., None]
    block = np.asfortranarray((anatomy + rng.normal(0, 30, (*shape, min(BLOCK, frames)))).astype(f"<{dtype}"))
    header = nifti_bytes(block, dim=(4, *shape, frames, 1, 1, 1))[:352]
    member = gzip_members(block.tobytes("F"), level=1)
    with open(folder / "sub-1_bold.nii.gz", "wb") as file:
        file.write(gzip_members(header))
        for _ in range(frames // block.shape[-1]):
            file.write(member)
    return str(folder)


def measured(
    folder: Path, target: str, *frames: int, dtype: str = "i2", shape: tuple[int, ...] = SHAPE, **options
) -> list[dict]:
    """What conversions of such runs took, after one of a tiny run."""
    warm = write_long_run(folder / "warm", 20, dtype=dtype, shape=(16, 16, 10))
    sources = [write_long_run(folder / f"{count}", count, dtype=dtype, shape=shape) for count in frames]
    chosen = json.dumps({"mask": "none", "split": "none", **options})
    command = [sys.executable, "-m", "tests.ingest.measured_convert", chosen, warm, target, *sources]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout
    finally:  # gigabytes, that pytest would keep for three sessions
        for made in (warm, target, *sources):
            shutil.rmtree(made, ignore_errors=True)
    print(output)  # shown with -s, and where a test fails
    return json.loads(output)


def check(short: dict, long: dict) -> None:
    assert long["peak_mib"] <= 200
    assert long["peak_mib"] <= short["peak_mib"] + 32, "memory grows with the run's length"


def test_memory_is_flat_in_run_length(tmp_path):
    check(*measured(tmp_path, str(tmp_path / "out"), 300, 1200))


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "mask"), [("i2", "none"), ("i2", "auto"), ("f4", "none")])
def test_a_run_of_a_gigabyte_takes_200_mib_at_most(tmp_path, dtype, mask):
    check(*measured(tmp_path, str(tmp_path / "out"), 750, 3000, dtype=dtype, mask=mask))


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["i2", "f4"])
def test_a_run_of_hcp_size_takes_150_mib_at_most_even_without_a_mask(tmp_path, dtype, threads):
    shape = (91, 109, 91)
    short, long = measured(tmp_path, str(tmp_path / "out"), 300, 1200, dtype=dtype, shape=shape, threads=threads)
    assert max(short["peak_mib"], long["peak_mib"]) <= 150
    check(short, long)


@pytest.mark.full
def test_a_run_of_a_gigabyte_goes_into_a_bucket_in_as_little(tmp_path, s3_url):
    check(*measured(tmp_path, s3_url, 750, 3000))
