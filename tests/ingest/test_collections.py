"""Collections with a layout of their own: HCP, UK Biobank, ABIDE, INDI, ABCD, and one of the user's, from small trees."""

from pathlib import Path

import pytest

from fmristream.errors import UsageError
from fmristream.ingest.run_stream import open_run
from fmristream.ingest.sources import EntityFilter, Listing, find_runs
from fmristream.ingest.sources.collection import known_collections, parse_collection
from tests.ingest.nifti_files import gzip_members
from tests.ingest.source_trees import DERIVATIVE, MASK, RAW, RUN, by_key, make, reasons
from tests.storage.archives import tar_bytes, zip_bytes

PACKED, PACKED_MASK = gzip_members(RUN), gzip_members(MASK)


def labels(listing: Listing) -> set[tuple[str, ...]]:
    return {(run.subject, run.session, run.task, run.acq, run.run, run.space) for run in listing.runs}


def masks(listing: Listing) -> dict[str, str | None]:
    return {run.key: run.mask_url and run.mask_url.removeprefix(listing.root + "/") for run in listing.runs}


def hcp(subject: str, *folders: str, desc: str = "") -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {}
    for folder in folders:
        place = f"{subject}/MNINonLinear/Results/{folder}"
        files |= {f"{place}/{folder}{desc}.nii.gz": "", f"{place}/brainmask_fs.2.nii.gz": PACKED_MASK}
        files |= {f"{place}/{folder}_SBRef.nii.gz": PACKED_MASK, f"{place}/{folder}_Atlas.dtseries.nii": "CIFTI"}
    return files | {f"{subject}/MNINonLinear/T1w.nii.gz": PACKED_MASK}


# --- HCP


@pytest.mark.parametrize(
    ("options", "desc"),
    [
        ({"cifti": True}, "Atlas_MSMAll"),
        ({"entities": EntityFilter(desc=("Atlas_MSMAll_hp2000_clean",))}, "Atlas_MSMAll_hp2000_clean"),
        ({"cifti": True, "entities": EntityFilter(desc=("Atlas",))}, "Atlas"),
        ({"space": "fsLR"}, "Atlas_MSMAll"),
    ],
)
def test_hcp_gives_its_grayordinates_where_they_are_asked_for(tmp_path: Path, options, desc: str) -> None:
    files = hcp("100307", "rfMRI_REST1_LR", "tfMRI_WM_RL")
    for folder in ("rfMRI_REST1_LR", "tfMRI_WM_RL"):
        place = f"100307/MNINonLinear/Results/{folder}/{folder}"
        files |= {f"{place}_Atlas{form}.dtseries.nii": "" for form in ("_MSMAll", "_MSMAll_hp2000_clean")}
    listing = find_runs(make(tmp_path, files), **options)
    assert listing.kind == "hcp-ya"
    assert {(run.task, run.acq, run.space, run.desc) for run in listing.runs} == {
        ("REST", "LR", "fsLR", desc),
        ("WM", "RL", "fsLR", desc),
    }
    assert {run.mask_url for run in listing.runs} == {None}
    assert all(file.by_choice for file in listing.skipped)
    assert len(listing.skipped) == 6


def test_the_lifespan_collections_have_grayordinates_too_and_joined_ones_are_left_out(tmp_path: Path) -> None:
    results = "HCA6000030_V1_MR/MNINonLinear/Results"
    run = f"{results}/rfMRI_REST1_AP/rfMRI_REST1_AP"
    joined = f"{results}/rfMRI_REST/rfMRI_REST_Atlas_MSMAll_hp0_clean.dtseries.nii"
    forms = ("", "_hp0_clean")
    names = [f"{run}_Atlas_MSMAll{form}.dtseries.nii" for form in forms] + [f"{run}.nii.gz", joined]
    listing = find_runs(make(tmp_path, dict.fromkeys(names, "")), cifti=True)
    assert [(run.subject, run.session, run.desc) for run in listing.runs] == [("HCA6000030", "V1", "Atlas_MSMAll")]
    assert "joined" in reasons(listing)[joined]


def test_hcp_young_adult_gives_its_minimally_preprocessed_runs_with_masks(tmp_path: Path) -> None:
    folders = ("rfMRI_REST1_LR", "rfMRI_REST2_RL", "tfMRI_WM_LR", "rfMRI_REST3_7T_PA")
    files = hcp("100307", *folders) | hcp("100307", "rfMRI_REST1_LR", desc="_hp2000_clean")
    root = make(tmp_path, files | hcp("100408", "tfMRI_MOTOR_RL"))
    listing = find_runs(root)
    assert listing.kind == "hcp-ya"
    mni = "MNI152NLin6Asym"
    assert labels(listing) == {
        ("100307", "", "REST", "LR", "1", mni),
        ("100307", "", "REST", "RL", "2", mni),
        ("100307", "", "WM", "LR", "", mni),
        ("100307", "", "REST", "PA", "3", mni),
        ("100408", "", "MOTOR", "RL", "", mni),
    }
    assert {mask.rpartition("/")[2] for mask in masks(listing).values() if mask} == {"brainmask_fs.2.nii.gz"}
    assert None not in masks(listing).values()
    assert {file.by_choice for file in listing.skipped} == {True}
    told = list(reasons(listing).values())
    assert "desc hp2000_clean, not minimal (--desc chooses)" in told
    assert sum("--cifti takes these" in reason for reason in told) == len(told) - 1 == 5
    assert any("Family_ID" in note for note in listing.notes)
    with open_run(listing.runs[0]) as stream:
        assert stream.header.frames == 5


def test_another_form_of_hcp_runs_can_be_chosen_and_is_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    both = hcp("100307", "rfMRI_REST1_LR") | hcp("100307", "rfMRI_REST1_LR", desc="_hp2000_clean")
    root = make(tmp_path / "both", both | hcp("100408", "rfMRI_REST1_LR", desc="_hp2000_clean"))
    chosen = find_runs(root, entities=EntityFilter(desc=("hp2000_clean",)))
    assert {run.key.rpartition("/")[2] for run in chosen.runs} == {"rfMRI_REST1_LR_hp2000_clean.nii.gz"}
    assert len(chosen.runs) == 2
    default = find_runs(root)
    assert [run.subject for run in default.runs] == ["100307"]
    assert any("1 files are of runs that are not there as minimal" in note for note in default.notes)
    only = find_runs(make(tmp_path / "only", hcp("100307", "rfMRI_REST1_LR", desc="_hp2000_clean")))
    assert [run.desc for run in only.runs] == ["hp2000_clean"]


def test_hcp_lifespan_runs_have_their_visit_and_joined_runs_are_left_out(tmp_path: Path) -> None:
    files = hcp("HCA6002236_V1_MR", "rfMRI_REST1_AP", "tfMRI_FACENAME_PA") | hcp("HCD0001305_V2_MR", "rfMRI_REST1a_PA")
    joined = "HCA6002236_V1_MR/MNINonLinear/Results/rfMRI_REST/rfMRI_REST.nii.gz"
    listing = find_runs(make(tmp_path, files | {joined: ""}))
    mni = "MNI152NLin6Asym"
    assert listing.kind == "hcp-lifespan"
    assert labels(listing) == {
        ("HCA6002236", "V1", "REST", "AP", "1", mni),
        ("HCA6002236", "V1", "FACENAME", "PA", "", mni),
        ("HCD0001305", "V2", "REST", "PA", "1a", mni),
    }
    assert "joined into one" in reasons(listing)[joined]


def test_a_folder_inside_the_layout_is_known_by_the_path_above_it(tmp_path: Path) -> None:
    root = make(tmp_path, hcp("100307", "rfMRI_REST1_LR"))
    for inner in ("100307", "100307/MNINonLinear", "100307/MNINonLinear/Results"):
        listing = find_runs(f"{root}/{inner}")
        assert (listing.kind, [run.subject for run in listing.runs]) == ("hcp-ya", ["100307"])
        assert masks(listing)[listing.runs[0].key]


# --- UK Biobank

UKB = {
    "fMRI/rfMRI.nii.gz": PACKED,
    "fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz": PACKED,
    "fMRI/rfMRI.ica/mask.nii.gz": PACKED_MASK,
    "fMRI/rfMRI_SBREF.nii.gz": PACKED_MASK,
    "fMRI/rfMRI.ica/reg/example_func2standard.mat": b"1 0 0 0\n",
}


def test_ukb_zips_are_read_where_they_lie_with_the_mask_inside(tmp_path: Path) -> None:
    files = {
        f"{eid}_20227_{visit}_0.zip": zip_bytes(UKB)
        for eid, visit in [("1000001", "2"), ("1000002", "2"), ("1000001", "3")]
    }
    files["1000001_20252_2_0.zip"] = b"another field: it is not even opened"
    listing = find_runs(make(tmp_path, files))
    assert listing.kind == "ukb"
    assert labels(listing) == {
        ("1000001", "2", "rest", "", "", "native"),
        ("1000002", "2", "rest", "", "", "native"),
        ("1000001", "3", "rest", "", "", "native"),
    }
    first = listing.runs[0]
    assert first.key == "1000001_20227_2_0.zip!/fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz"
    assert masks(listing)[first.key] == "1000001_20227_2_0.zip!/fMRI/rfMRI.ica/mask.nii.gz"
    assert first.name == "sub-1000001_ses-2_task-rest_desc-clean"
    assert any("1 archives are not looked into" in note for note in listing.notes)
    with open_run(first) as stream:
        assert sum(1 for _ in stream.frames()) == 5
        assert stream.fingerprint().crc.startswith("zip:")
    raw = find_runs(listing.root, entities=EntityFilter(desc=("raw",)))
    assert {run.key.rpartition("/")[2] for run in raw.runs} == {"rfMRI.nii.gz"}


def test_ukb_zips_without_a_run_and_runs_that_are_there_twice_are_told(tmp_path: Path) -> None:
    files = {"1000001_20227_2_0.zip": zip_bytes(UKB), "1000002_20227_2_0.zip": zip_bytes({"fMRI/failed.txt": b""})}
    files |= {f"copy/1000001_20227_2_0/{key}": data for key, data in UKB.items()}
    listing = find_runs(make(tmp_path, files))
    assert len(by_key(listing)) == 2
    assert "1 archives hold no run, the first: 1000002_20227_2_0.zip" in listing.notes
    assert any("1 runs have the same labels as another run" in note for note in listing.notes)


def test_one_ukb_zip_or_a_glob_of_them_is_a_source(tmp_path: Path) -> None:
    root = make(tmp_path, {f"100000{n}_20227_2_0.zip": zip_bytes(UKB) for n in (1, 2)})
    one = find_runs(f"{root}/1000002_20227_2_0.zip")
    assert (one.kind, [run.subject for run in one.runs]) == ("ukb", ["1000002"])
    both = find_runs(f"{root}/*_20227_?_0.zip")
    assert (both.kind, [run.subject for run in both.runs]) == ("ukb", ["1000001", "1000002"])
    assert both.runs[1] == one.runs[0]


def test_a_damaged_ukb_zip_is_quarantined_and_the_others_are_converted(tmp_path: Path) -> None:
    whole = zip_bytes(UKB)
    listing = find_runs(make(tmp_path, {"1000001_20227_2_0.zip": whole, "1000002_20227_2_0.zip": whole[:-30]}))
    assert [run.subject for run in listing.runs] == ["1000001"]
    (file,) = [file for file in listing.skipped if not file.by_choice]
    assert file.key == "1000002_20227_2_0.zip"
    assert "directory is not at its end" in file.reason


def test_what_ukb_zips_unpack_to_is_the_same_collection(tmp_path: Path) -> None:
    trees = {f"{folder}/{key}": data for folder in ("1000001", "1000002_20227_2_0") for key, data in UKB.items()}
    standard = "1000001/fMRI/rfMRI.ica/reg_standard"
    trees |= {f"{standard}/filtered_func_data_clean.nii.gz": PACKED, f"{standard}/mask.nii.gz": PACKED_MASK}
    listing = find_runs(make(tmp_path, trees))
    assert labels(listing) == {
        ("1000001", "", "rest", "", "", "native"),
        ("1000001", "", "rest", "", "", "MNI152NLin6Asym"),
        ("1000002", "2", "rest", "", "", "native"),
    }
    assert masks(listing)[f"{standard}/filtered_func_data_clean.nii.gz"] == f"{standard}/mask.nii.gz"


# --- INDI


def test_abide_preprocessed_files_have_subject_site_and_mask(tmp_path: Path) -> None:
    ids = ("Pitt_0050003", "Leuven_1_0050682", "MaxMun_a_0051325")
    files: dict[str, str | bytes] = {}
    for name in ids:
        base = "Outputs/cpac/filt_global"
        files |= {
            f"{base}/func_preproc/{name}_func_preproc.nii.gz": "",
            f"{base}/func_mask/{name}_func_mask.nii.gz": PACKED_MASK,
        }
    root = make(tmp_path, files)
    listing = find_runs(root)
    assert listing.kind == "abide-pcp"
    assert {run.subject for run in listing.runs} == {"50003", "50682", "51325"}
    assert {str(row["subject"]): row["site"] for row in listing.participants} == {
        "50003": "Pitt",
        "50682": "Leuven_1",
        "51325": "MaxMun_a",
    }
    assert None not in masks(listing).values()
    make(tmp_path, {f"Outputs/ccs/nofilt_noglobal/func_preproc/{ids[0]}_func_preproc.nii.gz": ""})
    with pytest.raises(UsageError, match=r"2 forms; choose one with --desc: ccs/nofilt_noglobal, cpac/filt_global"):
        find_runs(root)
    assert len(find_runs(root, entities=EntityFilter(desc=("cpac/filt_global",))).runs) == 3


def test_fcp1000_subjects_of_two_sites_with_one_number_stay_two_people(tmp_path: Path) -> None:
    files = {f"{site}/sub04111/func/rest.nii.gz": "" for site in ("Baltimore", "Beijing_Zang")}
    listing = find_runs(make(tmp_path, files | {"Baltimore/sub04111/anat/mprage_skullstripped.nii.gz": PACKED_MASK}))
    assert listing.kind == "fcp1000"
    assert [run.subject for run in listing.runs] == ["Baltimore_04111", "Beijing_Zang_04111"]
    assert [row["site"] for row in listing.participants] == ["Baltimore", "Beijing_Zang"]


def test_bids_datasets_side_by_side_give_sites_with_their_sidecars_and_participants(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "NYU_1/sub-0025000/ses-1/func/sub-0025000_ses-1_task-rest_run-1_bold.nii.gz": "",
        "NYU_1/task-rest_bold.json": '{"RepetitionTime": 2.1}',
        "NYU_1/participants.tsv": "participant_id\tage\n0025000\t21\n",
        "BNU_1/sub-0025864/ses-2/func/sub-0025864_ses-2_task-rest_run-1_bold.nii.gz": "",
        "BNU_1/participants.tsv": "participant_id\tage\n0025864\t23\n",
    }
    listing = find_runs(make(tmp_path, files))
    assert listing.kind == "bids-sites"
    assert {(run.subject, run.session, run.run, run.tr_s) for run in listing.runs} == {
        ("0025000", "1", "1", 2.1),
        ("0025864", "2", "1", None),
    }
    assert listing.participants == (
        {"subject": "0025000", "age": 21.0, "site": "NYU_1"},
        {"subject": "0025864", "age": 23.0, "site": "BNU_1"},
    )


def test_sites_may_be_archives(tmp_path: Path) -> None:
    def site(number: str) -> bytes:
        return tar_bytes({f"sub-{number}/func/sub-{number}_task-rest_bold.nii": RUN})

    root = make(tmp_path, {"NYU.tar": site("001"), "UCLA.tar": site("002")})
    listing = find_runs(f"{root}/*.tar")
    assert (listing.kind, [row["site"] for row in listing.participants]) == ("bids-sites", ["NYU", "UCLA"])


# --- ABCD


def test_abcd_keeps_families_together_and_says_when_it_cannot(tmp_path: Path) -> None:
    names = ("NDARINV00000001", "NDARINV00000002", "NDARINV00000003")
    runs = {
        f"sub-{n}/ses-baselineYear1Arm1/func/sub-{n}_ses-baselineYear1Arm1_task-rest_run-1_space-MNI_desc-preproc_bold.nii.gz": ""
        for n in names
    }
    table = "participant_id\trel_family_id\tsite_id_l\n" + "".join(
        f"sub-{n}\t{family}\tsite{n[-1]}\n" for n, family in zip(names, ("7", "7", "n/a"), strict=True)
    )
    listing = find_runs(make(tmp_path, DERIVATIVE | runs | {"participants.tsv": table}))
    assert listing.kind == "abcd"
    assert [run.group for run in listing.runs] == ["7", "7", ""]
    assert any("rel_family_id together" in note for note in listing.notes)
    assert any("1 subjects have no rel_family_id" in note for note in listing.notes)
    (tmp_path / "participants.tsv").unlink()
    without = find_runs(str(tmp_path))
    assert {run.group for run in without.runs} == {""}
    assert any("may divide siblings" in note for note in without.notes)


# --- archives of anything


@pytest.mark.parametrize("name", ["dataset.zip", "dataset.tar", "dataset.tar.gz"])
def test_a_bids_dataset_in_an_archive_is_the_same_dataset(tmp_path: Path, name: str) -> None:
    files = RAW | {
        "sub-01/func/sub-01_task-rest_bold.nii.gz": PACKED,
        "task-rest_bold.json": '{"RepetitionTime": 1.5}',
        "participants.tsv": "participant_id\tage\nsub-01\t30\n",
    }
    raw = {key: value if isinstance(value, bytes) else value.encode() for key, value in files.items()}
    pack = zip_bytes if name.endswith(".zip") else lambda f: tar_bytes(f, compressed=name.endswith(".gz"))
    root = make(tmp_path, {name: pack(raw)})
    listing = find_runs(f"{root}/{name}")
    assert (listing.kind, listing.root) == ("bids", f"{root}/{name}!")
    (run,) = listing.runs
    assert (run.subject, run.tr_s, run.key) == ("01", 1.5, "sub-01/func/sub-01_task-rest_bold.nii.gz")
    assert listing.participants == ({"subject": "01", "age": 30.0},)
    assert any(".tar.gz" in note for note in listing.notes) == name.endswith(".gz")
    with open_run(run) as stream:
        assert sum(1 for _ in stream.frames()) == 5
    inner = find_runs(f"{root}/{name}!/sub-01/func")
    assert [run.subject for run in inner.runs] == ["01"]


def test_a_glob_of_archives_gives_a_subject_for_each_unless_paths_say_more(tmp_path: Path) -> None:
    files = {"anna.tar": tar_bytes({"rest.nii": RUN}), "boris.zip": zip_bytes({"x/rest.nii": RUN, "../evil.nii": RUN})}
    root = make(tmp_path, files)
    listing = find_runs(f"{root}/*.*")
    assert [(run.subject, run.key) for run in listing.runs] == [
        ("anna", "anna.tar!/rest.nii"),
        ("boris", "boris.zip!/x/rest.nii"),
    ]
    assert reasons(listing) == {"boris.zip!/../evil.nii": "its name leads out of the archive"}
    with pytest.raises(UsageError, match=r"2 archives are there: name them"):
        find_runs(root)


# --- descriptions


def test_every_known_description_is_sound_and_none_claims_the_tree_of_another(tmp_path: Path) -> None:
    assert {"abcd", "abide-pcp", "bids-sites", "fcp1000", "hcp-lifespan", "hcp-ya", "nki", "ukb"} <= set(
        known_collections()
    )
    assert all(one.title and one.kind == kind for kind, one in known_collections().items())


def test_a_user_describes_a_collection_in_a_file(tmp_path: Path) -> None:
    text = """
    title = "Our lab: <wave>/<subject>/bold_<task>.nii"
    space = "MNI305"
    [[runs]]
    path = '(?:^|/)w(?P<session>\\d)/(?P<subject>S\\d+)/bold_(?P<task>[a-z]+)\\.nii$'
    masks = ["{folder}/other.nii", "{folder}/../{subject}_mask.nii"]
    [[left_out]]
    path = '/phantom\\.nii$'
    reason = "a phantom"
    """
    root = make(
        tmp_path,
        {
            "ours.toml": text,
            "w1/S01/bold_rest.nii": "",
            "w1/S01/phantom.nii": "",
            "w1/S01_mask.nii": MASK,
            "w2/S01/bold_face.nii": "",
        },
    )
    assert find_runs(root).kind == "folder"
    listing = find_runs(root, kind=f"{root}/ours.toml")
    assert listing.kind == "ours"
    assert labels(listing) == {("S01", "1", "rest", "", "", "MNI305"), ("S01", "2", "face", "", "", "MNI305")}
    assert masks(listing) == {"w1/S01/bold_rest.nii": "w1/S01_mask.nii", "w2/S01/bold_face.nii": None}
    assert reasons(listing) == {"w1/S01/phantom.nii": "a phantom"}


@pytest.mark.parametrize(
    "text",
    ["title = 1", "title = 'x'", "[[runs]]\npath='('", "x = [", "title='x'\nnew='y'", "title='x'\nlayout='z'\n[[runs]]\npath='a'",
     "title='x'\n[[runs]]\npath='(?P<subject>a)'\nmasks=['{nothing}']",
     "title='x'\n[[runs]]\npath='(?P<subject>a)'\nlabels={age='3'}",
     "title='x'\n[[runs]]\npath='no subject'"],
)  # fmt: skip
def test_a_description_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a description"):
        parse_collection(text, "mine")


def test_an_unknown_kind_or_one_without_runs_is_refused_with_what_there_is(tmp_path: Path) -> None:
    root = make(tmp_path, {"a.nii": ""})
    with pytest.raises(UsageError, match="hcp-ya"):
        find_runs(root, kind="hpc")
    with pytest.raises(UsageError, match="no run of ukb among 1 files; expected UK Biobank"):
        find_runs(root, kind="ukb")
    for source in ("synth://?subjects=1", f"{root}/runs.csv"):
        with pytest.raises(UsageError, match="leave --kind out"):
            find_runs(source, kind="folder")
    assert find_runs(make(tmp_path, hcp("100307", "rfMRI_REST1_LR")), kind="folder").kind == "folder"
