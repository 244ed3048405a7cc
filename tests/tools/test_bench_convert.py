"""The benchmark of conversions runs, on runs that it makes and on files that it is given."""

import json
import shutil

import nibabel
import numpy as np

from tools.bench_convert import COMMANDS, made_run, main

OURS = ["fmristream, 1 thread", "fmristream, 2 threads"]
OTHERS = ["nibabel + numpy", "SwiFT-style", "TFF-style"]


def test_a_made_run_is_what_it_is_said_to_be(tmp_path):
    for dtype in ("int16", "float32"):
        run = made_run(tmp_path, dtype, (20, 18, 16), 12)
        image = nibabel.load(run.path)
        values, mask = np.asanyarray(image.dataobj), np.load(run.mask)
        assert (values.shape, values.dtype.name, values.nbytes) == ((20, 18, 16, 12), dtype, run.bytes)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        assert ((values != 0).all(axis=3) == mask).all()
        assert 0.15 < mask.mean() < 0.35
        inside = values[mask].astype(float)
        np.testing.assert_allclose((inside.std(axis=1) / inside.mean(axis=1)).mean(), 0.016, rtol=0.1)


def test_every_case_is_measured_in_every_round_and_told(tmp_path, capsys):
    result = tmp_path / "result.json"
    made = ["--shape", "16x16x10", "--frames", "20", "--rounds", "2", "--json", str(result)]
    assert main([str(tmp_path / "out"), *made, "--dtypes", "int16"]) == 0
    [run] = json.loads(result.read_text())["runs"]
    commands = [name for name, command in COMMANDS.items() if shutil.which(command[0])]
    base = commands[0] if "igzip -dc" in commands else "python-isal"
    assert run["base"] == base
    assert list(run["cases"]) == [*([] if base in commands else [base]), *commands, *OURS, *OTHERS]
    for name, case in run["cases"].items():
        assert len(case["seconds"]) == len(case["cpu_s"]) == 2
        assert len(case["rss_mb"]) == (0 if name in COMMANDS else 2)
        assert min(case["seconds"]) > 0
        assert case["pinned"] == (name != OURS[1])
        assert case["mb_s"] > 0
    assert run["cases"][base]["ratio"] == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in run["cases"])
    assert not list((tmp_path / "out").glob("scratch-*"))


def test_files_of_the_user_are_measured_with_the_mask_that_convert_would_compute(tmp_path):
    run = made_run(tmp_path, "int16", (24, 24, 18), 20)
    result = tmp_path / "result.json"
    assert main([str(tmp_path / "out"), run.path, "--rounds", "1", "--cases", OURS[0], "--json", str(result)]) == 0
    [found] = json.loads(result.read_text())["runs"]
    assert (found["shape"], found["dtype"]) == ([24, 24, 18, 20], "int16")
    assert list(found["cases"])[1:] == [OURS[0]]
    mask = np.load(tmp_path / "out" / "sub-01_task-int16x24x24x18x20_bold.nii.gz.mask.npy")
    assert mask.shape == (24, 24, 18)
    assert mask.any()
