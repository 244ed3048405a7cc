"""A cache loses, never lies: what is damaged, cut short or gone counts as absent; a full disk is no error."""

import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from fmristream.errors import UsageError
from fmristream.storage.cache import CachedStore, DiskCache
from fmristream.storage.local import LocalStore
from tests.stream.stores import CountingStore

KIB = 2**10


def data_of(number: int, size: int = KIB) -> bytes:
    return np.random.default_rng(number).bytes(size)


def put(cache: DiskCache, number: int, size: int = KIB) -> None:
    cache.put("s3://b", "runs/x/c/0/0", number * size, (number + 1) * size, data_of(number, size))


def get(cache: DiskCache, number: int, size: int = KIB) -> bytes | None:
    return cache.get("s3://b", "runs/x/c/0/0", number * size, (number + 1) * size)


def chunks_in(cache: DiskCache) -> list:
    return [path for path in cache.path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_chunk_comes_back_and_another_range_does_not(tmp_path):
    cache = DiskCache(tmp_path / "cache", 100 * KIB)
    assert get(cache, 3) is None
    put(cache, 3)
    assert get(cache, 3) == data_of(3)
    assert get(cache, 4) is None
    assert cache.get("s3://other", "runs/x/c/0/0", 3 * KIB, 4 * KIB) is None
    assert get(pickle.loads(pickle.dumps(cache)), 3) == data_of(3)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_what_is_damaged_is_absent_and_removed(tmp_path, damage):
    cache = DiskCache(tmp_path, 100 * KIB)
    put(cache, 0)
    (path,) = chunks_in(cache)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "flip": whole[:9] + bytes([whole[9] ^ 1]) + whole[10:],
            "cut": whole[:-5],
            "longer": whole + b"x",
            "empty": b"",
        }[damage]
    )
    assert get(cache, 0) is None
    assert not chunks_in(cache)
    put(cache, 0)
    assert get(cache, 0) == data_of(0)


def test_what_was_used_longest_ago_makes_room(tmp_path):
    cache = DiskCache(tmp_path, 64 * KIB)
    for number in range(300):
        put(cache, number)
    total = sum(path.stat().st_size for path in chunks_in(cache))
    assert total <= 64 * KIB
    assert get(cache, 299) == data_of(299)
    assert get(cache, 0) is None


def test_what_else_lies_in_the_folder_is_not_removed(tmp_path):
    others = [
        tmp_path / name for name in ("notes.txt", "study/sub-1_bold.nii.gz", "ab/mine", "tmp/draft", "ab/" + "g" * 62)
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(50 * KIB))
        os.utime(path, (0, 0))
    cache = DiskCache(tmp_path, 20 * KIB)
    for number in range(100):
        put(cache, number)
    assert all(path.stat().st_size == 50 * KIB for path in others)
    assert sum(get(cache, number) is not None for number in range(100)) <= 20


def test_a_folder_that_is_made_is_its_owners_alone(tmp_path):
    put(DiskCache(tmp_path / "new", 20 * KIB), 1)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_processes_share_a_cache_and_its_bound(tmp_path):
    program = (
        "import sys\nfrom tests.storage.test_cache import *\n"
        "cache = DiskCache(sys.argv[1], 128 * KIB)\n"
        "for number in range(200):\n"
        "    put(cache, number)\n"
        "    found = get(cache, number)\n"
        "    assert found in (None, data_of(number))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    cache = DiskCache(tmp_path, 128 * KIB)
    assert sum(path.stat().st_size for path in chunks_in(cache)) <= 128 * KIB * (1 + 3 / 32) + 3 * 2 * KIB
    assert not list((tmp_path / "tmp").iterdir())


def test_a_disk_that_is_full_or_not_writable_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file" / "cache", 100 * KIB)
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            put(cache, number)
            assert get(cache, number) is None
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text


def test_no_name_says_what_is_in_it(tmp_path):
    cache = DiskCache(tmp_path, 100 * KIB)
    cache.put("file:///data/sub-secret", "runs/sub-secret.zarr/c/0/0", 0, KIB, data_of(0))
    assert all("secret" not in str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))


def test_vectors_are_read_once_and_tables_each_time(tmp_path):
    inner = LocalStore(str(tmp_path / "store"))
    for key in ("runs/a/moments", "tables/runs"):
        inner.put_new(key, data_of(1))
    counting = CountingStore(inner)
    store = CachedStore(counting, DiskCache(tmp_path / "cache", 100 * KIB))
    for _ in range(3):
        assert store.read("runs/a/moments") == store.read("tables/runs") == data_of(1)
        assert store.read_range("runs/a/moments", 5, 9) == data_of(1)[5:9]
    assert counting.calls["read", "runs/a/moments"] == 1
    assert counting.calls["read_range", "runs/a/moments"] == 1
    assert counting.calls["read", "tables/runs"] == 3
    store.forget("runs/a/moments")
    store.read("runs/a/moments")
    assert counting.calls["read", "runs/a/moments"] == 2


def test_a_cache_of_no_bytes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cache_bytes"):
        DiskCache(tmp_path, 0)
