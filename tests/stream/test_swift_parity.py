"""SwiFT's published preprocessing of one run, frame by frame, against what a stream of the converted run gives."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.stream.nifti_runs import converted, streamed

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPES = {
    "expected.z-norm.minback": "global-zscore",
    "expected.z-norm.zeroback": "global-zscore-zeroback",
    "expected.minmax.minback": "global-minmax",
    "expected.minmax.zeroback": "global-minmax-zeroback",
}


@pytest.mark.parametrize("output", RECIPES)
def test_a_streamed_run_is_what_swift_makes_of_it(tmp_path, output):
    case = load_file(GOLDEN / "prep_swift_a.io.safetensors")
    rule = json.loads((GOLDEN / "prep_swift_a.json").read_text())["rule_parameters"]
    assert rule["crop"] == "axis 1 [14:-7]"
    url = converted(tmp_path, {"1": np.asfortranarray(case["input"][:, 14:-7])})
    ours, expected = streamed(url, RECIPES[output]), case[output].astype(np.float64)
    assert ours.shape == expected.shape == (12, 12, 10, 5)
    assert np.abs(ours - expected).max() <= 1e-3
