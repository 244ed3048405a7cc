"""`fmristream convert --format webdataset`: from a dataset, and from NIfTI files by way of one."""

import json
from pathlib import Path

import pytest

from fmristream.cli.main import main
from fmristream.report.tar_options import TarOptions
from fmristream.report.webdataset import write_webdataset
from fmristream.shards.dataset import open_dataset
from fmristream.storage import open_store
from tests.report.datasets import brain_like, flip_bit, write_runs
from tests.report.tars import objects_of, samples_of

CHOICES = ["--mask", "none", "--split", "none", "--space", "MNI"]
TARS = ["--format", "webdataset", "--window", "3"]


@pytest.fixture
def source(tmp_path) -> Path:
    """Two good runs and a damaged one."""
    folder = write_runs(tmp_path / "in", {f"sub-{n}_bold.nii.gz": brain_like(seed=n) for n in range(3)}, sform_code=0)
    flip_bit(folder / "sub-2_bold.nii.gz")
    return folder


def test_nifti_files_become_a_dataset_that_stays_and_tars_of_it(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), *CHOICES, *TARS, "--workers", "1"]) == 3, "one run is set aside"
    text = capsys.readouterr().out
    assert f"converted {source} into {out}-dataset" in text
    assert "sub-2_bold" in text
    assert f"WebDataset({out}/unsplit/unsplit-000000.tar)" in text
    assert len(samples_of(out / "unsplit")) == 4
    dataset = open_dataset(f"{out}-dataset")
    write_webdataset(dataset, str(tmp_path / "direct"), options=TarOptions(window=3))
    assert objects_of(open_store(str(tmp_path / "direct"))) == objects_of(open_store(str(out)))
    assert main(["convert", str(source), str(out), *CHOICES, *TARS]) == 3
    assert "holds exactly these tar shards already" in capsys.readouterr().out


def test_a_dataset_is_a_source_and_every_option_arrives(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "d"), *CHOICES]) == 3
    capsys.readouterr()
    words = "--stride 2 --normalize global-zscore --dtype float16 --arrays placed --grid 6,4x6 --samples-per-shard 3 --seed 7"
    more = [*words.split(), "--parts", "unsplit", "--with-subjects", "--workers", "2", "--json"]
    assert main(["convert", str(tmp_path / "d"), str(tmp_path / "out"), *TARS, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["conversion"] is None
    [part] = report["webdataset"]["parts"]
    assert (part["name"], part["subjects"], part["runs"], part["samples"], part["shards"]) == ("unsplit", 2, 2, 6, 2)
    options = TarOptions(
        window=3, stride=2, normalize="global-zscore", dtype="float16", arrays="placed", grid=(6, 4, 6),
        samples_per_shard=3, seed=7, parts=("unsplit",), with_subjects=True,
    )  # fmt: skip
    write_webdataset(open_dataset(str(tmp_path / "d")), str(tmp_path / "direct"), options=options)
    assert objects_of(open_store(str(tmp_path / "direct"))) == objects_of(open_store(str(tmp_path / "out")))


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), *CHOICES, *TARS, "--dry-run"]) == 0
    assert "would be converted" in capsys.readouterr().out
    main(["convert", str(source), str(tmp_path / "d"), *CHOICES])
    assert main(["convert", str(tmp_path / "d"), str(tmp_path / "out"), *TARS, "--dry-run"]) == 0
    assert "would be written as tar shards" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "in"]


def test_via_says_where_the_dataset_on_the_way_lies(source, tmp_path, memory_url):
    words = ["convert", str(source), memory_url, *CHOICES, *TARS, "--quiet"]
    assert main(words) == 2, "no dataset that names subjects is put beside a URL that is not on this disk"
    assert main([*words, "--via", str(tmp_path / "d")]) == 3
    assert len(open_dataset(str(tmp_path / "d")).runs) == 2
    assert json.loads(open_store(memory_url).read("index.json"))["parts"]["unsplit"]["samples"] == 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--window", "3"], "--window: of tar shards only"),
        ([*TARS, "--mask", "none", "--tr", "2"], "mask, tr_s"),
        ([*TARS, "--via", "elsewhere"], "is a dataset already"),
        ([*TARS, "--normalize", "zscore"], "no such normalisation"),
        ([*TARS, "--grid", "6,6"], "expected three sizes"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(source, tmp_path, capsys, words, reason):
    main(["convert", str(source), str(tmp_path / "d"), *CHOICES])
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "d"), str(tmp_path / "out"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_that_holds_other_things_is_found_before_anything_is_converted(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("x")
    assert main(["convert", str(source), str(tmp_path / "out"), *CHOICES, *TARS]) == 2
    assert "letter.txt" in capsys.readouterr().err
    assert not (tmp_path / "out-dataset").exists()
