"""The benchmark of catalogues measures what it says: every figure is there, and the index costs what FORMAT.md says."""

import json
import subprocess
import sys


def test_a_small_catalogue_is_made_opened_and_removed(tmp_path):
    command = [sys.executable, "tools/bench_catalogue.py", str(tmp_path / "out"), "--runs", "64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert (figures["runs"], figures["frames"]) == (64, 64 * 550)
    assert figures["index_bytes_a_frame"] == (4 * 550 + 4) / 550
    assert {"plan_s", "commit_s", "open_s", "info_s", "open_private_mb", "info_private_mb"} | {
        "first_batch_s",
        "first_batch_private_mb",
        "first_batch_all_s",
        "first_batch_all_private_mb",
    } <= set(figures)
    assert all(value > 0 for value in figures.values())
    assert not (tmp_path / "out").exists()
