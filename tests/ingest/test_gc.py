"""Removing what no version needs robs nobody: not who reads, not who converts at the same moment."""

import json

import boto3
import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import ConflictError, FormatError, UsageError
from fmristream.ingest import gc as gc_module
from fmristream.ingest.convert import convert_into
from fmristream.ingest.options import ConvertOptions
from fmristream.report.verify import verify
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, convert, stored, write_runs

FIRST = {"sub-1_bold": bold(shape=(3, 4, 3, 3)), "sub-2_bold": bold("f4", seed=1, shape=(3, 4, 3, 2))}
OPTIONS = ConvertOptions(mask="none", split="none", space="MNI")


def interrupted(source: str, url: str, *, after: int = 1, **options) -> None:
    """A conversion that stops when some runs are done."""

    def stop(now):
        if now.stage == "converting" and now.runs_done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fmristream.convert(
            source, url, options=ConvertOptions(mask="none", split="none", space="MNI", **options), progress=stop
        )


def test_what_an_interrupted_update_left_is_removed_and_every_version_stays_whole(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    first = convert(source, dataset_url)
    kept = set(stored(dataset_url))
    write_runs(tmp_path / "in", {"sub-3_bold": bold(seed=3, shape=(3, 4, 3, 2))})
    interrupted(source, dataset_url, update="new")
    assert set(stored(dataset_url)) - kept
    would = fmristream.gc(dataset_url, dry_run=True)
    report = fmristream.gc(dataset_url)
    assert report.objects == would.objects > 0
    assert report.bytes > 0
    assert set(stored(dataset_url)) - kept == {"generations/2.json", report.receipt}
    assert fmristream.open(dataset_url).content_digest == first.content_digest
    assert verify(dataset_url, deep=True).is_sound
    assert fmristream.gc(dataset_url).objects == 0
    assert convert(source, dataset_url, update="new").added == 1


def test_older_versions_go_on_request_and_their_pins_are_named(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, dataset_url)
    old = fmristream.open(dataset_url)
    assert len(old.runs) == 2
    write_runs(tmp_path / "in", {"sub-1_bold": bold(seed=9, shape=(3, 4, 3, 3))})
    convert(source, dataset_url, update="all")
    assert fmristream.gc(dataset_url).objects == 0, "both versions may be pinned"
    report = fmristream.gc(dataset_url, keep=1)
    assert [one.generation_digest for one in report.versions] == [old.generation_digest]
    assert not any(key.startswith(old.run("sub-1_bold").object) for key in stored(dataset_url))
    assert any(key.startswith(old.run("sub-2_bold").object) for key in stored(dataset_url))
    assert verify(dataset_url, deep=True).is_sound
    assert contents(dataset_url).keys() == FIRST.keys()


def test_a_conversion_that_runs_meanwhile_is_not_robbed(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, dataset_url)
    write_runs(tmp_path / "in", {f"sub-{n}_bold": bold(seed=n, shape=(3, 4, 3, 2)) for n in (3, 4, 5)})
    collected = []

    def collect(now):
        if now.stage == "converting" and now.runs_done == 2 and not collected:
            collected.append(fmristream.gc(dataset_url))

    options = ConvertOptions(mask="none", split="none", space="MNI", update="new")
    with pytest.raises(ConflictError, match="unused objects were removed while this conversion ran"):
        fmristream.convert(source, dataset_url, options=options, progress=collect)
    assert collected[0].objects > 0
    assert verify(dataset_url, deep=True).is_sound
    report = convert(source, dataset_url, update="new")
    assert (report.added, report.resumed) == (3, 0), "what was recorded before is not trusted"
    assert verify(dataset_url, deep=True, against=source, space="MNI").is_sound


def test_a_first_conversion_that_nobody_committed_yet_is_left_alone(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    interrupted(source, dataset_url)
    before = stored(dataset_url)
    with pytest.raises(FormatError, match="no dataset here"):
        fmristream.gc(dataset_url)
    assert stored(dataset_url) == before
    assert convert(source, dataset_url).resumed == 1


def test_a_version_that_is_committed_while_objects_are_listed_is_seen(tmp_path, memory_url, monkeypatch):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, memory_url)
    write_runs(tmp_path / "in", {"sub-3_bold": bold(seed=3, shape=(3, 4, 3, 2))})
    commit = gc_module._commit_barrier
    calls = []

    def late(store, newest):
        if not calls:
            calls.append(convert_into(source, open_store(memory_url), options=ConvertOptions(
                mask="none", split="none", space="MNI", update="new")))  # fmt: skip
        return commit(store, newest)

    interrupted(source, memory_url, update="new", after=0)
    open_store(memory_url).put_new("runs/garbage.zarr/zarr.json", b"{}")
    monkeypatch.setattr(gc_module, "_commit_barrier", late)
    fmristream.gc(memory_url)
    assert len(fmristream.open(memory_url).runs) == 3
    assert verify(memory_url, deep=True).is_sound
    assert "runs/garbage.zarr/zarr.json" not in stored(memory_url)


def test_the_receipt_says_what_went_and_names_nobody(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, memory_url)
    write_runs(tmp_path / "in", {"sub-1_bold": bold(seed=9, shape=(3, 4, 3, 3))})
    convert(source, memory_url, update="all")
    before = set(stored(memory_url))
    report = fmristream.gc(memory_url, keep=1)
    receipt = stored(memory_url)[report.receipt]
    assert set(json.loads(receipt)["objects"]) == before - set(stored(memory_url))
    assert b"sub-" not in receipt


def test_foreign_objects_below_the_root_are_not_touched(tmp_path, memory_url):
    convert(write_runs(tmp_path / "in", FIRST), memory_url)
    store = open_store(memory_url)
    for key in ("notes/a.txt", "runs/old.zarr/zarr.json"):
        store.put_new(key, b"1")
    fmristream.gc(memory_url)
    assert "notes/a.txt" in stored(memory_url)
    assert "runs/old.zarr/zarr.json" not in stored(memory_url)


def test_keeping_no_version_is_refused(memory_url):
    with pytest.raises(UsageError, match="--keep 0"):
        fmristream.gc(memory_url, keep=0)


@pytest.fixture
def client(s3_endpoint):
    client = boto3.session.Session().client("s3")
    yield client
    client.close()


def begin_upload(client, url: str, key: str) -> str:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return str(client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")["UploadId"])


def test_uploads_that_a_killed_conversion_left_are_aborted_and_later_and_foreign_ones_are_not(
    tmp_path, s3_url, client, monkeypatch
):
    convert(write_runs(tmp_path / "in", FIRST), s3_url)
    begin_upload(client, s3_url, "runs/left.zarr/c/0/0")
    others = {begin_upload(client, s3_url, "notes/of-somebody"), begin_upload(client, f"{s3_url}-2", "runs/a/c/0/0")}
    commit = gc_module._commit_barrier

    def late(store, newest):
        others.add(begin_upload(client, s3_url, "runs/under-way.zarr/c/0/0"))
        return commit(store, newest)

    monkeypatch.setattr(gc_module, "_commit_barrier", late)
    assert fmristream.gc(s3_url, dry_run=True).uploads == 1
    report = fmristream.gc(s3_url)
    assert (report.objects, report.uploads, report.warnings) == (0, 1, ())
    left = {one.upload for url in (s3_url, f"{s3_url}-2") for one in open_store(url).unfinished()}
    assert left == others
    assert verify(s3_url, deep=True).is_sound


@pytest.mark.parametrize("status", ["Enabled", "Suspended"])
def test_where_the_bucket_keeps_versions_purging_says_that_they_remain(tmp_path, client, capsys, status):
    bucket = f"keeps-{status.lower()}"
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})
    url = f"s3://{bucket}/data"
    convert(write_runs(tmp_path / "in", FIRST), url)
    fmristream.withdraw(url, ["1"])
    assert main(["gc", url, "--purge"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the bucket keeps old versions of removed objects, among them those of withdrawn subjects" in said
