"""Listing BIDS datasets, raw and derivative."""

import os
from pathlib import Path

import pytest

from fmristream.errors import SourceError, UsageError
from fmristream.ingest.run_stream import open_run, quick_fingerprint
from fmristream.ingest.sources import EntityFilter, SourceRun, find_runs
from fmristream.ingest.sources.listing import SideFile
from tests.ingest.source_trees import DERIVATIVE, MASK, RAW, by_key, make, reasons

# --- BIDS, raw


def test_a_raw_dataset_gives_its_func_runs_with_their_labels(tmp_path: Path) -> None:
    root = make(
        tmp_path,
        RAW
        | {
            "sub-01/func/sub-01_task-rest_bold.nii.gz": "",
            "sub-02/ses-b/func/sub-02_ses-b_task-nback_acq-mb_run-02_echo-1_bold.nii": "",
            "sub-01/func/sub-01_task-rest_sbref.nii.gz": "",
            "sub-01/func/sub-01_task-rest_events.tsv": "onset\n",
            "sub-01/anat/sub-01_T1w.nii.gz": "",
        },
    )
    listing = find_runs(root)
    runs = by_key(listing)
    assert listing.kind == "bids"
    assert listing.skipped == ()
    first = runs["sub-01/func/sub-01_task-rest_bold.nii.gz"]
    assert first == SourceRun(
        key="sub-01/func/sub-01_task-rest_bold.nii.gz",
        name="sub-01_task-rest_bold",
        url=f"{root}/sub-01/func/sub-01_task-rest_bold.nii.gz",
        subject="01",
        task="rest",
        space="native",
        side=(SideFile(name="events", url=f"{root}/sub-01/func/sub-01_task-rest_events.tsv"),),
    )
    second = runs["sub-02/ses-b/func/sub-02_ses-b_task-nback_acq-mb_run-02_echo-1_bold.nii"]
    labels = (second.subject, second.session, second.task, second.acq, second.run, second.echo)
    assert labels == ("02", "b", "nback", "mb", "02", "1")
    with open_run(second) as stream:
        assert sum(1 for _ in stream.frames()) == 5


def test_a_dataset_without_a_description_is_known_by_its_folders(tmp_path: Path) -> None:
    listing = find_runs(make(tmp_path, {"sub-01/func/sub-01_task-rest_bold.nii.gz": ""}))
    assert listing.kind == "bids"
    assert listing.notes == ("there is no dataset_description.json",)


def test_derivatives_sourcedata_code_and_dot_folders_are_not_entered(tmp_path: Path) -> None:
    run = "sub-01/func/sub-01_task-rest_bold.nii.gz"
    elsewhere = ("derivatives/fmriprep/", "sourcedata/", "code/", ".git/annex/", "sub-01/derivatives/")
    listing = find_runs(make(tmp_path, RAW | {run: ""} | {folder + run: "" for folder in elsewhere}))
    assert list(by_key(listing)) == [run]
    assert listing.skipped == ()


def test_what_looks_like_a_run_and_is_none_is_skipped_with_a_reason(tmp_path: Path) -> None:
    odd = {
        "sub-01/func/sub-01_task-rest_bold.dtseries.nii": "CIFTI",
        "sub-01/sub-01_task-rest_bold.nii.gz": "where BIDS has its runs",
        "sub-01/func/sub-02_task-rest_bold.nii.gz": "its name says subject 02, its folder 01",
        "sub-01/func/sub-01_task-rest_part-phase_bold.nii.gz": "not its magnitude",
        "sub-01/func/sub-01_task-rest_bold.nii.gz": "the same BIDS name as sub-01/func/sub-01_task-rest_bold.nii",
    }
    listing = find_runs(make(tmp_path, RAW | {"sub-01/func/sub-01_task-rest_bold.nii": ""} | dict.fromkeys(odd, "")))
    assert list(by_key(listing)) == ["sub-01/func/sub-01_task-rest_bold.nii"]
    found = reasons(listing)
    assert list(found) == sorted(odd)
    assert all(expected in found[key] for key, expected in odd.items())


def test_the_nearest_sidecar_that_applies_gives_the_repetition_time(tmp_path: Path) -> None:
    sidecars: dict[str, str | bytes] = {
        "bold.json": '{"RepetitionTime": 1.0}',
        "task-rest_bold.json": '{"RepetitionTime": 2.0}',
        "task-rest_acq-fast_bold.json": '{"RepetitionTime": 0.5}',
        "sub-02/sub-02_task-rest_bold.json": '{"RepetitionTime": 2.5}',
        "sub-02/ses-1/func/sub-02_ses-1_task-rest_run-2_bold.json": '{"RepetitionTime": 3.0}',
        "sub-02/ses-1/func/sub-02_ses-1_task-rest_run-3_bold.json": '{"EchoTime": 0.03}',
        "task-rest_sbref.json": '{"RepetitionTime": 9.0}',
    }
    expected = {
        "sub-01/func/sub-01_task-nback_bold.nii": 1.0,
        "sub-01/func/sub-01_task-rest_bold.nii": 2.0,
        "sub-01/func/sub-01_task-rest_acq-fast_bold.nii": 0.5,
        "sub-02/ses-1/func/sub-02_ses-1_task-rest_run-1_bold.nii": 2.5,
        "sub-02/ses-1/func/sub-02_ses-1_task-rest_run-2_bold.nii": 3.0,
        "sub-02/ses-1/func/sub-02_ses-1_task-rest_run-3_bold.nii": 2.5,
    }
    runs = by_key(find_runs(make(tmp_path, RAW | sidecars | dict.fromkeys(expected, ""))))
    assert {key: run.tr_s for key, run in runs.items()} == expected


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"RepetitionTime": "2"}', '{"RepetitionTime": -1}', '{"RepetitionTime": true}', "[" * 100_000, "\xff"],
)
def test_a_bad_sidecar_is_noted_and_not_used(tmp_path: Path, content: str) -> None:
    run = "sub-01/func/sub-01_task-rest_bold"
    listing = find_runs(make(tmp_path, RAW | {f"{run}.nii": "", f"{run}.json": content}))
    assert listing.runs[0].tr_s is None
    assert len(listing.notes) == 1
    assert listing.notes[0].startswith(f"{run}.json: ")


def test_a_repetition_time_in_milliseconds_is_noted(tmp_path: Path) -> None:
    run = "sub-01/func/sub-01_task-rest_bold"
    listing = find_runs(make(tmp_path, RAW | {f"{run}.nii": "", f"{run}.json": '{"RepetitionTime": 2000}'}))
    assert listing.runs[0].tr_s == 2000.0
    assert "not plausible" in listing.notes[0]


def test_participants_become_typed_rows(tmp_path: Path) -> None:
    table = "participant_id\tage\tsex\tsite\nsub-01\t31.5\tF\t01\nsub-02\tn/a\tn/a\tB\n"
    listing = find_runs(make(tmp_path, RAW | {"sub-01/func/sub-01_bold.nii": "", "participants.tsv": table}))
    assert listing.participants == (
        {"subject": "01", "age": 31.5, "sex": "F", "site": "01"},
        {"subject": "02", "age": None, "sex": None, "site": "B"},
    )


def test_a_missing_dataset_names_where_it_looked_and_what_it_expects(tmp_path: Path) -> None:
    nested = RAW | {"derivatives/fmriprep/sub-01/func/sub-01_task-rest_desc-preproc_bold.nii.gz": ""}
    with pytest.raises(UsageError, match="derivatives/fmriprep"):
        find_runs(make(tmp_path / "nested", nested))
    with pytest.raises(UsageError, match="expected sub-<label>"):
        find_runs(make(tmp_path / "empty", RAW))
    with pytest.raises(UsageError, match="part-phase"):
        find_runs(make(tmp_path / "phase", RAW | {"sub-01/func/sub-01_part-phase_bold.nii": ""}))


def test_a_link_that_leads_nowhere_is_listed_and_refused_when_opened(tmp_path: Path) -> None:
    root = make(tmp_path, RAW | {"sub-01/func/sub-01_task-rest_bold.nii.gz": ""})
    os.symlink("../../.git/annex/absent", tmp_path / "sub-01/func/sub-01_task-nback_bold.nii.gz")
    broken, whole = find_runs(root).runs
    with pytest.raises(SourceError, match="git-annex"):
        open_run(broken)
    with pytest.raises(SourceError, match="git-annex"):
        quick_fingerprint(broken)
    open_run(whole).close()


def test_text_files_that_cannot_be_read_are_noted_and_not_used(tmp_path: Path) -> None:
    root = make(tmp_path, {"dataset_description.json": "{", "sub-01/func/sub-01_task-rest_bold.nii": ""})
    os.symlink("absent", tmp_path / "participants.tsv")
    os.symlink("absent", tmp_path / "bold.json")
    listing = find_runs(root)
    assert [run.tr_s for run in listing.runs] == [None]
    assert [note.partition(":")[0] for note in listing.notes] == [
        "dataset_description.json",
        "bold.json",
        "participants.tsv",
    ]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "store", {"func/sub-01_task-rest_bold.nii": ""})
    root = make(tmp_path / "dataset", RAW)
    os.symlink(tmp_path / "store", tmp_path / "dataset/sub-01")
    os.symlink(tmp_path / "dataset", tmp_path / "store/loop")
    assert [run.subject for run in find_runs(root).runs] == ["01"]


# --- BIDS, derivative

MNI = "sub-01_task-rest_space-MNI152NLin2009cAsym_res-2"
PREPROC: dict[str, str | bytes] = {
    f"sub-01/func/{MNI}_desc-preproc_bold.nii.gz": "",
    f"sub-01/func/{MNI}_desc-preproc_bold.json": '{"RepetitionTime": 0.8}',
    f"sub-01/func/{MNI}_desc-brain_mask.nii.gz": MASK,
    f"sub-01/func/{MNI}_boldref.nii.gz": MASK,
    f"sub-01/func/{MNI}_desc-aparcaseg_dseg.nii.gz": MASK,
    "sub-01/func/sub-01_task-rest_space-T1w_desc-preproc_bold.nii.gz": "",
    "sub-01/func/sub-01_task-rest_desc-preproc_bold.nii.gz": "",
    "sub-01/func/sub-01_task-rest_desc-brain_mask.nii.gz": MASK,
    "sub-01/func/sub-01_task-rest_echo-2_desc-preproc_bold.nii.gz": "",
    "sub-01/func/sub-01_task-rest_space-fsLR_den-91k_bold.dtseries.nii": "",
    "sub-01/func/sub-01_task-rest_desc-optcom_bold.nii.gz": "",
}


def test_a_derivative_gives_preprocessed_runs_with_space_mask_and_time(tmp_path: Path) -> None:
    root = make(tmp_path, DERIVATIVE | PREPROC)
    listing = find_runs(root)
    runs = by_key(listing)
    func = "sub-01/func"
    assert listing.kind == "fmriprep"
    assert {key: (run.space, run.mask_url) for key, run in runs.items()} == {
        f"{func}/{MNI}_desc-preproc_bold.nii.gz": (
            "MNI152NLin2009cAsym",
            f"{root}/{func}/{MNI}_desc-brain_mask.nii.gz",
        ),
        f"{func}/sub-01_task-rest_space-T1w_desc-preproc_bold.nii.gz": ("T1w", None),
        f"{func}/sub-01_task-rest_desc-preproc_bold.nii.gz": (
            "native",
            f"{root}/{func}/sub-01_task-rest_desc-brain_mask.nii.gz",
        ),
        f"{func}/sub-01_task-rest_echo-2_desc-preproc_bold.nii.gz": (
            "native",
            f"{root}/{func}/sub-01_task-rest_desc-brain_mask.nii.gz",
        ),
    }
    assert runs[f"{func}/{MNI}_desc-preproc_bold.nii.gz"].tr_s == 0.8
    found = reasons(listing)
    assert "--cifti takes these" in found.pop(f"{func}/sub-01_task-rest_space-fsLR_den-91k_bold.dtseries.nii")
    assert found == {f"{func}/sub-01_task-rest_desc-optcom_bold.nii.gz": "desc-optcom, not desc-preproc"}


@pytest.mark.parametrize(
    "description", [{}, {"dataset_description.json": '{"PipelineDescription": {"Name": "x"}}'}, RAW]
)
def test_a_derivative_is_known_by_its_file_names_too(tmp_path: Path, description: dict[str, str]) -> None:
    assert find_runs(make(tmp_path, description | PREPROC)).kind == "fmriprep"


def test_a_wanted_space_selects_among_spaces_and_declares_where_none_is_said(tmp_path: Path) -> None:
    derivative = make(tmp_path / "derivative", DERIVATIVE | PREPROC)
    listing = find_runs(derivative, space="MNI152NLin2009cAsym")
    assert [run.space for run in listing.runs] == ["MNI152NLin2009cAsym"]
    assert "in space T1w, not in MNI152NLin2009cAsym" in reasons(listing).values()
    with pytest.raises(UsageError, match="there are MNI152NLin2009cAsym, T1w, native"):
        find_runs(derivative, space="MNI305")
    raw = make(tmp_path / "raw", RAW | {"sub-01/func/sub-01_task-rest_bold.nii": ""})
    assert find_runs(raw, space="MNI305").runs[0].space == "MNI305"


def test_a_derivative_of_another_pipeline_gives_its_runs_whatever_their_description(tmp_path: Path) -> None:
    listing = find_runs(make(tmp_path, DERIVATIVE | {"sub-01/func/sub-01_space-MNI_desc-denoised_bold.nii.gz": ""}))
    assert [run.name for run in listing.runs] == ["sub-01_space-MNI_desc-denoised_bold"]


DENSE = "sub-01/func/sub-01_task-rest_space-fsLR_den-91k_bold"


@pytest.mark.parametrize(
    "options",
    [
        {"cifti": True},
        {"space": "fsLR"},
        {"entities": EntityFilter(den=("91k",))},
        {"space": "fsLR", "entities": EntityFilter(den=("91k",), task=("rest",))},
    ],
)
def test_a_derivatives_grayordinates_are_taken_by_flag_or_by_a_label_that_only_they_have(tmp_path, options):
    files = DERIVATIVE | PREPROC | {f"{DENSE}.json": '{"RepetitionTime": 0.75}'}
    listing = find_runs(make(tmp_path, files), **options)
    (run,) = listing.runs
    assert (run.key, run.name) == (f"{DENSE}.dtseries.nii", DENSE.rpartition("/")[2])
    assert (run.space, run.den, run.tr_s, run.mask_url) == ("fsLR", "91k", 0.75, None)
    assert {file.by_choice for file in listing.skipped} == {True}
    assert len(listing.skipped) == 5


def test_grayordinates_are_taken_where_a_dataset_holds_nothing_else(tmp_path):
    unlabelled = "sub-02/func/sub-02_task-rest_bold.dtseries.nii"
    listing = find_runs(make(tmp_path, DERIVATIVE | {f"{DENSE}.dtseries.nii": "", unlabelled: ""}))
    assert {run.key: run.space for run in listing.runs} == {f"{DENSE}.dtseries.nii": "fsLR", unlabelled: ""}
    assert not listing.skipped


def test_two_densities_are_two_forms_of_a_run(tmp_path):
    root = make(tmp_path, DERIVATIVE | {f"{DENSE.replace('91k', den)}.dtseries.nii": "" for den in ("91k", "170k")})
    assert any("--den 170k|91k" in note for note in find_runs(root).notes)
    assert [run.den for run in find_runs(root, entities=EntityFilter(den=("170k",))).runs] == ["170k"]


def test_grayordinates_that_are_not_there_cannot_be_asked_for(tmp_path):
    root = make(tmp_path, RAW | {"sub-01/func/sub-01_task-rest_bold.nii": ""})
    for source, told in ((root, "no CIFTI-2 dense series"), ("synth://?subjects=2", "says itself")):
        with pytest.raises(UsageError, match=told):
            find_runs(source, cifti=True)
