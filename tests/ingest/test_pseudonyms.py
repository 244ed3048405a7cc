"""Pseudonyms: no byte of a dataset names anybody, the same key gives the same dataset, and another key is refused."""

import hmac
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import SplitError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.pseudonyms import Labels, Pseudonyms, pseudonymised, read_key, require_different
from fmristream.ingest.sources import Listing, SourceRun, find_runs
from fmristream.report.verify import verify
from tests.ingest.cohorts import bold, contents, convert, write_runs
from tests.ingest.nifti_files import AFFINE, comment_extension, gzip_members, nifti_bytes
from tests.ingest.source_trees import make
from tests.ingest.test_convert_resume import interrupt

KEY = bytes(range(32))
LABELS = ("Anna7", "BerndX", "carla09", "1048576")
SHAPE = (4, 3, 3, 6)


@pytest.fixture
def key(tmp_path) -> str:
    return write_key(tmp_path / "key", KEY)


def write_key(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    path.chmod(0o600)
    return str(path)


def name_of(label: str, key: bytes = KEY) -> str:
    """As the documentation says it."""
    return "p" + hmac.new(key, label.encode(), "sha256").hexdigest()[:16]


def telling_source(folder: Path) -> str:
    """fMRIPrep with everything that may name somebody: tables, sidecars, masks that do not fit, damaged and lost files."""
    names = {f"sub-{label}/func/sub-{label}_task-rest_space-MNI_desc-preproc_bold": bold(seed=n, shape=SHAPE)
             for n, label in enumerate(LABELS)}  # fmt: skip
    files: dict[str, str | bytes] = {"dataset_description.json": '{"DatasetType": "derivative"}'}
    for n, label in enumerate(LABELS):
        stem = f"sub-{label}/func/sub-{label}_task-rest_space-MNI_desc-"
        mask = np.ones((5, 3, 3) if n == 2 else SHAPE[:3], "u1")
        files[f"{stem}brain_mask.nii.gz"] = gzip_members(nifti_bytes(mask))
        task = f"sub-{label}/func/sub-{label}_task-rest"
        other = LABELS[n - 1]
        files[f"{task}_desc-confounds_timeseries.tsv"] = f"rot_x\t{label}\tcsf_{other}\tKowalski\n" + "".join(
            f"0.{k}\t{k}.5\t1.{k}\t{k}.7\n" for k in range(6)
        )
        words = (f"seen_{other}", "Jan Nowak laughs", "go", f"seen_{other}")
        files[f"{task}_events.tsv"] = "onset\tduration\ttrial_type\n" + "".join(
            f"{k}\t1\t{words[k]}\n" for k in range(4)
        )
        files[f"{task}_recording-ecg_physio.tsv"] = f"cardiac\tecg{other}\n" + "".join(
            f"{k}\t{k}.5\n" for k in range(6)
        )
        files[f"{task}_recording-with{other}_physio.tsv"] = "cardiac\n" + "".join(f"{k}\n" for k in range(6))
        files[f"{stem}preproc_bold.json"] = json.dumps(
            {"RepetitionTime": 2.0, "PatientName": label, "TaskName": f"rest of Jan Nowak sub-{other}",
             "ScanningSequence": "Kowalski", "Manufacturer": f"GE {label}", "PhaseEncodingDirection": "j-",
             "MRAcquisitionType": "2D"}
        )  # fmt: skip
    broken = "sub-Anna7/func/sub-Anna7_task-broken_space-MNI_desc-preproc_bold"
    files[f"{broken}.nii.gz"] = b"\x1f\x8bnonsense"
    files["sub-Anna7/func/sub-BerndX_task-moved_desc-preproc_bold.nii.gz"] = b"x"
    files["sub-carla09/odd/sub-carla09_task-away_desc-preproc_bold.nii.gz"] = b"x"
    rows = [f"sub-{label}\t{20 + n}\tFam{n // 2}\t{label}\tsister of Anna7" for n, label in enumerate(LABELS)]
    files["participants.tsv"] = "\n".join(["participant_id\tage\tfamily\tcode\tremark", *rows])
    make(folder, files)
    extension = comment_extension(20).replace(b"c" * 20, b"Anna7" * 4)
    return write_runs(folder, names, extension=extension)


def every_byte(root: Path) -> bytes:
    """All objects below a root with their names; tables and headers also decoded."""
    said = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        said += [str(path.relative_to(root)).encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            said += [repr(table.to_pylist()).encode(), repr(table.schema.metadata).encode(), str(table.schema).encode()]
    if (root / "generations").is_dir():
        dataset = fmristream.open(str(root))
        for run in dataset.runs:
            said += [repr(dataset.confounds(run.name)).encode(), repr(dataset.events(run.name)).encode()]
            said.append(repr(dataset.recordings(run.name)).encode())
            said += [repr(run).encode(), dataset.reader(run).nifti_prefix or b""]
            said.append(repr(dataset.reader(run).attributes).encode())
    return b"\0".join(said)


def names_nobody(root: Path, *more: str) -> None:
    said = every_byte(root).lower()
    assert len(said) > 1000
    for label in (*LABELS, "Nowak", "Kowalski", *more):
        assert label.lower().encode() not in said, label
    assert KEY not in said
    assert KEY.hex().encode() not in said


def columns_of_recordings(dataset, run) -> dict[str, list[str]]:
    return {name: list(table.columns) for name, table in dataset.recordings(run).items()}


@pytest.mark.parametrize("options", [{"mask": "auto"}, {"layout": "volume"}], ids=["voxels", "volume"])
def test_no_byte_of_a_dataset_names_anybody(tmp_path, key, options):
    source = telling_source(tmp_path / "in")
    out = tmp_path / "out"
    report = convert(source, str(out), pseudonyms=key, split="hash", split_ratios=(1, 0, 0), **options)
    dataset = fmristream.open(str(out))
    expected = [label for label in LABELS if label != "carla09"]  # whose mask does not fit
    assert {run.subject for run in dataset.runs} == {name_of(label) for label in expected}
    assert dict(dataset.skipped).keys() == {one.name for one in report.quarantined}
    assert len(report.quarantined) == 4
    names_nobody(out)
    assert [sorted(dataset.confounds(run) or ()) for run in dataset.runs] == [["rot_x"]] * len(expected)
    assert [sorted(dataset.events(run) or ()) for run in dataset.runs] == [["duration", "onset"]] * len(expected)
    assert [columns_of_recordings(dataset, run) for run in dataset.runs] == [{"physio-ecg": ["cardiac"]}] * len(
        expected
    )
    told = {"MRAcquisitionType": "2D", "PhaseEncodingDirection": "j-", "RepetitionTime": 2.0}
    assert [dataset.reader(run).sidecar for run in dataset.runs] == [told] * len(expected)
    assert not any(label in f"{report} {dataset.generation.document}" for label in LABELS)
    assert {name_of("Anna7") in name for name, _ in dataset.skipped} == {True, False}
    reasons = " ".join(reason for _, reason in dataset.skipped)
    assert "gzip" in reasons
    assert "the mask has 5 x 3 x 3 voxels" in reasons
    assert [sorted(row) for row in dataset.participants] == [["age", "family", "subject"]] * len(expected)
    assert {row["subject"] for row in dataset.participants} == {name_of(label) for label in expected}


def test_what_lies_beside_runs_names_nobody_however_short_the_label_whoever_it_is(tmp_path, key):
    subjects, families = ("S77", "ann", "0132"), ("FamX1", "FamX1", "FamZ2")
    source = write_runs(
        tmp_path / "in", {f"sub-{one}/func/sub-{one}_bold": bold(seed=n, shape=SHAPE) for n, one in enumerate(subjects)}
    )
    files: dict[str, str | bytes] = {"dataset_description.json": "{}"}
    files["participants.tsv"] = "\n".join(
        ["participant_id\tfamily", *map("\t".join, zip(subjects, families, strict=True))]
    )
    numbers = "".join(f"{k}.1\t{k}.2\t{k}.3\t{k}.4\n" for k in range(6))
    for one in subjects:
        stem = f"sub-{one}/func/sub-{one}"
        files[f"{stem}_desc-confounds_timeseries.tsv"] = "csf\tcsf_S77\tface_ann\tFamX1\n" + numbers
        rows = [f"{k}\t1\t{word}" for k, word in enumerate(("face_ann", "seen_0132", "xS77", "of FamZ2", "Jo Doe"))]
        files[f"{stem}_events.tsv"] = "\n".join(["onset\tduration\ttrial_type", *rows])
        files[f"{stem}_stim.tsv"] = "trigger\tpicS77\tpicann\tof0132\n" + numbers
        files[f"{stem}_bold.json"] = json.dumps(
            {"TaskName": "S77 and ann", "ScanOptions": "FamZ2 0132", "EchoTime": 0.03}
        )
    make(tmp_path / "in", files)
    out = tmp_path / "out"
    report = convert(source, str(out), pseudonyms=key, phenotypes=fmristream_phenotypes(None, "family"))
    names_nobody(out, *families, "Jo Doe", "seen_", "face_")
    dataset = fmristream.open(str(out))
    for run in dataset.runs:
        assert list(dataset.confounds(run)) == ["csf"]
        assert list(dataset.events(run)) == ["onset", "duration"]
        assert columns_of_recordings(dataset, run) == {"stim": ["trigger"]}
        assert dataset.reader(run).sidecar == {"EchoTime": 0.03}
    said = " ".join(report.warnings)
    assert "confounds: columns left out: 3" in said
    assert "events: trial types are words, which may name people; left out with --pseudonyms" in said
    assert not any(label in said for label in (*subjects, *families))


def test_columns_of_families_and_sites_that_stay_are_told(tmp_path, key, memory_url):
    source = write_runs(
        tmp_path / "in", {f"sub-{label}_bold": bold(seed=n, shape=SHAPE) for n, label in enumerate(LABELS)}
    )
    rows = [f"{label}\tFam{n // 2}\tberlin\t{20 + n}" for n, label in enumerate(LABELS)]
    table = tmp_path / "who.tsv"
    table.write_text("\n".join(["participant_id\trel_family_id\tsite\tage", *rows]))
    for group_by, staying in ((None, "rel_family_id, site"), ("rel_family_id", "site")):
        url = f"{memory_url}-{group_by}"
        report = convert(source, url, pseudonyms=key, phenotypes=fmristream_phenotypes(str(table), group_by))
        said = " ".join(report.warnings)
        assert f"participants columns {staying} keep the labels of families or sites as they are" in said
    plain = convert(source, f"{memory_url}-plain", phenotypes=fmristream_phenotypes(str(table), None))
    assert "keep the labels" not in " ".join(plain.warnings)


def test_a_note_names_the_metadata_file_that_is_missing(tmp_path):
    notes = (
        "there is no dataset_description.json",
        "participants.tsv: no rows",
        "/data/Anna7/participants.tsv is empty",
    )
    run = SourceRun(key="x.nii.gz", name="x", url="/data/x.nii.gz", subject="Anna7")
    found = Listing(kind="bids", root="/data", runs=(run,), notes=notes)
    assert pseudonymised(found, Pseudonyms(KEY)).notes == (*notes[:2], "(file) is empty")


def test_the_values_are_those_of_a_conversion_without_pseudonyms(tmp_path, key, memory_url):
    source = telling_source(tmp_path / "in")
    convert(source, f"{memory_url}-plain", mask="auto")
    convert(source, memory_url, mask="auto", pseudonyms=key)
    plain, ours = fmristream.open(f"{memory_url}-plain"), fmristream.open(memory_url)
    assert "pseudonyms" not in plain.generation.document
    digests = {name_of(run.subject): run.digest for run in plain.runs}
    assert {run.subject: run.digest for run in ours.runs} == digests
    assert verify(memory_url, deep=True, against=source, pseudonyms=key).is_sound
    with pytest.raises(UsageError, match="have pseudonyms; give --pseudonyms"):
        verify(memory_url, against=source)


def test_what_an_interrupted_conversion_and_shards_leave_names_nobody_and_is_taken_up_again(tmp_path, key):
    source = write_runs(tmp_path / "in", {f"sub-{label}_bold": bold(seed=n) for n, label in enumerate(LABELS)})
    out = tmp_path / "out"
    interrupt(source, str(out), after_runs=2, pseudonyms=key)
    assert [path for path in (out / "pending").rglob("*") if path.is_file()]
    names_nobody(out)
    for shard in ("1/2", "2/2"):
        convert(source, str(out), pseudonyms=key, shard=shard, mask="first:3")
        names_nobody(out)
    report = convert(source, str(out), pseudonyms=key)
    assert report.resumed >= 2
    assert report.content_digest == convert(source, str(tmp_path / "again"), pseudonyms=key).content_digest
    assert convert(source, str(out), pseudonyms=key).already_there


def test_finished_runs_of_another_key_are_not_taken(tmp_path, key, memory_url):
    source = write_runs(tmp_path / "in", {f"sub-{label}_bold": bold(seed=n) for n, label in enumerate(LABELS)})
    interrupt(source, memory_url, after_runs=2, pseudonyms=key)
    other = write_key(tmp_path / "other", KEY[::-1])
    assert convert(source, memory_url, pseudonyms=other).resumed == 0


def test_an_update_needs_the_key(tmp_path, key, memory_url):
    runs = {f"sub-{label}_bold": bold(seed=n, shape=SHAPE) for n, label in enumerate(LABELS)}
    source = write_runs(tmp_path / "in", dict(list(runs.items())[:3]))
    first = convert(source, memory_url, pseudonyms=key)
    write_runs(tmp_path / "in", runs)
    with pytest.raises(UsageError, match="its subjects have pseudonyms; give --pseudonyms"):
        convert(source, memory_url, update="new")
    other = write_key(tmp_path / "other", KEY[::-1].hex().encode())
    with pytest.raises(UsageError, match="made with another key"):
        convert(source, memory_url, update="new", pseudonyms=other)
    assert fmristream.open(memory_url).content_digest == first.content_digest
    as_hex = write_key(tmp_path / "hex", KEY.hex().encode() + b"\n")
    assert convert(source, memory_url, update="new", pseudonyms=as_hex).added == 1
    assert set(fmristream.open(memory_url).runs.column("subject")) == {name_of(label) for label in LABELS}
    convert(source, f"{memory_url}-plain")
    with pytest.raises(UsageError, match="have their own labels; leave --pseudonyms out"):
        convert(source, f"{memory_url}-plain", pseudonyms=key)


def test_subjects_are_withdrawn_by_label_or_by_pseudonym(tmp_path, key, memory_url):
    runs = {f"sub-{label}_bold": bold(seed=n, shape=SHAPE) for n, label in enumerate(LABELS)}
    source = write_runs(tmp_path / "in", runs)
    convert(source, memory_url, pseudonyms=key)
    with pytest.raises(UsageError, match="a label of the source needs --pseudonyms"):
        fmristream.withdraw(memory_url, ["Anna7"])
    with pytest.raises(UsageError, match="made with another key"):
        fmristream.withdraw(memory_url, ["Anna7"], pseudonyms=write_key(tmp_path / "other", KEY[::-1]))
    assert fmristream.withdraw(memory_url, ["sub-Anna7"], pseudonyms=key).runs == 1
    assert fmristream.withdraw(memory_url, [name_of("BerndX")]).runs_left == 2
    report = convert(source, memory_url, pseudonyms=key, update="all")
    assert "2 runs belong to subjects that were withdrawn" in " ".join(report.warnings)
    assert set(fmristream.open(memory_url).runs.column("subject")) == {name_of(label) for label in LABELS[2:]}
    assert fmristream.open(memory_url).generation.document["pseudonyms"]["kind"] == "hmac-sha256"


def test_a_split_file_may_name_labels_or_pseudonyms(tmp_path, key, memory_url):
    source = write_runs(tmp_path / "in", {f"sub-{label}_bold": bold(seed=n) for n, label in enumerate(LABELS)})
    parts = dict(zip(LABELS, ("train", "val", "train", "test"), strict=True))
    lines = [f"{name_of(label) if label == 'Anna7' else label},{part}" for label, part in parts.items()]
    (tmp_path / "split.csv").write_text("\n".join(["subject,split", *lines]))
    convert(source, memory_url, pseudonyms=key, split=str(tmp_path / "split.csv"))
    dataset = fmristream.open(memory_url)
    assert {run.subject: run.split for run in dataset.runs} == {name_of(label): part for label, part in parts.items()}
    assert dataset.generation.document["split"] == {"kind": "file"}
    assert convert(source, memory_url, pseudonyms=key, split=str(tmp_path / "split.csv")).already_there
    (tmp_path / "split.csv").write_text("\n".join(["subject,split", *lines[1:]]))
    with pytest.raises(SplitError, match="does not name 1 of the subjects"):
        convert(source, f"{memory_url}-2", pseudonyms=key, split=str(tmp_path / "split.csv"))
    (tmp_path / "split.csv").write_text("\n".join(["subject,split", "Anna7,val", *lines]))
    with pytest.raises(SplitError, match="by label and by pseudonym, in two parts"):
        convert(source, f"{memory_url}-2", pseudonyms=key, split=str(tmp_path / "split.csv"))


def test_groups_have_pseudonyms_and_stay_together(tmp_path, key):
    names = {f"sub-{label}_bold": bold(seed=n, shape=SHAPE) for n, label in enumerate(LABELS)}
    source = write_runs(tmp_path / "in", names)
    rows = [f"{label}\tFam{n // 2}\t{n % 2}" for n, label in enumerate(LABELS)]
    table = tmp_path / "who.tsv"
    table.write_text("\n".join(["participant_id\tfamily\tsex", *rows]))
    phenotypes = fmristream_phenotypes(str(table), "family")
    out = tmp_path / "out"
    convert(source, str(out), pseudonyms=key, phenotypes=phenotypes)
    dataset = fmristream.open(str(out))
    groups = {run.subject: run.group for run in dataset.runs}
    assert groups == {name_of(label): name_of(f"Fam{n // 2}") for n, label in enumerate(LABELS)}
    assert {row["subject"]: row["family"] for row in dataset.participants} == groups
    names_nobody(out, "Fam0", "Fam1")


def fmristream_phenotypes(url: str | None, group_by: str | None):
    from fmristream.ingest.sources import Phenotypes

    return Phenotypes(url=url, group_by=group_by)


def test_runs_that_nothing_but_their_path_tells_apart_keep_names_of_their_own(tmp_path, key):
    runs = {f"John Smith/{name}": bold(seed=n, shape=SHAPE) for n, name in enumerate(("before", "after", "johnsmith"))}
    source = write_runs(tmp_path / "in", runs)
    out = tmp_path / "out"
    convert(source, str(out), pseudonyms=key)
    names_nobody(out, "smith", "before", "after")
    held = fmristream.open(str(out)).runs.column("name")
    assert len(set(held)) == 3
    assert all(name.startswith(f"sub-{name_of('John Smith')}_file-") for name in held)


def test_a_session_that_holds_its_subjects_label_is_refused(tmp_path, key, memory_url):
    source = write_runs(
        tmp_path / "in", {"sub-Anna7_ses-Anna7x_bold": bold(shape=SHAPE), "sub-Bo1_ses-2_bold": bold(shape=SHAPE)}
    )
    with pytest.raises(UsageError, match=r"a session label of subject p.* holds the subject's own label"):
        convert(source, memory_url, pseudonyms=key)


def test_a_session_that_several_subjects_have_tells_nothing(tmp_path, key, memory_url):
    runs = {f"sub-{subject}_ses-0001_bold": bold(shape=SHAPE) for subject in ("0001", "0002")}
    convert(write_runs(tmp_path / "in", runs), memory_url, pseudonyms=key)
    assert set(fmristream.open(memory_url).runs.column("session")) == {"0001"}
    assert contents(memory_url).keys() == {f"sub-{name_of(subject)}_ses-0001_bold" for subject in ("0001", "0002")}


def test_two_labels_with_one_pseudonym_are_an_error():
    require_different({"a": "p1", "b": "p2"})
    with pytest.raises(UsageError, match="two labels have the same pseudonym"):
        require_different({"a": "p1", "b": "p1"})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"short", "expected 32 random bytes"),
        (bytes(64), "expected 32 random bytes"),
        (b"ab" * 31, "expected 32"),
        (b"", "expected 32"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path, data, why):
    with pytest.raises(UsageError, match=why):
        read_key(write_key(tmp_path / "key", data))


def test_keys_from_elsewhere_from_the_dataset_or_nowhere_are_refused(tmp_path, key):
    with pytest.raises(UsageError, match="from a local file only"):
        read_key("s3://bucket/key")
    with pytest.raises(UsageError, match="cannot be read"):
        read_key(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="lies in the dataset"):
        read_key(key, target=str(tmp_path))
    with pytest.raises(UsageError, match="--header keep"):
        ConvertOptions(layout="volume", header="keep", pseudonyms=key)


def test_a_key_that_others_can_read_is_warned_of(tmp_path, key, memory_url):
    Path(key).chmod(0o640)
    source = write_runs(tmp_path / "in", {"sub-Anna7_bold": bold(shape=SHAPE)})
    assert any(
        "chmod 600" in line or "others than its owner" in line
        for line in convert(source, memory_url, pseudonyms=key).warnings
    )


def test_a_key_is_not_shown_and_not_sent():
    pseudonyms = Pseudonyms(KEY)
    assert KEY.hex() not in repr(pseudonyms)
    assert repr(KEY) not in repr(pseudonyms)
    with pytest.raises(TypeError, match="stays in the process"):
        pickle.dumps(pseudonyms)


def test_reasons_keep_what_is_wrong_and_lose_who_it_is_about(tmp_path):
    from fmristream.ingest.options import Quarantined

    run = SourceRun(key="in/Anna7/x.nii.gz", name="in/Anna7/x", url="/data/Anna7.zip!/in/x.nii.gz", subject="Anna7")
    found = Listing(kind="folder", root="/data", runs=(run,))
    names = Pseudonyms(KEY)
    listing = pseudonymised(found, names)
    labels = Labels(names, found, listing)
    (hidden,) = listing.runs

    def stored(reason: str) -> str:
        return labels.clean([Quarantined(name=hidden.name, reason=reason)])[0].reason

    assert stored(f"{hidden.key}: the data end in frame 3 of 7") == f"{hidden.key}: the data end in frame 3 of 7"
    assert stored("Anna7.zip: the zip directory lies: 3 bytes") == "(file): the zip directory lies: 3 bytes"
    assert stored("/elsewhere/sub-Anna7/x: is cut short") == "(file) is cut short"
    assert "not stored" in stored("written by anna7 herself")


def test_the_command_line_takes_the_key_everywhere(tmp_path, key, capsys):
    source = write_runs(tmp_path / "in", {f"sub-{label}_bold": bold(seed=n) for n, label in enumerate(LABELS)})
    out = str(tmp_path / "out")
    assert (
        main(["convert", source, out, "--mask", "none", "--split", "none", "--pseudonyms", key, "--workers", "1"]) == 0
    )
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"--pseudonyms {key}" in " ".join(said.split())
    assert main(["verify", out, "--against", source, "--pseudonyms", key]) == 0
    assert main(["withdraw", out, "--subject", "Anna7", "--pseudonyms", key]) == 0
    assert main(["info", out]) == 0
    assert "pseudonyms" in capsys.readouterr().out
    names_nobody(Path(out))


@pytest.mark.full
def test_workers_of_dask_get_no_key(tmp_path, key):
    source = telling_source(tmp_path / "in")
    out, one = tmp_path / "out", tmp_path / "one"
    report = convert(source, str(out), pseudonyms=key, mask="auto", workers=2)
    assert report.content_digest == convert(source, str(one), pseudonyms=key, mask="auto").content_digest
    names_nobody(out)


def test_listings_are_sorted_by_pseudonyms_so_that_order_tells_nothing(tmp_path):
    source = write_runs(tmp_path / "in", {f"sub-{label}_bold": bold(shape=SHAPE) for label in LABELS}, srow=AFFINE)
    listing = pseudonymised(find_runs(source), Pseudonyms(KEY))
    assert [run.subject for run in listing.runs] == sorted(name_of(label) for label in LABELS)
