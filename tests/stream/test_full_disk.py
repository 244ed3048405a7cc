"""A disk that is really full under the cache: a file system of some kilobytes, mounted in a name space of its own."""

import json
import subprocess
import sys

import pytest

MOUNT = 'mount -t tmpfs -o size=192k tmpfs "$1" && shift && exec "$@"'


def in_a_tiny_disk(folder: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command for which the folder is a disk of 192 KiB, which is gone afterwards."""
    apart = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", folder, *command]
    return subprocess.run(apart, capture_output=True, text=True, timeout=300)


@pytest.mark.full  # mounts
def test_streaming_goes_on_when_the_disk_of_the_cache_is_full(cohort_url, tmp_path):
    folder = str(tmp_path)
    try:
        if in_a_tiny_disk(folder, "true").returncode:
            pytest.skip("this machine mounts nothing for tests")
    except FileNotFoundError:
        pytest.skip("no unshare here")
    done = in_a_tiny_disk(folder, sys.executable, "-m", "tests.stream.full_disk", cohort_url, folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["passes"]
    assert first["same"]
    assert second["same"]
    for one in (first, second):  # each opens the cache anew, meets the full disk, and says so once
        assert len(one["told"]) == 1
        assert "No space left on device" in one["told"][0]
        assert "going on without it" in one["told"][0]
    assert second["hits"] > 0  # what fitted is used
    assert found["files"] == found["whole"] > 0
    assert found["unfinished"] == 0
    assert found["free_bytes"] < 16 * 2**10
    assert not list(tmp_path.iterdir())
