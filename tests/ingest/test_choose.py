"""Choosing runs by labels, tables of runs, and what is known of subjects."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmristream.errors import UsageError
from fmristream.ingest.sources import EntityFilter, Phenotypes, find_runs
from tests.ingest.source_trees import DERIVATIVE, MASK, RAW, make, reasons
from tests.storage.web_server import web_server

MNI = "space-MNI152NLin2009cAsym"


def fmriprep(tmp_path: Path) -> str:
    files: dict[str, str | bytes] = {}
    for subject in ("01", "02"):
        for task, run in (("rest", "01"), ("rest", "02"), ("nback", "1")):
            for space in (f"{MNI}_res-1", f"{MNI}_res-2", "space-T1w"):
                stem = f"sub-{subject}/func/sub-{subject}_task-{task}_run-{run}_{space}"
                files[f"{stem}_desc-preproc_bold.nii.gz"] = ""
                files[f"{stem}_desc-brain_mask.nii.gz"] = MASK
    files["sub-01/func/sub-01_task-rest_run-01_space-T1w_desc-smooth_bold.nii.gz"] = ""
    return make(tmp_path, DERIVATIVE | files)


# --- labels


def test_runs_are_chosen_by_every_label_and_the_others_are_left_out_by_choice(tmp_path: Path) -> None:
    root = fmriprep(tmp_path)
    wanted = EntityFilter(task=("rest",), res=("2",), run=("1",))
    listing = find_runs(root, space="MNI152NLin2009cAsym", entities=wanted)
    assert [(run.subject, run.task, run.run, run.res) for run in listing.runs] == [
        ("01", "rest", "01", "2"),
        ("02", "rest", "01", "2"),
    ]
    assert all(file.by_choice for file in listing.skipped)
    assert len(listing.runs) + len(listing.skipped) == 19
    assert {"task nback, not chosen", "res 1, not chosen", "run 02, not chosen"} <= set(reasons(listing).values())


def test_several_labels_of_one_kind_are_all_taken(tmp_path: Path) -> None:
    root = fmriprep(tmp_path)
    spaces = EntityFilter(
        space=("T1w", "MNI152NLin2009cAsym"), res=("2", "none"), subject=("sub-02",), task=("task-nback",)
    )
    assert {(run.subject, run.space, run.res) for run in find_runs(root, entities=spaces).runs} == {
        ("02", "T1w", ""),
        ("02", "MNI152NLin2009cAsym", "2"),
    }


def test_another_description_is_taken_when_it_is_asked_for(tmp_path: Path) -> None:
    listing = find_runs(fmriprep(tmp_path), entities=EntityFilter(desc=("smooth",)))
    assert [run.desc for run in listing.runs] == ["smooth"]


def test_runs_in_two_resolutions_are_warned_of_until_one_is_chosen(tmp_path: Path) -> None:
    root = fmriprep(tmp_path)
    assert any("6 runs are there in several forms" in note and "--res 1|2" in note for note in find_runs(root).notes)
    assert not any("several forms" in note for note in find_runs(root, entities=EntityFilter(res=("2",))).notes)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"task": ("rset",)}, r"--task rset: no run has that; there are nback \(6\), rest \(12\)"),
        ({"session": ("1",)}, r"--session 1: no run has that; there are none \(18\)"),
        ({"subject": ("1",)}, r"--subject 1: no run has that; there are 01 \(9\), 02 \(9\)"),
        ({"task": ("nback",), "run": ("2",)}, "none of 18 runs has all of --task nback --run 2"),
    ],
)
def test_a_label_that_no_run_has_is_refused_with_those_that_there_are(tmp_path: Path, wanted, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_runs(fmriprep(tmp_path), entities=EntityFilter(**wanted))
    with pytest.raises(UsageError, match="an empty label"):
        EntityFilter(task=("",))


def test_labels_choose_on_plain_folders_and_synthetic_cohorts_too(tmp_path: Path) -> None:
    root = make(tmp_path, {"a/sub-1_task-rest_bold.nii": "", "a/sub-1_task-nback_bold.nii": "", "b/x.nii": ""})
    assert [run.key for run in find_runs(root, entities=EntityFilter(task=("rest",))).runs] == [
        "a/sub-1_task-rest_bold.nii"
    ]
    assert len(find_runs("synth://?subjects=3&runs=2", entities=EntityFilter(run=("2",))).runs) == 3


# --- hidden folders


def test_hidden_folders_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path, RAW | {"sub-01/func/sub-01_task-rest_bold.nii": "", ".git/annex/objects/a/b.nii": ""})
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(str(path)) or scandir(path))
    listing = find_runs(root)
    assert [run.key for run in listing.runs] == ["sub-01/func/sub-01_task-rest_bold.nii"]
    assert f"{root}/sub-01/func" in walked
    assert not any(".git" in path for path in walked)


# --- tables


def write_table(folder: Path, name: str, columns: dict[str, list]) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table(columns), path)
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("\n".join(mark.join("" if cell is None else str(cell) for cell in row) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["runs.tsv", "runs.csv", "runs.parquet"])
def test_a_table_of_runs_is_a_source(tmp_path: Path, name: str) -> None:
    make(tmp_path, {"a/one.nii": "", "a/two.nii": "", "b/sub-007_task-rest_bold.nii.gz": "", "m.nii": MASK})
    columns = {
        "path": ["a/one.nii", str(tmp_path / "a/two.nii"), "b/sub-007_task-rest_bold.nii.gz"],
        "subject": ["sub-001", "001", "007"],
        "session": ["ses-1", "2", None],
        "task": ["rest", "task-rest", "rest"],
        "tr_s": ["0.8", None, "2"],
        "mask": ["m.nii", None, None],
        "space": ["MNI305", "MNI305", None],
        "family": ["F1", "F1", "F2"],
        "age": [31.5, 31.5, None],
    }
    listing = find_runs(write_table(tmp_path, name, columns))
    assert listing.kind == "table"
    assert [(run.name, run.subject, run.session, run.tr_s, run.space) for run in listing.runs] == [
        ("sub-001_ses-1_task-rest_space-MNI305", "001", "1", 0.8, "MNI305"),
        ("sub-001_ses-2_task-rest_space-MNI305", "001", "2", None, "MNI305"),
        ("sub-007_task-rest_bold", "007", "", 2.0, ""),
    ]
    assert [run.url for run in listing.runs] == [
        str(tmp_path / key) for key in ("a/one.nii", "a/two.nii", "b/sub-007_task-rest_bold.nii.gz")
    ]
    assert listing.runs[0].mask_url == str(tmp_path / "m.nii")
    assert listing.participants == (
        {"subject": "001", "family": "F1", "age": 31.5},
        {"subject": "007", "family": "F2", "age": None},
    )
    # Names and keys are stored and shown: where the files lie is nobody's business.
    assert not any(str(tmp_path) in text for run in listing.runs for text in (run.name, run.key))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"file": ["a.nii"], "subject": ["1"]},
            r"columns file, subject; a table of runs has path \(or url\) and subject",
        ),
        ({"path": ["a.nii", "a.nii"], "subject": ["1", "2"]}, "rows 1 and 2 name the same file"),
        ({"path": ["a.nii", ""], "subject": ["1", "2"]}, "row 2 has no path"),
        ({"path": ["a.nii"], "subject": ["n/a"]}, "row 1 has no subject"),
        ({"path": ["a.nii", "b.nii"], "subject": ["1", "1"], "sex": ["F", "M"]}, "subject 1 differ in column sex"),
        ({"path": ["a.nii", "b.nii"], "subject": ["1", "1"], "group": ["x", "y"]}, "subject 1 differ in column group"),
        (
            {"path": ["a.nii", "b.nii"], "subject": ["1", "1"], "split": ["train", "val"]},
            "subject 1 differ in column split",
        ),
        ({"path": ["a.nii"], "subject": ["1"], "split": ["holdout"]}, "split holdout"),
        ({"path": ["a.nii"], "subject": ["1"], "tr_s": ["fast"]}, "tr_s fast"),
        ({"path": ["a.nii"], "subject": ["1"], "tr_s": ["-1"]}, "tr_s -1"),
        ({"path": ["ssh://host/a.nii"], "subject": ["1"]}, "scheme 'ssh'"),
        ({"path": [], "subject": []}, "has no rows"),
    ],
)
def test_a_table_that_says_too_little_or_contradicts_itself_is_refused(tmp_path: Path, columns, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find_runs(write_table(tmp_path, "runs.csv", columns))
    assert "differ in column sex" not in str(caught.value) or not {"F", "M"} & set(str(caught.value).split())


def test_a_table_that_gives_subjects_other_labels_keeps_the_old_ones_out_of_every_name(tmp_path: Path) -> None:
    columns = {
        "path": [
            "sub-anna/sub-anna_task-rest_bold.nii.gz",
            "sub-anna/sub-anna_task-nback_bold.nii.gz",
            "sub-eve_bold.nii",
        ],
        "subject": ["P1", "P1", "P2"],
    }
    runs = find_runs(write_table(tmp_path, "runs.csv", columns)).runs
    assert len({run.name for run in runs}) == len({run.key for run in runs}) == 3
    assert [run.name.partition("_")[0] for run in runs] == ["sub-P1", "sub-P1", "sub-P2"]
    assert not any(old in text for run in runs for text in (run.name, run.key) for old in ("anna", "eve"))
    again = find_runs(write_table(tmp_path, "more.csv", {name: cells[::-1] for name, cells in columns.items()})).runs
    assert again == runs


def test_a_table_from_elsewhere_cannot_name_files_of_this_machine(tmp_path: Path) -> None:
    with web_server() as web:
        web.files["/data/sub/a.nii"] = b"x"
        for path, said in {
            "/etc/passwd": "local file",
            "file:///etc/passwd": "local file",
            "~/x.nii": "local file",
            "../../x.nii": "leads out",
        }.items():
            web.files["/data/runs.csv?sig=1"] = f"path,subject\n{path},1\n".encode()
            with pytest.raises(UsageError, match=said):
                find_runs(f"{web.url}/data/runs.csv?sig=1")
        web.files["/data/runs.csv?sig=1"] = b"url,subject\nsub/a.nii?sig=2,1\nhttps://elsewhere/b.nii.gz?sig=3,2\n"
        listing = find_runs(f"{web.url}/data/runs.csv?sig=1")
    assert [run.url for run in listing.runs] == [f"{web.url}/data/sub/a.nii?sig=2", "https://elsewhere/b.nii.gz?sig=3"]
    assert not any("sig" in text for run in listing.runs for text in (run.key, run.name))


def test_rows_of_unequal_length_and_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    for text, said in {
        "path,subject\na.nii,1,2\n": "row 1 has 3 cells",
        "path,subject,path\na,1,b\n": "two columns path",
        "path,subject,\na,1,\n": "column without a name",
        "": "column without a name",
    }.items():
        (tmp_path / "runs.csv").write_text(text)
        with pytest.raises(UsageError, match=said):
            find_runs(str(tmp_path / "runs.csv"))
    (tmp_path / "runs.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UsageError, match="not a Parquet table"):
        find_runs(str(tmp_path / "runs.parquet"))
    pq.write_table(pa.table({"path": [["a"]], "subject": ["1"]}), tmp_path / "nested.parquet")
    with pytest.raises(UsageError, match="lists or structures"):
        find_runs(str(tmp_path / "nested.parquet"))


def test_an_index_made_by_bids2table_stands_for_the_listing(tmp_path: Path) -> None:
    root = fmriprep(tmp_path / "ds")
    (tmp_path / "ds/participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    paths = sorted(str(path.relative_to(root)) for path in Path(root).rglob("sub-*_*.nii.gz"))
    columns = {
        "dataset": ["ds"] * len(paths),
        "sub": [path[4:6] for path in paths],
        "run": [1] * len(paths),
        "suffix": ["bold"] * len(paths),
        "ext": [".nii.gz"] * len(paths),
        "extra_entities": [[("a", "b")]] * len(paths),
        "root": [root] * len(paths),
        "path": paths,
    }
    types = {"extra_entities": pa.map_(pa.string(), pa.string())}
    table = pa.table({name: pa.array(cells, types.get(name)) for name, cells in columns.items()})
    pq.write_table(table, tmp_path / "index.parquet")
    indexed, listed = find_runs(str(tmp_path / "index.parquet")), find_runs(root)
    assert (indexed.kind, indexed.runs, indexed.participants) == (listed.kind, listed.runs, listed.participants)
    assert {run.run for run in indexed.runs} == {"01", "02", "1"}
    pq.write_table(table.set_column(7, "path", pa.array(["../x.nii.gz"] * len(paths))), tmp_path / "index.parquet")
    with pytest.raises(UsageError, match="lead out"):
        find_runs(str(tmp_path / "index.parquet"))


# --- what is known of subjects


def three(tmp_path: Path) -> str:
    files = {f"sub-{n}/func/sub-{n}_task-rest_bold.nii": "" for n in ("01", "02", "03")}
    return make(tmp_path / "bids", RAW | files | {"participants.tsv": "participant_id\tage\nsub-01\t1\n"})


@pytest.mark.parametrize("name", ["about.csv", "about.tsv", "about.parquet"])
def test_a_given_table_takes_the_place_of_participants_tsv(tmp_path: Path, name: str) -> None:
    table = write_table(
        tmp_path, name, {"participant_id": ["sub-01", "02", "04"], "age": [40.5, 41, 42], "code": ["007", "010", "1"]}
    )
    listing = find_runs(three(tmp_path), phenotypes=Phenotypes(url=table))
    assert listing.participants == (
        {"subject": "01", "age": 40.5, "code": "007"},
        {"subject": "02", "age": 41.0, "code": "010"},
    )
    assert f"{name}: 1 of its 3 subjects have no run" in listing.notes
    assert f"{name}: 1 of 3 subjects with runs are not in it" in listing.notes


def test_labels_are_text_and_the_column_may_be_named(tmp_path: Path) -> None:
    table = write_table(tmp_path, "about.csv", {"subject": ["1", "2", "3"], "id": ["01", "02", "03"], "age": [1, 2, 3]})
    listing = find_runs(three(tmp_path), phenotypes=Phenotypes(url=table, subject_column="id"))
    assert [row["age"] for row in listing.participants] == [1.0, 2.0, 3.0]
    with pytest.raises(UsageError, match=r"none of its 3 subjects has a run; .* like 9, the runs' are like 99"):
        find_runs(three(tmp_path), phenotypes=Phenotypes(url=table))
    with pytest.raises(UsageError, match="no column nr"):
        find_runs(three(tmp_path), phenotypes=Phenotypes(url=table, subject_column="nr"))
    with pytest.raises(UsageError, match="give that, too"):
        find_runs(three(tmp_path), phenotypes=Phenotypes(subject_column="nr"))
    odd = write_table(tmp_path, "odd.csv", {"who": ["01"], "age": [1]})
    with pytest.raises(UsageError, match="--subject-column"):
        find_runs(three(tmp_path), phenotypes=Phenotypes(url=odd))


def test_two_rows_of_a_subject_may_add_to_each_other_and_not_contradict(tmp_path: Path) -> None:
    columns = {"subject": ["01", "01"], "age": [30, None], "sex": [None, "F"]}
    table = write_table(tmp_path, "about.csv", columns)
    assert find_runs(three(tmp_path), phenotypes=Phenotypes(url=table)).participants == (
        {"subject": "01", "age": 30.0, "sex": "F"},
    )
    table = write_table(tmp_path, "about.csv", {"subject": ["01", "01"], "age": [30, 31]})
    with pytest.raises(UsageError, match="subject 01 differ in column age") as caught:
        find_runs(three(tmp_path), phenotypes=Phenotypes(url=table))
    assert "30" not in str(caught.value)


def test_a_collections_own_column_of_subjects_goes_first(tmp_path: Path) -> None:
    root = make(tmp_path / "abide", {"Outputs/cpac/filt_global/func_preproc/Pitt_0050003_func_preproc.nii.gz": ""})
    table = write_table(
        tmp_path,
        "p.csv",
        {"subject": [1, 2], "SUB_ID": [50002, 50003], "SITE_ID": ["PITT", "PITT"], "DX_GROUP": [1, 2]},
    )
    listing = find_runs(root, phenotypes=Phenotypes(url=table))
    assert listing.participants == ({"subject": "50003", "SITE_ID": "PITT", "DX_GROUP": 2.0, "site": "Pitt"},)
    grouped = find_runs(root, phenotypes=Phenotypes(url=table, group_by="site"))
    assert [run.group for run in grouped.runs] == ["Pitt"]


def test_groups_come_from_a_column_and_who_has_none_is_alone(tmp_path: Path) -> None:
    table = write_table(tmp_path, "about.csv", {"subject": ["01", "02", "03"], "family": [7, 7, None]})
    listing = find_runs(three(tmp_path), phenotypes=Phenotypes(url=table, group_by="family"))
    assert [run.group for run in listing.runs] == ["7", "7", ""]
    assert "1 subjects have no family: each is a group of its own" in listing.notes
    with pytest.raises(UsageError, match="--group-by site: no such column of participants; there are family"):
        find_runs(three(tmp_path), phenotypes=Phenotypes(url=table, group_by="site"))
