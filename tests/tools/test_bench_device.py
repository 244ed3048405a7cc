"""The benchmark of devices measures what it says, and says where no GPU was there."""

import json
import subprocess
import sys

import pytest
import torch


@pytest.mark.full
def test_a_small_one_runs_through():
    command = [
        sys.executable,
        "tools/bench_device.py",
        "--device",
        "cpu",
        "--grid",
        "24",
        "--frames",
        "4",
        "--batch",
        "1",
    ]
    done = subprocess.run([*command, "--repeats", "1", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    place = figures["place"]
    assert (
        place["packed float32, placed on the device"]["bus_mb"]
        == 2 * place["packed float16, placed on the device"]["bus_mb"]
    )
    # 41 % of the padded-away crop is brain: a quarter of the grid's voxels travel.
    share = place["packed float16, placed on the device"]["bus_mb"] / place["float16, placed on the CPU"]["bus_mb"]
    assert 0.2 < share < 0.3
    assert all(one["ms"] > 0 for one in place.values())
    assert all(value > 0 for value in figures["appetite"].values())
    assert "no GPU figure has been taken" in figures["machine"]["note"]
    assert figures["machine"]["torch"] == torch.__version__
