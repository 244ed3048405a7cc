"""A loader that runs for long keeps its memory, threads and file descriptors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.stream.range_server import range_server

MIB = 2**20


@pytest.mark.parametrize("batches", [2000, pytest.param(20_000, marks=pytest.mark.full)])
def test_memory_threads_and_descriptors_stay_flat(cohort_url, batches):
    require_flat(cohort_url, batches, spare_descriptors=2)  # those of a read under way


@pytest.mark.parametrize("batches", [400, pytest.param(5_000, marks=pytest.mark.full)])
def test_they_stay_flat_over_the_network(cohort_url, batches):
    with range_server(Path(cohort_url)) as server:
        # Connections come and go. So short a run is still warming up; the long one tells.
        require_flat(server.url, batches, spare_descriptors=50, limit=100 * MIB if batches < 1000 else MIB)


def require_flat(url: str, batches: int, *, spare_descriptors: int, limit: int = MIB) -> None:
    command = [sys.executable, "-m", "tests.stream.soak", url, str(batches)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout
    done, rss, threads, descriptors = np.array(json.loads(output), dtype=np.float64).T
    settled = done > batches // 4
    per_thousand = np.polyfit(done[settled], rss[settled], 1)[0] * 1000
    assert per_thousand < limit, f"{per_thousand / MIB:.2f} MiB more every 1,000 batches"
    assert np.ptp(threads[settled]) == 0
    assert np.ptp(descriptors[settled]) <= spare_descriptors
