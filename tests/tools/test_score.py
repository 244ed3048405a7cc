"""tools/score.py gives the run's report again from its table alone: on a machine with no torch, no data, no network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tables import cohort, table, target
from tools.score import main
from train.predictions import FILE, read_predictions, write_predictions
from train.report import report_text
from train.summary import report_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(tmp_path):
    rows = [(*row, 30.0 + int(row[1][1:]) ** 0.5, 35.0 + row[6]) for row in cohort(families=True)]
    found = table(rows, (target(), target("age", (), offset=33.3)))
    write_predictions(found, tmp_path / FILE)
    (tmp_path / "report.json").write_text(report_text(report_of(read_predictions(tmp_path / FILE))))
    return tmp_path


def test_the_report_is_the_same_to_the_last_byte(finished, capsys):
    again = finished / "again.json"
    assert main([str(finished), "--out", str(again)]) == 0
    assert again.read_bytes() == (finished / "report.json").read_bytes()
    assert main([str(finished / FILE)]) == 0
    assert "report.json: the same numbers" in " ".join(capsys.readouterr().out.split())


def test_it_needs_neither_torch_nor_what_reads_data(finished):
    probe = (
        "import runpy, sys; sys.argv = ['score.py', sys.argv[1]]\n"
        "try: runpy.run_path('tools/score.py', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "print(status, [name for name in ('torch', 'zarr', 'nibabel', 'fsspec', 'sklearn') if name in sys.modules])"
    )
    shutil.copy(finished / FILE, finished / "elsewhere.parquet")
    command = [sys.executable, "-c", probe, str(finished / "elsewhere.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_report_that_says_something_else_is_named(finished, capsys):
    report = json.loads((finished / "report.json").read_text())
    report["verdict"] = "what stands beside may stay"
    (finished / "report.json").write_text(json.dumps(report))
    assert main([str(finished)]) == 0
    report["targets"]["sex"]["test"]["metrics"]["auroc"] += 1e-15
    (finished / "report.json").write_text(json.dumps(report))
    assert main([str(finished)]) == 1
    assert "something else of targets" in " ".join(capsys.readouterr().out.split())


def test_damage_and_absence_are_told_apart(finished, capsys):
    assert main([str(finished / "nothing")]) == 2
    (finished / FILE).write_bytes(b"PAR1")
    assert main([str(finished)]) == 1
    assert "is not a table that fmristream wrote" in capsys.readouterr().err


def test_numbers_of_a_split_that_the_table_lost_are_not_called_the_same(finished, capsys):
    found = table(cohort(families=True), (target(),))
    write_predictions(found, finished / FILE)
    (finished / "report.json").write_text(report_text(report_of(read_predictions(finished / FILE))))
    assert main([str(finished)]) == 0
    capsys.readouterr()
    write_predictions(found.at(found.words["split"] == "val"), finished / FILE)
    assert main([str(finished)]) == 1
    write_predictions(found.at(found.words["split"] == "nobody"), finished / FILE)
    assert main([str(finished)]) == 1
    assert "the same numbers" not in " ".join(capsys.readouterr().out.split())


def test_a_damaged_report_and_a_place_that_cannot_be_written_are_told_in_a_sentence(finished, capsys):
    (finished / "report.json").write_text("{")
    assert main([str(finished)]) == 1
    assert "report.json: is not the JSON that was written" in capsys.readouterr().err
    assert main([str(finished), "--out", str(finished / FILE / "report.json")]) == 2
    assert "give another --out" in capsys.readouterr().err
