"""A loader that runs for long keeps its memory, threads and file descriptors."""

import json
import subprocess
import sys

import numpy as np
import pytest

MIB = 2**20


@pytest.mark.parametrize("batches", [2000, pytest.param(20_000, marks=pytest.mark.full)])
def test_memory_threads_and_descriptors_stay_flat(cohort_url, batches):
    command = [sys.executable, "-m", "tests.stream.soak", cohort_url, str(batches)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout
    done, rss, threads, descriptors = np.array(json.loads(output), dtype=np.float64).T
    settled = done > batches // 4
    per_thousand = np.polyfit(done[settled], rss[settled], 1)[0] * 1000
    assert per_thousand < MIB, f"{per_thousand / MIB:.2f} MiB more every 1,000 batches"
    assert np.ptp(threads[settled]) == 0
    assert np.ptp(descriptors[settled]) <= 2  # those of a read under way
