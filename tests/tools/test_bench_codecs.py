"""The benchmark of codecs runs, compares what it says it compares, and notices a bound that does not hold."""

import json

import numpy as np
import pytest

from tools.bench_codecs import Comparison, main


def test_every_codec_gets_a_row_and_every_bound_holds(tmp_path, capsys):
    assert main(["--frames", "24", "--shape", "9x8x7", "--rounds", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 12
    assert len(capsys.readouterr().out.splitlines()) == 14
    by_codec = {row["codec"]: row for row in rows if row["run"] == "made_float32"}
    for exact in ("lossless", "raw"):
        assert by_codec[exact]["max_error_sd"] == by_codec[exact]["voxel_dr_max"] == 0
    assert by_codec["raw"]["bytes_per_voxel"] >= 4
    for lossy in ("int16", "int8"):
        assert 0 < by_codec[lossy]["rms_error_sd"] < by_codec[lossy]["max_error_sd"] <= by_codec[lossy]["bound_sd"]
    assert by_codec["int8"]["rms_error_sd"] < by_codec["global-int8"]["rms_error_sd"]


def test_errors_and_connectivity_are_those_of_numpy():
    rng = np.random.default_rng(0)
    values = rng.normal(100, 5, (50, 12)).astype("<f4")
    values[:, 4] = 7
    decoded = values.astype(np.float64) + rng.normal(0, 0.5, values.shape) * (np.arange(12) != 4)
    row = Comparison("run", values).row(
        "x", decoded, bytes_per_voxel=1, all_bytes_per_voxel=1, encode_mb_s=None, decode_mb_s=None, bound_sd=None,
        escaped_share=0,
    )  # fmt: skip
    changing = np.delete(np.arange(12), 4)
    error = np.abs(decoded - values)[:, changing] / values[:, changing].astype(np.float64).std(axis=0)
    assert row.max_error_sd == pytest.approx(error.max())
    assert row.rms_error_sd == pytest.approx(np.sqrt((error**2).mean()))
    before, after = (np.corrcoef(data[:, changing].T.astype(np.float64)) for data in (values, decoded))
    upper = np.triu_indices(11, k=1)
    assert row.voxel_dr_max == pytest.approx(np.abs(after - before)[upper].max())
    assert row.voxel_dr_mean == pytest.approx(np.abs(after - before)[upper].mean())
