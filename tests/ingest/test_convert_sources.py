"""Whole conversions from archives, web servers, buckets, tables: the same dataset as from the same files in a folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import SplitError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources import EntityFilter, Phenotypes, SourceRun
from fmristream.ingest.splitting import split_subjects
from fmristream.report.verify import verify
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, convert
from tests.ingest.nifti_files import gzip_members, nifti_bytes
from tests.ingest.source_trees import MASK, RAW, make
from tests.storage.archives import tar_bytes, zip_bytes
from tests.storage.web_server import web_server

SHAPE = (3, 4, 2, 6)


def bids(subjects: int = 3) -> dict[str, bytes]:
    files = {key: text.encode() for key, text in RAW.items()}
    for n in range(subjects):
        stem = f"sub-{n:02d}/func/sub-{n:02d}_task-rest_bold.nii.gz"
        files[stem] = gzip_members(nifti_bytes(bold(seed=n, shape=SHAPE)))
    files["sub-00/func/sub-00_task-nback_bold.nii"] = nifti_bytes(bold("f4", seed=9, shape=SHAPE))
    return files


@pytest.mark.parametrize("name", ["a.zip", "stored.zip", "a.tar", "a.tar.gz"])
def test_an_archive_converts_to_what_its_files_convert_to(tmp_path: Path, name: str) -> None:
    files = bids()
    folder = convert(make(tmp_path / "folder", files), str(tmp_path / "from folder"))
    packed = {
        "a.zip": lambda: zip_bytes(files),
        "stored.zip": lambda: zip_bytes(files, method=0),
        "a.tar": lambda: tar_bytes(files),
        "a.tar.gz": lambda: tar_bytes(files, compressed=True),
    }[name]()
    root = make(tmp_path / "packed", {name: packed})
    report = convert(f"{root}/{name}", str(tmp_path / "out"))
    assert report.content_digest == folder.content_digest
    assert report.quarantined == ()
    assert convert(f"{root}/{name}", str(tmp_path / "out")).already_there
    found = verify(str(tmp_path / "out"), deep=True, against=f"{root}/{name}")
    assert (found.faults, found.runs_compared) == ((), 4)


def test_one_flipped_bit_in_a_zip_quarantines_its_run_and_converts_the_others(tmp_path: Path) -> None:
    files = bids()
    packed = bytearray(zip_bytes(files, method=0))
    # In the float run's voxels: the file itself has no checksum, the archive has.
    place = bytes(packed).index(files["sub-00/func/sub-00_task-nback_bold.nii"]) + 400
    packed[place] ^= 4
    report = convert(make(tmp_path / "in", {"a.zip": bytes(packed)}) + "/a.zip", str(tmp_path / "out"))
    assert report.exit_code == 3
    assert [q.name for q in report.quarantined] == ["sub-00_task-nback_bold"]
    assert "crc32" in report.quarantined[0].reason
    assert str(tmp_path) not in report.quarantined[0].reason
    assert report.runs == 3


def test_an_interrupted_conversion_of_an_archive_goes_on_where_it_was(tmp_path: Path) -> None:
    archive = make(tmp_path / "in", {"a.zip": zip_bytes(bids())}) + "/a.zip"
    seen = []

    def stop(now) -> None:
        seen.append(now)
        if now.stage == "converting" and now.runs_done == 2:
            raise KeyboardInterrupt

    options = ConvertOptions(mask="none", split="none")
    with pytest.raises(KeyboardInterrupt):
        fmristream.convert(archive, str(tmp_path / "out"), options=options, progress=stop)
    report = fmristream.convert(archive, str(tmp_path / "out"), options=options)
    assert report.resumed >= 2
    whole = fmristream.convert(archive, str(tmp_path / "other"), options=options)
    assert report.content_digest == whole.content_digest


def test_zips_in_a_bucket_are_read_by_ranges_and_only_those_that_are_looked_for(tmp_path: Path, s3_url: str) -> None:
    inside = {
        "fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz": gzip_members(nifti_bytes(bold(shape=SHAPE))),
        "fMRI/rfMRI.ica/mask.nii.gz": gzip_members(MASK),
    }
    store = open_store(s3_url)
    for eid in ("1000001", "1000002"):
        store.put_new(f"{eid}_20227_2_0.zip", zip_bytes(inside))
    store.put_new("1000001_20252_2_0.zip", b"not looked into")
    report = convert(s3_url, str(tmp_path / "out"), mask="auto")
    assert (report.source_kind, report.runs, report.subjects, report.quarantined) == ("ukb", 2, 2, ())
    local = convert(
        make(tmp_path / "in", {f"{eid}_20227_2_0.zip": zip_bytes(inside) for eid in ("1000001", "1000002")}),
        str(tmp_path / "local"),
        mask="auto",
    )
    assert report.content_digest == local.content_digest


def test_a_table_of_urls_converts_without_a_local_copy_whatever_the_server_can(tmp_path: Path) -> None:
    files = {key.rpartition("/")[2]: data for key, data in bids().items() if ".nii" in key}
    folder = convert(make(tmp_path / "folder", files), str(tmp_path / "from folder"))
    with web_server() as web:
        web.files = {f"/{name}?X-Amz-Signature=secret": data for name, data in files.items()}
        rows = [f"{web.url}/{name}?X-Amz-Signature=secret,{name[4:6]},{name[12:].partition('_')[0]}" for name in files]
        (tmp_path / "runs.csv").write_text("\n".join(["url,subject,task", *rows]) + "\n")
        for ranges in (True, False):
            web.ranges = ranges
            report = convert(str(tmp_path / "runs.csv"), str(tmp_path / f"out {ranges}"))
            assert (report.runs, report.quarantined) == (4, ())
            assert [run.digest for run in fmristream.open(str(tmp_path / f"out {ranges}")).runs] == [
                run.digest for run in fmristream.open(str(tmp_path / "from folder")).runs
            ]
        single = f"{web.url}/{next(iter(files))}?X-Amz-Signature=secret"
        assert convert(single, str(tmp_path / "single")).runs == 1
    assert folder.runs == 4
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "runs.csv")
    assert b"X-Amz" not in stored
    assert b"127.0.0.1" not in stored


def family_cohort(tmp_path: Path, subjects: int = 40) -> tuple[str, dict[str, str]]:
    tiny = {f"s{n:02d}/rest.nii": nifti_bytes(bold(seed=n, shape=(3, 3, 3, 2))) for n in range(subjects)}
    families = {f"s{n:02d}": f"F{n // 4}" if n % 5 else "" for n in range(subjects)}
    table = "subject,family,site\n" + "".join(f"{s},{f},{int(s[1:]) % 3}\n" for s, f in families.items())
    return make(tmp_path / "in", {**tiny, "about.csv": table}), families


@pytest.mark.parametrize("split", ["hash", "exact", "auto"])
def test_no_family_is_divided_by_a_split(split: str) -> None:
    def divided(runs: list[SourceRun]) -> int:
        parts, _ = split_subjects(runs, ConvertOptions(split=split))
        assert set(parts.values()) == {"train", "val", "test"}
        found: dict[str, set[str]] = {}
        for n in range(60):
            found.setdefault(f"F{n // 4}", set()).add(parts[f"s{n}"])
        return sum(len(family) > 1 for family in found.values())

    runs = [SourceRun(key=f"{n}.nii", name=str(n), url="", subject=f"s{n}", group=f"F{n // 4}") for n in range(60)]
    assert divided(runs) == 0
    assert divided([replace(run, group="") for run in runs]) > 0


def test_groups_are_stored_and_keep_their_part(tmp_path: Path, memory_url: str) -> None:
    source, families = family_cohort(tmp_path, 12)
    convert(source, memory_url, split="exact", phenotypes=Phenotypes(url=f"{source}/about.csv", group_by="family"))
    runs = fmristream.open(memory_url).runs
    assert {run.subject: run.group for run in runs} == {subject: families[subject] or subject for subject in families}
    assert len({(run.group, run.split) for run in runs}) == len({run.group for run in runs})


def test_other_groups_are_another_dataset(tmp_path: Path) -> None:
    source, _ = family_cohort(tmp_path, 5)
    by_family = Phenotypes(url=f"{source}/about.csv", group_by="family")
    convert(source, str(tmp_path / "out"), phenotypes=by_family)
    assert convert(source, str(tmp_path / "out"), phenotypes=by_family).already_there
    with pytest.raises(UsageError, match="other groups"):
        convert(source, str(tmp_path / "out"), phenotypes=Phenotypes(url=f"{source}/about.csv", group_by="site"))


def test_a_given_split_that_divides_a_family_is_refused(tmp_path: Path) -> None:
    source, families = family_cohort(tmp_path, 8)
    rows = "".join(f"{subject},{('train', 'val', 'test')[place % 3]}\n" for place, subject in enumerate(families))
    (tmp_path / "parts.csv").write_text("subject,split\n" + rows)
    about = Phenotypes(url=f"{source}/about.csv", group_by="family")
    with pytest.raises(SplitError, match="has group F0 in"):
        convert(source, str(tmp_path / "out"), split=str(tmp_path / "parts.csv"), phenotypes=about)


def test_the_split_of_a_table_is_followed_unless_another_is_asked_for(tmp_path: Path) -> None:
    _, families = family_cohort(tmp_path, 9)
    parts = {subject: ("train", "val", "test")[place % 3] for place, subject in enumerate(families)}
    rows = "".join(f"in/{subject}/rest.nii,{subject},{part}\n" for subject, part in parts.items())
    (tmp_path / "runs.csv").write_text("path,subject,split\n" + rows)
    convert(str(tmp_path / "runs.csv"), str(tmp_path / "out"), split="auto")
    assert {run.subject: run.split for run in fmristream.open(str(tmp_path / "out")).runs} == parts
    convert(str(tmp_path / "runs.csv"), str(tmp_path / "none"), split="none")
    assert {run.split for run in fmristream.open(str(tmp_path / "none")).runs} == {""}
    (tmp_path / "runs.csv").write_text("path,subject,split\n" + rows.replace(",train", ",", 1))
    with pytest.raises(SplitError, match="does not name 1"):
        convert(str(tmp_path / "runs.csv"), str(tmp_path / "gap"), split="auto")


def test_the_command_line_chooses_joins_and_verifies_with_the_same_words(tmp_path: Path, capsys) -> None:
    source = make(tmp_path / "in", bids())
    (tmp_path / "about.tsv").write_text("who\tage\tsite\n00\t30\tA\n01\t40\tB\n02\t50\tA\n")
    out = str(tmp_path / "out")
    chosen = ["--task", "rest", "--subject", "00", "--subject", "02"]
    about = ["--participants", str(tmp_path / "about.tsv"), "--subject-column", "who", "--group-by", "site"]
    assert main(["convert", source, out, "--mask", "none", "--split", "none", *chosen, *about]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "1 of its 3 subjects have no run" in shown
    assert "--subject 00 --subject 02 --task rest" in shown
    dataset = fmristream.open(out)
    assert [(run.subject, run.group) for run in dataset.runs] == [("00", "A"), ("02", "A")]
    assert [row["age"] for row in dataset.participants] == [30.0, 50.0]
    assert main(["verify", out, "--against", source, *chosen]) == 0
    capsys.readouterr()
    assert main(["convert", source, str(tmp_path / "x"), "--task", "rets"]) == 2
    assert "there are nback (1), rest (3)" in capsys.readouterr().err.replace("\n", " ")
    assert (
        main(["convert", source, str(tmp_path / "y"), "--dry-run", "--json", "--split", "none", "--task", "nback"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["runs"] == 1


def test_labels_choose_what_is_stored(tmp_path: Path) -> None:
    report = convert(make(tmp_path / "in", bids()), str(tmp_path / "out"), entities=EntityFilter(task=("nback",)))
    assert (report.runs, len(report.not_chosen), report.exit_code) == (1, 3, 0)
