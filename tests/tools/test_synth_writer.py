"""tools/synth.py writes what others can read."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fmristream.synth import Cohort
from tools.synth import main, write_bids, write_fmriprep

SMALL = {"shape": (12, 14, 10), "frames": 6, "tr_s": 0.8, "voxel_size_mm": 4.0, "masked": False}


def stored(cohort, subject, run):
    return np.stack(list(cohort.run_frames(subject, run)), axis=-1)


def test_a_raw_dataset_reads_back_bit_for_bit(tmp_path):
    cohort = Cohort(subjects=2, runs=2, **SMALL)
    paths = list(write_bids(cohort, tmp_path / "raw"))
    assert [path.relative_to(tmp_path / "raw").as_posix() for path in paths] == [
        f"sub-000{subject}/func/sub-000{subject}_task-rest_run-{run}_bold.nii.gz"
        for subject in (1, 2)
        for run in (1, 2)
    ]
    for number, path in enumerate(paths):
        image = nibabel.load(path)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), stored(cohort, number // 2, number % 2))
        assert image.get_data_dtype() == np.int16
        assert image.header.get_zooms() == pytest.approx((4, 4, 4, 0.8))
        assert image.header.get_xyzt_units() == ("mm", "sec")
        np.testing.assert_allclose(image.affine, cohort.affine())
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
        assert json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())["RepetitionTime"] == 0.8


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_every_type_reads_back(tmp_path, dtype):
    cohort = Cohort(subjects=1, dtype=dtype, **SMALL)
    (path,) = write_bids(cohort, tmp_path)
    assert path.name == "sub-0001_task-rest_bold.nii.gz"
    image = nibabel.load(path)
    assert image.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), stored(cohort, 0, 0))


def test_participants_carry_sex_and_age(tmp_path):
    cohort = Cohort(subjects=3, **SMALL)
    list(write_bids(cohort, tmp_path))
    lines = (tmp_path / "participants.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["participant_id", "sex", "age"]
    told = [line.split("\t") for line in lines[1:]]
    assert told == [[f"sub-{p['subject']}", p["sex"], str(p["age"])] for p in cohort.participants()]
    description = json.loads((tmp_path / "dataset_description.json").read_text())
    assert description["DatasetType"] == "raw"
    assert cohort.url() in description["Name"]


def test_derivatives_have_a_mask_and_confounds_beside_every_run(tmp_path):
    cohort = Cohort(subjects=2, **SMALL)
    paths = list(write_fmriprep(cohort, tmp_path))
    description = json.loads((tmp_path / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "fMRIPrep"
    for subject, path in enumerate(paths):
        stem = f"sub-000{subject + 1}_task-rest"
        assert path.name == f"{stem}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
        image = nibabel.load(path)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), stored(cohort, subject, 0))
        assert int(image.header["sform_code"]) == 4
        mask = nibabel.load(path.with_name(f"{stem}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz"))
        assert mask.shape == cohort.shape
        np.testing.assert_array_equal(np.asanyarray(mask.dataobj) == 1, cohort.brain_mask())
        np.testing.assert_allclose(mask.affine, image.affine)
        rows = [
            line.split("\t")
            for line in path.with_name(f"{stem}_desc-confounds_timeseries.tsv").read_text().splitlines()
        ]
        assert rows[0][:3] == ["global_signal", "framewise_displacement", "trans_x"]
        assert len(rows) == 1 + cohort.frames
        assert rows[1][1] == "n/a"
        brain = stored(cohort, subject, 0)[cohort.brain_mask()].mean(axis=0)
        np.testing.assert_allclose([float(row[0]) for row in rows[1:]], brain, atol=1e-3)


def test_the_same_cohort_gives_the_same_bytes(tmp_path):
    cohort = Cohort(subjects=1, **SMALL)
    (first,) = write_bids(cohort, tmp_path / "a")
    (second,) = write_bids(cohort, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_the_command_writes_a_dataset_and_prints_controls(tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "synth.py"
    out = tmp_path / "made"
    words = ["--subjects", "16", "--frames", "30", "--effect", "coupling", "--derivatives", "--controls"]
    done = subprocess.run(
        [sys.executable, str(tool), str(out), *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "16 runs of 16 subjects" in done.stdout
    assert "synth://?subjects=16&frames=30&effect=coupling&masked=false" in done.stdout
    assert all(name in done.stdout for name in ("mean image", "SD image", "functional connectivity"))
    assert len(list(out.glob("sub-*/func/*_desc-preproc_bold.nii.gz"))) == 16


def test_what_makes_no_sense_exits_with_2_and_one_sentence(tmp_path, capsys):
    (tmp_path / "precious").write_text("data")
    assert main([str(tmp_path), "--subjects", "1"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert main([str(tmp_path / "new"), "--effect", "magic"]) == 2
    assert "one of none, coupling" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "--frames", "40000"]) == 2
    assert "NIfTI-1" in capsys.readouterr().err
