"""Streaming leaves nothing on the disk, and with a cache nothing outside of it; the cache changes no bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.stream.range_server import frames_only, range_server

DEVICES = ("/dev/", "/proc/", "/memfd:", "/dev/shm/")


def watched(url: str, *cache: str) -> dict:
    # numba keeps compiled kernels beside the package: made here, before anybody watches.
    warm = [sys.executable, "-m", "tests.stream.watched", url]
    subprocess.run(warm, check=True, capture_output=True, timeout=300)
    done = subprocess.run([*warm, *cache], check=True, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)


def outside(paths: list[str], *allowed: str) -> list[str]:
    # numba looks whether it might write there.
    mine = [path for path in paths if "/__pycache__" not in path and not path.isdecimal()]
    return [path for path in mine if not path.startswith((*DEVICES, *allowed))]


def test_without_a_cache_no_file_is_opened_for_writing(cohort_url):
    with range_server(Path(cohort_url)) as server:
        found = watched(server.url)
    assert not outside(found["opened"])
    assert not outside(found["descriptors"], "/dev/null")


def test_with_a_cache_only_files_in_it_are_and_nothing_is_fetched_twice(cohort_url, tmp_path):
    with range_server(Path(cohort_url)) as server:
        server.applies = frames_only
        plain = watched(server.url)
        found = watched(server.url, str(tmp_path / "cache"))
        assert not outside(found["opened"], str(tmp_path / "cache"))
        assert outside(found["opened"])
        assert not outside(found["descriptors"], str(tmp_path / "cache"))
        assert found["sums"] == plain["sums"]
        assert found["again"] <= 24  # of the first epoch's windows that were still under way; whatever came is there
        server.forget()
        assert watched(server.url, str(tmp_path / "cache"))["sums"] == plain["sums"]
    names = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "cache").rglob("*")]
    assert names
    assert not [name for name in names if "sub" in name]


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_a_cache_that_is_damaged_gives_the_same_batches(cohort_url, tmp_path, kind):
    def batches() -> list[torch.Tensor]:
        clips = StreamingDataset(cohort_url, window=7, seed=1, cache=tmp_path / "cache", cache_bytes=10**8)
        with StreamingLoader(clips, batch_size=4, threads=2) as loader:
            return [batch.packed.clone() for batch in loader]

    expected = batches()
    for path in (tmp_path / "cache").glob("??/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data if kind == "flip" else data[: len(data) // 2])
    assert all(torch.equal(one, other) for one, other in zip(batches(), expected, strict=True))


def test_what_was_damaged_before_it_was_kept_is_fetched_again(cohort_url, tmp_path):
    with range_server(Path(cohort_url)) as server:
        server.applies = frames_only
        server.choose = lambda number: "flip" if number == 3 else None
        clips = StreamingDataset(server.url, window=7, seed=1, cache=tmp_path / "cache", cache_bytes=10**8)
        plain = StreamingDataset(cohort_url, window=7, seed=1)
        with StreamingLoader(clips, batch_size=4) as loader, StreamingLoader(plain, batch_size=4) as other:
            for one, same in zip(loader, other, strict=True):
                assert torch.equal(one.packed, same.packed)
