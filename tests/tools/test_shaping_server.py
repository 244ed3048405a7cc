"""The server that is far away: it sends exactly what was asked for, counts it, and is as slow as it was told to be."""

import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions
from tools.shaping_server import Shape, counts_of, in_process, in_thread

DATA = bytes(range(256)) * 4000


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "served" / "deep").mkdir(parents=True)
    (tmp_path / "served" / "deep" / "data.bin").write_bytes(DATA)
    (tmp_path / "secret").write_bytes(b"not served")
    return tmp_path / "served"


def fetch(url: str, wanted: str = "", method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(url, headers={"Range": wanted} if wanted else {}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_ranges_and_whole_files_are_what_is_on_the_disk(folder):
    with in_thread(folder, Shape()) as (url, _):
        file = f"{url}/deep/data.bin"
        assert fetch(file)[:2] == (200, DATA)
        for wanted, start, stop in [("0-0", 0, 1), ("5-700000", 5, 700001), ("1000000-", 1000000, None),
                                    ("1023999-9999999", 1023999, None), ("-7", -7, None)]:  # fmt: skip
            status, body, headers = fetch(file, f"bytes={wanted}")
            assert (status, body) == (206, DATA[start:stop])
            assert headers["Content-Range"].endswith(f"/{len(DATA)}")
        status, body, headers = fetch(file, method="HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", str(len(DATA)))


def test_what_is_not_there_is_not_found_and_nothing_leaves_the_folder(folder):
    with in_thread(folder, Shape()) as (url, server):
        for path in ("/nothing", "/deep", "/../secret", "/%2e%2e/secret", "/deep/../../secret"):
            assert fetch(url + path)[0] == 404
        assert fetch(f"{url}/deep/data.bin", f"bytes={len(DATA)}-")[0] == 416
        assert fetch(f"{url}/deep/data.bin", method="PUT")[0] == 405
        assert server.counts.not_found == 6


def test_requests_and_bytes_are_counted_and_set_back(folder):
    with in_process(folder, latency_ms=0, megabytes_per_s=0) as url:
        fetch(f"{url}/deep/data.bin", "bytes=0-99")
        fetch(f"{url}/deep/data.bin", "bytes=100-149")
        fetch(f"{url}/deep/nothing")
        found = counts_of(url, reset=True)
        assert (found.requests, found.bytes, found.not_found, found.in_flight) == (3, 150, 1, 0)
        assert counts_of(url).requests == 0


def test_answers_wait_and_bodies_trickle_at_least_as_long_as_they_were_told_to(folder):
    with in_thread(folder, Shape(latency_s=0.05, bytes_per_s=10e6)) as (url, server):
        started = time.perf_counter()
        assert fetch(f"{url}/deep/data.bin")[1] == DATA
        assert time.perf_counter() - started >= 0.05 + len(DATA) / 10e6
        with ThreadPoolExecutor(4) as threads:
            assert all(body == DATA for _, body, _ in threads.map(fetch, [f"{url}/deep/data.bin"] * 4))
        assert server.counts.most_in_flight > 1


def test_a_dataset_behind_it_opens_by_its_url_and_gives_the_same_values(tmp_path):
    out = tmp_path / "served"
    fmristream.convert(
        "synth://?subjects=2&shape=9x8x7&frames=12", str(out / "d"), options=ConvertOptions(split="none")
    )
    local = fmristream.open(str(out / "d"))
    with in_thread(out, Shape(latency_s=0.002)) as (url, server):
        remote = fmristream.open(f"{url}/d")
        np.testing.assert_array_equal(remote.read(1, 3, 9), local.read(1, 3, 9))
        assert remote.generation_digest == local.generation_digest
        assert server.counts.bytes > 0
