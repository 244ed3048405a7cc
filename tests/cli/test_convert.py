"""`fmristream convert` in words: its report, its exit status, its options."""

import json
import shlex

import numpy as np
import pytest

from fmristream.cli.main import main
from fmristream.shards.dataset import open_dataset
from tests.report.datasets import brain_like, write_runs

WHOLE = ["--mask", "none", "--split", "none"]


@pytest.fixture
def mixed(tmp_path):
    """A good run beside a damaged one and a volume."""
    source = write_runs(tmp_path / "source", {"sub-1_bold.nii.gz": brain_like(), "sub-2_T1w.nii": brain_like()[..., 0]})
    damaged = bytearray((source / "sub-1_bold.nii.gz").read_bytes())
    damaged[len(damaged) // 2] ^= 8
    (source / "sub-3_bold.nii.gz").write_bytes(damaged)
    return source


def test_damaged_files_beside_good_ones_end_in_3_and_are_listed_with_reasons(mixed, tmp_path, capsys):
    assert main(["convert", str(mixed), str(tmp_path / "d"), *WHOLE]) == 3
    text = capsys.readouterr().out
    [line] = [line for line in text.splitlines() if line.startswith("sub-3_bold")]
    assert "gzip data are damaged" in line
    assert "a 3-D image" in text
    assert main(["verify", str(tmp_path / "d"), "--against", str(mixed)]) == 0


def test_the_report_as_json(mixed, tmp_path, capsys):
    assert main(["convert", str(mixed), str(tmp_path / "d"), *WHOLE, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 3
    assert (report["runs"], report["frames"], report["subjects"]) == (1, 7, 1)
    assert sorted(one["name"] for one in report["quarantined"]) == ["sub-2_T1w", "sub-3_bold"]
    dataset = open_dataset(str(tmp_path / "d"))
    assert report["content_digest"] == dataset.content_digest
    assert report["generation_digest"] == dataset.generation_digest


def test_a_second_time_says_that_nothing_was_to_be_done(mixed, tmp_path, capsys):
    words = ["convert", str(mixed), str(tmp_path / "d"), *WHOLE]
    assert main(words) == 3
    capsys.readouterr()
    assert main(words) == 3
    assert "holds exactly this already" in capsys.readouterr().out


def test_nothing_that_can_be_converted_is_a_failure(tmp_path, capsys):
    source = write_runs(tmp_path / "source", {"T1w.nii": brain_like()[..., 0]})
    assert main(["convert", str(source), str(tmp_path / "d"), *WHOLE, "--quiet"]) == 1
    assert "none of 1 inputs can be converted" in capsys.readouterr().err


def test_an_empty_part_of_the_split_is_a_failure_that_says_what_to_do(tmp_path, capsys):
    source = write_runs(tmp_path / "source", {"sub-1_bold.nii": brain_like()})
    assert main(["convert", str(source), str(tmp_path / "d"), "--mask", "none", "--quiet"]) == 1
    assert "--split none" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(mixed, tmp_path, capsys):
    assert main(["convert", str(mixed), str(tmp_path / "d"), *WHOLE, "--dry-run"]) == 3
    text = capsys.readouterr().out
    assert "would be converted" in text
    for word in ("runs", "subjects", "frames", "about", "files in", "folders", "quarantined"):
        assert word in text
    assert not (tmp_path / "d").exists()
    assert main(["convert", str(mixed), str(tmp_path / "d"), *WHOLE, "--dry-run", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["dry_run"] is True


def test_options_reach_the_conversion(tmp_path, capsys):
    runs = {f"S{n}/rest.nii": brain_like(seed=n) for n in range(8)}
    source = write_runs(tmp_path / "source", {**runs, "phantom/rest.nii": brain_like()})
    mask = np.zeros((5, 4, 6), "u1")
    mask[2:, 1:, 1:] = 1
    write_runs(tmp_path, {"mask.nii": mask})
    options = ["--mask", str(tmp_path / "mask.nii"), "--split", "exact", "--split-ratios", "0.5,0.25,0.25"]
    options += ["--split-seed", "3", "--space", "MNI152NLin6Asym", "--subject-pattern", r"S(\d+)/", "--tr", "0.72"]
    assert main(["convert", str(source), str(tmp_path / "d"), *options]) == 0
    text = capsys.readouterr().out
    assert "train 4, val 2, test 2 subjects" in text
    assert "1 file: the subject pattern does not match" in text
    dataset = open_dataset(str(tmp_path / "d"))
    assert {run.subject for run in dataset.runs} == {str(n) for n in range(8)}
    assert {(run.space, run.tr_s, run.voxels) for run in dataset.runs} == {("MNI152NLin6Asym", 0.72, 3 * 3 * 5)}
    assert dataset.generation.document["split"] == {"kind": "exact", "ratios": [0.5, 0.25, 0.25], "seed": 3}
    # What the report says to do next is a command that works.
    [line] = [line for line in text.splitlines() if line.startswith("  fmristream verify")]
    assert main(shlex.split(line)[1:]) == 0


def test_a_split_file_is_used(tmp_path, capsys):
    source = write_runs(tmp_path / "source", {f"sub-{name}_bold.nii": brain_like() for name in "abc"})
    (tmp_path / "split.tsv").write_text("subject\tsplit\na\ttrain\nb\tval\nc\ttest\n")
    words = ["convert", str(source), str(tmp_path / "d"), "--mask", "none", "--split", str(tmp_path / "split.tsv")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 1, "val": 1, "test": 1}


def test_progress_is_one_line_a_stage_and_nothing_when_quiet(tmp_path, capsys):
    words = ["convert", "synth://?subjects=2&shape=8x8x8&frames=4"]
    assert main([*words, str(tmp_path / "a"), "--split", "none"]) == 0
    assert capsys.readouterr().err.splitlines() == ["reading headers: 2 runs", "converting: 8 frames"]
    assert main([*words, str(tmp_path / "b"), "--split", "none", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_warnings_are_part_of_the_report(tmp_path, capsys):
    runs = {f"sub-{n}_bold.nii": brain_like(seed=n) for n in range(2)}
    source = write_runs(tmp_path / "source", runs, sform_code=1)
    assert main(["convert", str(source), str(tmp_path / "d"), *WHOLE]) == 0
    assert "voxels of different subjects do not correspond" in capsys.readouterr().out


def test_atlases_and_what_lies_beside_runs_are_options(tmp_path, capsys):
    source = write_runs(tmp_path / "source", {"sub-1_bold.nii": brain_like()})
    atlas = np.zeros(brain_like().shape[:3], "u1")
    atlas[1:3], atlas[3:] = 1, 7
    write_runs(tmp_path, {"atlas.nii": atlas})
    options = [*WHOLE, "--space", "MNI", "--atlas", str(tmp_path / "atlas.nii"), "--no-side", "--no-sketch"]
    assert main(["convert", str(source), str(tmp_path / "d"), *options]) == 0
    dataset = open_dataset(str(tmp_path / "d"))
    assert dataset.parcels(0).labels.tolist() == [1, 7]
    assert dataset.sketch(0) is None
    assert main(["info", str(tmp_path / "d")]) == 0
    assert f"{dataset.parcels(0).atlas[:8]} (2 parcels)" in capsys.readouterr().out
    aligned = [*WHOLE, "--space", "T1w", "--atlas", str(tmp_path / "atlas.nii")]
    assert main(["convert", str(source), str(tmp_path / "e"), *aligned]) == 2
    assert "does not fit every subject" in capsys.readouterr().err


def test_the_help_names_every_kind_that_is_known(capsys):
    from fmristream.ingest.sources.collection import known_collections

    assert main(["convert", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(kind in shown.replace("- ", "-") for kind in ("bids", "folder", *known_collections()))
