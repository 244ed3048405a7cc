"""Anomalies: every value is hidden, errors are those of the analysis of BrainLM, and what is planted comes first."""

import csv
import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from fmristream.catalog.row_tables import read_rows
from fmristream.errors import UsageError
from train.beyond.anomaly import Reference, RunErrors, ranked, report, run_errors
from train.beyond.anomaly_errors import errors_of, series_masks
from train.beyond.opened import open_for
from train.beyond.trained import load_trained
from train.launch import World
from train.main import main
from train.models.brainlm_analysis import AnomalyScores, forecast
from train.models.series_masking import Masking

SERIES = {"normalize": "parcels | voxel-zscore", "window": 8, "stride": 8}
BRAINLM = {
    "name": "brainlm",
    "timepoint_patching_size": 4,
    "conv_kernel_size": 3,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}
MAE = {
    "name": "mae4d-pretrain",
    "patch_size": [4, 4, 4, 4],
    "embed_dim": 12,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 8,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
TFF = {
    "name": "tff2",
    "intermediate_vec": 16,
    "num_attention_heads": 2,
    "bert_intermediate_size": 24,
    "transformer_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def brainlm(parcelled, train_tables):
    return train_tables(
        data=SERIES | {"url": parcelled}, model=BRAINLM, objective={"kind": "masked", "mask_ratio": 0.5}
    )


@pytest.fixture
def opened(brainlm, parcelled):
    with ExitStack() as stack:
        yield open_for(load_trained(str(brainlm)), parcelled, split="test", world=World(), stack=stack)


def test_every_value_is_hidden_and_forecasts_are_those_of_the_analysis(opened):
    batch = next(opened.batches())
    signal, named = opened.inputs(batch)
    with torch.no_grad():
        masks = series_masks(Masking(ratio=0.2), opened.model, signal, named)
        assert bool(torch.stack([found.hidden for found in masks]).any(0).all())
        sums = errors_of(opened).of(signal, named)
        step = opened.model.patch
        ahead = forecast(opened.model, signal[:, :, :-step], named["xyz"], frames=step, window=8)
    expected = (ahead.double() - signal[:, :, -step:].double()).square().mean(2)
    total, count = sums["forecast"]
    assert torch.allclose(total / count, expected, rtol=1e-6)


def test_a_run_has_the_mean_over_its_windows_whatever_the_batches(opened):
    found = run_errors(opened)
    rows = {"reconstruction": [], "forecast": []}
    errors = errors_of(opened)
    for number in range(opened.clips.num_windows):
        series = torch.from_numpy(opened.clips[number]["packed"][0].T[opened.signal.parcels].copy())[None]
        with torch.no_grad():
            sums = errors.of(series, {"xyz": opened.inputs.xyz})
        for kind, (total, count) in sums.items():
            rows[kind].append((total / count)[0].numpy())
    for kind, values in rows.items():
        by_run = np.stack(values).reshape(3, 3, -1).mean(1)
        assert np.allclose(found.errors[kind], by_run, rtol=1e-4)
    assert len(found.about_runs["run"]) == 3


def test_z_is_that_of_the_analysis():
    rng = np.random.default_rng(0)
    errors, known = np.exp(rng.normal(size=(4, 5))), np.exp(rng.normal(size=(9, 5)))
    expected = AnomalyScores(reconstruction=errors, forecast=errors).against(
        AnomalyScores(reconstruction=known, forecast=known)
    )
    assert np.allclose(Reference.of(known).z(errors), expected.reconstruction)
    with pytest.raises(UsageError, match="3 runs or more"):
        Reference.of(known[:2])


def test_a_planted_run_and_place_come_first():
    rng = np.random.default_rng(1)
    known = np.exp(0.1 * rng.normal(size=(30, 6)))
    errors = np.exp(0.1 * rng.normal(size=(8, 6)))
    errors[5, 2] *= 9
    runs = {"run": [f"run-{number}" for number in range(8)]}
    found = RunErrors(places=tuple("abcdef"), errors={"reconstruction": errors}, about_runs=runs)
    rows = ranked(found, {"reconstruction": Reference.of(known)})
    assert rows[0]["run"] == "run-5"
    assert rows[0]["reconstruction_worst_places"].startswith("c (z ")
    assert rows[0]["reconstruction_share_of_reference_below"] == 1.0
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert "| 1 | run-5 |" in report(rows, ["said"], url="s3://bucket/x", reference="train, 30 runs")


def test_the_task_writes_ranks_places_and_the_reference(brainlm, parcelled, tmp_path):
    out = tmp_path / "out"
    assert main(["--task", "anomaly", str(brainlm), parcelled, "--out", str(out), "--split", "test"]) == 0
    with open(out / "runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    z = [float(row["reconstruction_z"]) + float(row["forecast_z"]) for row in rows]
    assert z == sorted(z, reverse=True)
    table, facts = read_rows(out / "places.parquet")
    assert table["forecast_z"].shape == (3, 27)
    assert facts["places"][-1] == "parcel 26"
    kept = json.loads((out / "reference.json").read_text())
    assert kept["runs"] == 6
    assert kept["kinds"]["forecast"]["quantiles_of_mean_error"]["0.5"] > 0
    assert "statistics of the whole run" in (out / "report.md").read_text()


def test_a_network_that_completes_nothing_is_refused(trained_sex, cohort, tmp_path, capsys):
    assert main(["--task", "anomaly", str(trained_sex), cohort, "--out", str(tmp_path / "out")]) == 2
    assert "completes nothing" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(
    ("data", "model", "objective"),
    [
        ({"window": 8}, MAE, {"kind": "masked"}),
        ({"window": 8}, MAE | {"mask": "random"}, {"kind": "masked"}),
        (
            {"window": 8, "stats": "context", "context": 4},
            MAE | {"mask": "future", "mask_ratio": 0.5},
            {"kind": "masked"},
        ),
        ({"window": 2, "stride": 6, "normalize": "tff"}, TFF, {"kind": "reconstruct"}),
    ],
)
def test_volumes_have_errors_by_place(parcelled, train_tables, data, model, objective):
    run = train_tables(data=data | {"url": parcelled}, model=model, objective=objective)
    with ExitStack() as stack:
        opened = open_for(load_trained(str(run)), parcelled, split="val", world=World(), stack=stack)
        found = run_errors(opened)
    errors = found.errors["reconstruction"]
    assert errors.shape == (3, len(found.places))
    assert np.isfinite(errors).all()
    assert (errors > 0).all()
    assert len(set(found.places)) == len(found.places)
