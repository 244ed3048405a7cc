"""`fmristream verify` in words."""

import json

from fmristream.cli.main import main
from tests.report.datasets import brain_like, flip_bit, two_runs, write_runs


def test_a_sound_dataset_ends_in_0_and_says_what_was_checked(tmp_path, capsys):
    source, url = two_runs(tmp_path)
    assert main(["verify", str(url), "--deep", "--against", str(source)]) == 0
    caught = capsys.readouterr()
    assert "is sound" in caught.out
    assert "1,680 stored values in 14 frames of 2 runs" in caught.out
    assert caught.err.splitlines()[-2:] == ["decoding: 14 frames", "comparing with the source: 14 frames"]


def test_a_fault_ends_in_1_and_is_listed_by_run_and_object(tmp_path, capsys):
    _, url = two_runs(tmp_path)
    flip_bit(next(url.rglob("residual/c/0/0")))
    assert main(["verify", str(url)]) == 1
    text = capsys.readouterr().out
    assert "has 1 fault" in text
    [line] = [line for line in text.splitlines() if line.startswith("sub-1_bold")]
    assert "residual/c/0/0" in line
    assert "blake3" in line


def test_the_verdict_as_json(tmp_path, capsys):
    source, url = two_runs(tmp_path)
    assert main(["verify", str(url), "--json", "--against", str(source)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_sound"] is True
    assert report["voxels_compared"] == 2 * brain_like().size
    write_runs(source, {"sub-1_bold.nii.gz": brain_like(seed=5)})
    assert main(["verify", str(url), "--json", "--against", str(source)]) == 1
    [fault] = json.loads(capsys.readouterr().out)["faults"]
    assert fault["run"] == "sub-1_bold"


def test_comparing_with_an_unrelated_source_never_ends_in_0(tmp_path, capsys):
    _, url = two_runs(tmp_path)
    other = write_runs(tmp_path / "other", {"sub-9_bold.nii": brain_like()})
    assert main(["verify", str(url), "--against", str(other)]) == 1
    assert "not one voxel was compared" in capsys.readouterr().out


def test_a_source_that_is_not_there_is_wrong_usage(tmp_path, capsys):
    _, url = two_runs(tmp_path)
    assert main(["verify", str(url), "--against", str(tmp_path / "nowhere")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
