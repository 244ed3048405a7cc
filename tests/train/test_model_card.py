"""A card says what the network is and how well it does, from what is in the folder, and names nobody."""

import json

import fmristream
from tests.train.small import write_small
from train.beyond.trained import load_trained
from train.main import main
from train.model_card import CARD, card


def test_a_finished_run_has_a_card_of_its_numbers_that_names_nobody(cohort, tmp_path):
    write_small(tmp_path, cohort, data={"stride": 14}, train={"steps": 2}, eval={"bootstrap_draws": 20})
    out = tmp_path / "run"
    assert main([str(tmp_path / "small.toml"), "--out", str(out)]) == 0
    text = (out / CARD).read_text()
    report = json.loads((out / "report.json").read_text())
    value, (low, high) = report["test"]["metrics"]["auroc"], report["test"]["intervals"]["auroc"]
    assert f"| test | sex | 6 | auroc | {value:.3f} | {low:.3f} to {high:.3f} |" in text
    assert "above 0 M, below F" in text
    assert f"- content: {fmristream.open(str(cohort)).content_digest}" in text
    assert "grid 12 x 12 x 12 voxels of 16 x 16 x 16 mm" in text
    assert not any(row["subject"] in text for row in report["test"]["subjects"])
    assert report["beside"]["status"] == "done"
    assert "No baseline was computed" not in text
    (row, *_) = report["beside"]["targets"]["sex"]["baselines"][0]["differences"]
    assert f"| sex | functional connectivity | auroc | {row['difference']:+.3f} |" in text
    assert all(f"- {said}" in text for said in report["beside"]["targets"]["sex"]["verdict"])
    left_out = card(load_trained(str(out)), report | {"beside": {"status": "left out", "why": "the recipe says so"}})
    assert "No baseline was computed (left out: the recipe says so)" in left_out
    assert "weights as the last step left them" in text
    assert card(load_trained(str(out)), None).count("No validation or test split was scored.") == 1
