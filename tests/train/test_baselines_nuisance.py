"""What a scan tells without its brain: computed as published, aligned over subjects, never the target."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream import convert
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from fmristream.synth.cohort import parse_url
from train.baselines_nuisance import framewise_displacement_mm, nuisance_features, run_facts
from train.beyond.probes import column_question, place_columns

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory):
    """Six subjects with confounds, a site each, and an age that one of them lacks."""
    folder = tmp_path_factory.mktemp("derivatives")
    command = ["--derivatives", "--subjects", "6", "--shape", "10x10x10", "--frames", "20"]
    subprocess.run(
        [sys.executable, ROOT / "tools" / "synth.py", folder / "in", *command], check=True, capture_output=True
    )
    table = folder / "in" / "participants.tsv"
    head, *rows = table.read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    cells[2][head.split("\t").index("age")] = "n/a"
    sites = ("oslo", "lima", "oslo", "lima", "kyoto", "kyoto")
    lines = ["\t".join([*row, site]) for row, site in zip(cells, sites, strict=True)]
    table.write_text("\n".join([f"{head}\tsite", *lines]) + "\n")
    convert(str(folder / "in"), str(folder / "out"), options=ConvertOptions(split="none"))
    return fmristream.open(str(folder / "out"))


def test_facts_of_a_run_are_numpys(derivatives):
    run = derivatives.runs[0]
    values = derivatives.read(run, packed=True).astype(np.float64)
    facts = run_facts(derivatives, run)
    sd = values.std(axis=0)
    moving = sd > 0
    assert facts["tsnr"] == pytest.approx(np.median(values.mean(0)[moving] / sd[moving]), rel=1e-3)
    assert (facts["frames"], facts["tr_s"]) == (20, run.tr_s)
    motion = derivatives.confounds(run)
    fd = sum(np.abs(np.diff(motion[f"trans_{axis}"])) + 50 * np.abs(np.diff(motion[f"rot_{axis}"])) for axis in "xyz")
    np.testing.assert_allclose(framewise_displacement_mm(derivatives, run)[1:], fd, rtol=1e-3, atol=1e-4)
    assert facts["mean_fd_mm"] == pytest.approx(fd.mean(), rel=1e-3)
    assert facts["share_of_large_fd"] == pytest.approx(np.mean(fd > 0.5))


def test_words_become_a_feature_each_and_gaps_are_told(derivatives):
    found = nuisance_features(derivatives, derivatives.runs, target="sex")
    assert found.subject == tuple(sorted(run.subject for run in derivatives.runs))
    column = dict(zip(found.names, found.values.T, strict=True))
    assert column["site=oslo"].tolist() == [1, 0, 1, 0, 0, 0]
    assert column["site=kyoto"].tolist() == [0, 0, 0, 0, 1, 1]
    assert np.isnan(column["age"]).tolist() == [False, False, True, False, False, False]
    assert column["age is missing"].tolist() == [0, 0, 1, 0, 0, 0]
    assert not any("sex" in name for name in found.names)


@pytest.fixture(scope="module")
def numbered_sites(tmp_path_factory):
    """Six subjects of sites that are called by numbers, and ABCD's column of sites."""
    folder, cohort = tmp_path_factory.mktemp("sites"), parse_url("synth://?subjects=6&shape=8x8x8&frames=12")
    sites = zip((3, 1, 3, 1, 2, 2), ("site01", "site02") * 3, strict=True)
    pairs = zip(cohort.participants(), sites, strict=True)
    rows = [f"{row['subject']},{site},{abcd},{row['age']}" for row, (site, abcd) in pairs]
    (folder / "people.csv").write_text("\n".join(["participant_id,site,site_id_l,age", *rows]) + "\n")
    options = ConvertOptions(split="none", phenotypes=Phenotypes(url=str(folder / "people.csv")))
    convert(cohort.url(), str(folder / "out"), options=options)
    return fmristream.open(str(folder / "out"))


def test_the_number_of_a_site_is_a_name_and_abcds_column_is_known(numbered_sites):
    found = nuisance_features(numbered_sites, numbered_sites.runs, target="age")
    column = dict(zip(found.names, found.values.T, strict=True))
    assert [column[f"site={number}"].tolist() for number in (1, 2, 3)] == [
        [0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [1, 0, 1, 0, 0, 0],
    ]
    assert column["site_id_l=site02"].tolist() == [0, 1, 0, 1, 0, 1]
    assert "site" not in column


def test_probes_ask_which_site_not_how_much_of_one(numbered_sites):
    asked = column_question(numbered_sites, "site")
    assert (asked.kind, asked.classes) == ("classification", ("1", "2", "3"))
    assert [asked.truth[label] for label in sorted(asked.truth)] == [2, 0, 2, 0, 1, 1]
    assert column_question(numbered_sites, "age").kind == "regression"
    assert place_columns(numbered_sites) == ["site", "site_id_l"]


def test_the_target_is_never_a_feature(derivatives):
    assert "age" not in nuisance_features(derivatives, derivatives.runs, target="age").names
    assert "sex=F" in nuisance_features(derivatives, derivatives.runs, target="age").names
    with pytest.raises(UsageError, match="target itself"):
        nuisance_features(derivatives, derivatives.runs, target="age", columns=["age"])
    with pytest.raises(UsageError, match="no column 'height'"):
        nuisance_features(derivatives, derivatives.runs, target="age", columns=["height"])


def test_runs_without_confounds_have_no_motion(cohort):
    dataset = fmristream.open(cohort)
    facts = run_facts(dataset, dataset.runs[0])
    assert np.isnan([facts["mean_fd_mm"], facts["share_of_large_fd"]]).all()
    found = nuisance_features(dataset, dataset.runs, target="sex", columns=[])
    assert set(found.names) == {"frames", "tr_s", "tsnr"}
