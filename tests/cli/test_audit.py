"""`fmristream audit` and `info --where` on the command line."""

import json

import fmristream
from fmristream.cli.main import main
from fmristream.ingest.options import ConvertOptions

COHORT = "synth://?subjects=6&runs=2&shape=8x8x8&frames=30&seed=3"


def converted(tmp_path, **options) -> str:
    url = str(tmp_path / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(mask="none", **options))
    return url


def test_a_split_by_subject_is_found_clean_and_one_by_run_is_not(tmp_path, capsys):
    url = converted(tmp_path, split="exact")
    assert main(["audit", url]) == 0
    assert "no leak" in capsys.readouterr().out
    assert main(["audit", url, "--train", "run == '1'", "--no-fingerprints", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {leak["kind"] for leak in found["leaks"]} == {"same subject"}
    assert (found["train_runs"], found["test_runs"], len(found["leaks"])) == (6, 6, 6)


def test_two_urls_are_compared_whole(tmp_path, capsys):
    url = converted(tmp_path, split="none")
    assert main(["audit", url, url, "--no-fingerprints"]) == 1
    assert "18 leaks" in capsys.readouterr().out


def test_runs_are_listed_by_a_condition(tmp_path, capsys):
    url = converted(tmp_path, split="none")
    expected = fmristream.open(url).where("run == '2' and sex == 'F'").runs.column("name")
    assert main(["info", url, "--where", "run == '2' and sex == 'F'", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["run_table"]] == expected
    assert main(["info", url, "--where", "sex == 'F' and runn == '2'"]) == 2
    assert "did you mean 'run'" in capsys.readouterr().err
