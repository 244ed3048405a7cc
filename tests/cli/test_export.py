"""`fmristream export` in words, and the options of convert that it depends on."""

import gzip
import json

import pytest

from fmristream.cli.main import main
from tests.ingest.nifti_files import nifti_bytes
from tests.report.datasets import brain_like, files_of, flip_bit, write_runs


@pytest.fixture
def url(tmp_path, capsys):
    """Two runs with their original headers."""
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii.gz": brain_like(), "sub-2_bold.nii": brain_like(seed=1)})
    words = ["convert", str(source), str(tmp_path / "out"), "--layout", "volume", "--header", "keep", "--split", "none"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "kept, every byte" in text
    assert "may name a person" in text
    return str(tmp_path / "out")


def test_one_run_is_written_and_said_to_be_the_source(url, tmp_path, capsys):
    target = tmp_path / "back.nii"
    assert main(["export", url, "--run", "sub-1_bold", str(target)]) == 0
    assert target.read_bytes() == nifti_bytes(brain_like())
    text = capsys.readouterr().out
    assert "byte for byte" in text
    assert f"{len(nifti_bytes(brain_like())):,} bytes" in text


def test_all_runs_go_into_a_folder_under_their_names(url, tmp_path, capsys):
    folder = tmp_path / "back"
    assert main(["export", url, str(folder), "--all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [file["run"] for file in report["files"]] == ["sub-1_bold", "sub-2_bold"]
    for number, seed in ((1, 0), (2, 1)):
        path = folder / f"sub-{number}" / "func" / f"sub-{number}_bold.nii.gz"
        assert gzip.decompress(path.read_bytes()) == nifti_bytes(brain_like(seed=seed))
    assert len(files_of(folder)) == 2


def test_files_that_are_there_are_wrong_usage_before_anything_is_written(url, tmp_path, capsys):
    folder = tmp_path / "back"
    (folder / "sub-2" / "func").mkdir(parents=True)
    (folder / "sub-2" / "func" / "sub-2_bold.nii").write_bytes(b"mine")
    assert main(["export", url, str(folder), "--all", "--plain"]) == 2
    assert "1 of 2 files exist already" in capsys.readouterr().err
    assert len(files_of(folder)) == 1
    assert main(["export", url, str(folder), "--all", "--plain", "--force"]) == 0
    assert (folder / "sub-2" / "func" / "sub-2_bold.nii").read_bytes() == nifti_bytes(brain_like(seed=1))


def test_a_damaged_run_ends_in_1_and_the_others_are_written(url, tmp_path, capsys):
    flip_bit(next(path for path in files_of(tmp_path / "out") if path.match("0/c/0/0/0/0")))
    assert main(["export", url, str(tmp_path / "back"), "--all"]) == 1
    text = capsys.readouterr().out
    assert "checksum differs" in text
    assert len(files_of(tmp_path / "back")) == 1


def test_several_runs_and_no_name_is_wrong_usage(url, tmp_path, capsys):
    assert main(["export", url, str(tmp_path / "back.nii")]) == 2
    assert "give --run NAME or --all" in capsys.readouterr().err
    assert main(["export", url, str(tmp_path / "back.nii"), "--run", "sub-9_bold"]) == 2
    assert main(["export", url, str(tmp_path / "back.img"), "--run", "sub-1_bold"]) == 2


def test_a_scrubbed_and_a_masked_dataset_say_what_differs(tmp_path, capsys):
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like()})
    assert main(["convert", str(source), str(tmp_path / "scrub"), "--layout", "volume", "--split", "none"]) == 0
    assert "scrubbed; held and removed: descrip (1 run)" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "scrub"), str(tmp_path / "scrub.nii")]) == 0
    assert "the header was scrubbed; removed: descrip" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "voxels"), "--mask", "none", "--split", "none"]) == 0
    assert "headers" not in capsys.readouterr().out
    assert main(["export", str(tmp_path / "voxels"), str(tmp_path / "voxels.nii")]) == 0
    assert "the header was made anew" in capsys.readouterr().out


def test_keeping_headers_where_none_are_stored_is_wrong_usage(tmp_path, capsys):
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like()})
    assert main(["convert", str(source), str(tmp_path / "out"), "--header", "keep"]) == 2
    assert "add --layout volume" in capsys.readouterr().err


def test_a_dry_run_tells_what_will_become_of_headers(tmp_path, capsys):
    source = write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like()})
    words = ["convert", str(source), str(tmp_path / "out"), "--layout", "volume", "--dry-run", "--split", "none"]
    assert main(words) == 0
    assert "to be scrubbed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
