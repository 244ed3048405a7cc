"""The cost model measures a conversion and scales it by frames."""

import json

from tools.cost import main


def test_a_collection_costs_what_its_frames_cost(tmp_path, capsys):
    sizes = ["9x8x7x24", "9x8x7x48"]
    assert main([str(tmp_path), "--frames", "12", "--sizes", *sizes, "--json", str(tmp_path / "costs.json")]) == 0
    short, long = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert short["cpu_s"] > 0
    assert 0 < short["stored_bytes"] <= long["stored_bytes"] / 1.9
    assert long["source_bytes"] == 2 * short["source_bytes"]
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 3
    assert not (tmp_path / "cost").exists()
