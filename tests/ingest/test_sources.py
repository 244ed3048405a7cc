"""Listing what is to be converted: plain folders, globs, single files, synthetic cohorts."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.ingest.run_stream import open_run, quick_fingerprint
from fmristream.ingest.sources import find_runs
from fmristream.ingest.sources.find import glob_matches
from fmristream.ingest.sources.listing import imaging_suffix, parse_bids_name, without_suffix
from fmristream.ingest.sources.participants import parse_participants
from fmristream.synth import Cohort
from tests.ingest.cohorts import bold, write_runs
from tests.ingest.source_trees import RAW, RUN, by_key, make, reasons

# --- plain folders, globs, files


def test_every_imaging_file_of_a_folder_is_a_run(tmp_path: Path) -> None:
    files = [
        "a.nii",
        "a.nii.gz",
        "b.hdr",
        "b.img",
        "deep/er/c.mgz",
        "deep/d.MGH",
        "deep/E.NII.GZ",
        "f.img",
        "notes.txt",
    ]
    hidden = [".hidden.nii", "._a.nii", ".cache/x.nii"]
    listing = find_runs(make(tmp_path, dict.fromkeys([*files, *hidden], "")))
    runs = by_key(listing)
    assert listing.kind == "folder"
    assert {key: run.name for key, run in runs.items()} == {
        "a.nii": "a.nii",
        "a.nii.gz": "a.nii.gz",
        "b.hdr": "b",
        "deep/E.NII.GZ": "deep/E",
        "deep/d.MGH": "deep/d",
        "deep/er/c.mgz": "deep/er/c",
    }
    assert reasons(listing) == {"f.img": "an .img file without its .hdr"}
    assert {run.space for run in runs.values()} == {""}


def test_the_subject_is_the_bids_label_else_the_first_folder_else_the_stem(tmp_path: Path) -> None:
    expected = {
        "sub-07/x/rest.nii": "07",
        "wave1/sub-08_task-rest_bold.nii": "08",
        "old_sub-09_rest.nii": "09",
        "anna/run1/rest.nii": "anna",
        "boris.nii.gz": "boris",
    }
    runs = by_key(find_runs(make(tmp_path, dict.fromkeys(expected, ""))))
    assert {key: run.subject for key, run in runs.items()} == expected
    assert runs["wave1/sub-08_task-rest_bold.nii"].task == "rest"


def test_a_pattern_finds_the_subject_and_what_it_does_not_match_is_skipped(tmp_path: Path) -> None:
    root = make(tmp_path, dict.fromkeys(["w1/S003_rest.nii", "w1/sub-S004_rest.nii", "w1/phantom.nii"], ""))
    for pattern in (r"(S\d+)", r"(w\d)/(?P<subject>(sub-)?S\d+)"):
        listing = find_runs(root, subject_pattern=pattern)
        assert [run.subject for run in listing.runs] == ["S003", "S004"]
        assert reasons(listing) == {"w1/phantom.nii": "the subject pattern does not match"}
    for pattern, expected in {r"(X\d)": "matches no path", "S": "no group", "(": "no regular expression"}.items():
        with pytest.raises(UsageError, match=expected):
            find_runs(root, subject_pattern=pattern)


def test_a_pattern_is_refused_where_the_source_says_its_subjects(tmp_path: Path) -> None:
    bids = make(tmp_path, RAW | {"sub-01/func/sub-01_task-rest_bold.nii": ""})
    for source in (bids, "synth://?subjects=1"):
        with pytest.raises(UsageError, match="leave it out"):
            find_runs(source, subject_pattern="(.)")


def test_a_declared_space_and_participants_hold_for_folders_too(tmp_path: Path) -> None:
    root = make(
        tmp_path, {"a/x.nii": "", "a/sub-1_space-T1w_bold.nii": "", "participants.tsv": "participant_id\nsub-a\n"}
    )
    listing = find_runs(root)
    assert {run.key: run.space for run in listing.runs} == {"a/x.nii": "", "a/sub-1_space-T1w_bold.nii": "T1w"}
    assert listing.participants == ({"subject": "a"},)
    assert {run.space for run in find_runs(root, space="MNI").runs} == {"MNI"}


def test_one_file_or_a_glob_is_a_source(tmp_path: Path) -> None:
    root = make(tmp_path, dict.fromkeys(["s1/a.nii", "s1/b.nii", "s2/a.nii", "s2/deep/a.nii", "s[3]/a.nii"], ""))

    def keys(source: str) -> list[str]:
        return [run.key for run in find_runs(f"{root}/{source}").runs]

    assert keys("s1/a.nii") == ["a.nii"]
    assert find_runs(f"{root}/s1/a.nii").runs[0].subject == "a"
    assert keys("s?/a.nii") == ["s1/a.nii", "s2/a.nii"]
    assert keys("s1/*") == ["a.nii", "b.nii"]
    assert keys("**/a.nii") == ["s1/a.nii", "s2/a.nii", "s2/deep/a.nii", "s[3]/a.nii"]
    assert keys("s[12]") == ["s1/a.nii", "s1/b.nii", "s2/a.nii", "s2/deep/a.nii"]
    assert keys("s[!1]/a.nii") == ["s2/a.nii"]
    assert keys("s[3]") == ["a.nii"]  # a folder of that name goes first


def test_an_empty_source_is_a_usage_error_that_says_where_and_what(tmp_path: Path) -> None:
    make(tmp_path, {"notes.txt": "nothing here"})
    cases = {
        str(tmp_path): "no imaging file among 1 files; expected names that end in .nii.gz",
        str(tmp_path / "absent"): "there is no such file or folder",
        str(tmp_path / "*.nii"): "no file in .* matches",
        str(tmp_path / "absent/*.nii"): "there is no folder",
        str(tmp_path / "notes.txt"): "no imaging file",
    }
    for source, expected in cases.items():
        with pytest.raises(UsageError, match=expected):
            find_runs(source)


def test_a_relative_path_gives_urls_that_hold_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"data/a.nii": ""})
    monkeypatch.chdir(tmp_path)
    listing = find_runs("data")
    assert listing.root == str(tmp_path / "data")
    assert listing.runs[0].url == str(tmp_path / "data/a.nii")
    assert find_runs(f"file://{tmp_path}/data") == listing


def test_a_name_that_is_not_utf_8_is_skipped(tmp_path: Path) -> None:
    make(tmp_path, {"a.nii": ""})
    (tmp_path / os.fsdecode(b"caf\xe9.nii")).write_bytes(RUN)
    listing = find_runs(str(tmp_path))
    assert [run.key for run in listing.runs] == ["a.nii"]
    assert reasons(listing) == {"caf\\udce9.nii": "its name is not UTF-8 text"}


def test_any_store_can_be_listed() -> None:
    memory = fsspec.filesystem("memory")
    files = RAW | {
        "sub-01/func/sub-01_task-rest_bold.nii": RUN,
        "task-rest_bold.json": json.dumps({"RepetitionTime": 1.5}),
        "participants.tsv": "participant_id\tage\nsub-01\t30\n",
    }
    for key, content in files.items():
        memory.pipe_file(f"/sources-test/{key}", content if isinstance(content, bytes) else content.encode())
    listing = find_runs("memory://sources-test")
    assert listing.kind == "bids"
    assert [(run.url, run.tr_s) for run in listing.runs] == [
        ("memory://sources-test/sub-01/func/sub-01_task-rest_bold.nii", 1.5)
    ]
    assert listing.participants == ({"subject": "01", "age": 30.0},)
    with open_run(listing.runs[0]) as stream:
        assert sum(1 for _ in stream.frames()) == 5
    assert [run.key for run in find_runs("memory://sources-test/sub-*/**/*.nii").runs] == [
        "sub-01/func/sub-01_task-rest_bold.nii"
    ]
    memory.rm("/sources-test", recursive=True)


# --- synthetic cohorts


def test_a_synthetic_cohort_lists_its_runs_and_streams_them() -> None:
    url = "synth://?subjects=3&runs=2&shape=10x12x8&frames=4&seed=5&tr_s=0.8"
    cohort = Cohort(subjects=3, runs=2, shape=(10, 12, 8), frames=4, seed=5, tr_s=0.8, voxel_size_mm=16.0)
    listing = find_runs(url)
    assert listing.kind == "synth"
    assert list(by_key(listing))[:3] == ["sub-0001_run-1", "sub-0001_run-2", "sub-0002_run-1"]
    assert [row["subject"] for row in listing.participants] == ["0001", "0002", "0003"]
    run = listing.runs[3]
    assert (run.subject, run.run, run.space, run.tr_s) == ("0002", "2", "synthetic", 0.8)
    with open_run(run) as stream:
        header = stream.header
        frames = [frame.copy() for frame in stream.frames()]
        assert stream.fingerprint() == quick_fingerprint(run)
    assert (header.shape, header.frames, header.dtype, header.slope) == ((10, 12, 8), 4, np.dtype("<i2"), 1.0)
    assert np.array_equal(np.array(header.affine), cohort.affine())
    assert all(np.array_equal(*pair) for pair in zip(frames, cohort.run_frames(1, 1), strict=True))


def test_a_synthetic_run_is_known_again_in_a_larger_cohort_and_not_after_a_change() -> None:
    def crc(url: str) -> str:
        return quick_fingerprint(find_runs(url).runs[0]).crc

    assert crc("synth://?subjects=3") == crc("synth://?subjects=5&runs=2")
    assert crc("synth://?seed=1") != crc("synth://?seed=2")
    assert crc("synth://").startswith("synth:")


# --- pure parts


def test_a_bids_name_comes_apart() -> None:
    name = parse_bids_name("a/b/sub-01_ses-x_task-rest_odd_space-MNI152NLin6Asym_bold.nii.gz")
    assert name.entities == {"sub": "01", "ses": "x", "task": "rest", "space": "MNI152NLin6Asym"}
    assert (name.suffix, name.extension) == ("bold", ".nii.gz")


@given(st.text(alphabet="ab./_-", max_size=12))
def test_a_path_is_its_stem_and_its_imaging_suffix(path: str) -> None:
    for suffix in ("", ".nii", ".NII.gz", ".hdr"):
        whole = path + suffix
        assert without_suffix(whole) + whole[len(without_suffix(whole)) :] == whole
        assert imaging_suffix(whole) == whole[len(without_suffix(whole)) :].lower()


@settings(deadline=None)
@given(st.text(alphabet="ab*?[]!/-^&~|\\", min_size=1, max_size=10), st.text(alphabet="ab/", max_size=8))
@example("[^[", "[^[")
@example("[b-a]", "b")
def test_any_glob_can_be_matched_and_a_star_never_crosses_folders(pattern: str, path: str) -> None:
    assert isinstance(glob_matches(pattern, path), bool)
    assert glob_matches("*b", path) == path.partition("/")[0].endswith("b")
    assert glob_matches("**", path)
    assert glob_matches("**/*b", path) == any(name.endswith("b") for name in path.split("/"))


def test_participants_with_odd_cells_keep_what_they_say() -> None:
    lines = [
        "participant_id\tid\tq\tr",
        "sub-1\t1_0\t1e999\tnan",
        "sub-2\t2\t3\t-1.5e2",
        "",
        "sub-1\t9\t9\t9",
        "n/a\t1\t1\t1",
    ]
    text = "\ufeff" + "\r\n".join(lines)
    rows, notes = parse_participants(text)
    assert rows == (
        {"subject": "1", "id": "1_0", "q": "1e999", "r": None},
        {"subject": "2", "id": "2", "q": "3", "r": -150.0},
    )
    assert notes == ("participants.tsv repeats 1; the first row of each is used",)
    assert parse_participants("") == ((), ("participants.tsv is empty",))
    assert "no column participant_id" in parse_participants("id\n1\n")[1][0]
    rows, notes = parse_participants("participant_id\ta\tb\nsub-1\tx\nsub-2\ty\tz\textra\n")
    assert rows == ({"subject": "1", "a": "x", "b": None}, {"subject": "2", "a": "y", "b": "z"})
    assert "too few or too many" in notes[0]


def test_a_folder_of_this_and_that_is_not_taken_for_the_collection_that_one_part_looks_like(tmp_path):
    names = ["study/sub-1/func/sub-1_task-rest_bold", "pilot/a", "other/b", "old/c"]
    write_runs(tmp_path, {name: bold(seed=seed, shape=(2, 3, 2, 2)) for seed, name in enumerate(names)})
    listing = find_runs(str(tmp_path))
    assert listing.kind == "folder"
    assert {run.key for run in listing.runs} == {f"{name}.nii.gz" for name in names}
