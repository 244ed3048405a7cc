"""A dataset keeps the digest of bulk data that it was made with: older ones, which have sha256, too."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from blake3 import blake3

import fmristream
from fmristream.errors import CorruptDataError, StorageError, UsageError
from fmristream.ingest import convert as convert_module
from fmristream.ingest.commit import Addition, commit_addition
from fmristream.ingest.convert import convert
from fmristream.ingest.gc import gc
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.withdraw import withdraw
from fmristream.report.verify import verify
from fmristream.shards.dataset import Dataset, open_dataset
from fmristream.shards.hashing import SHA256
from fmristream.storage import open_store
from tests.ingest.nifti_files import bold_like
from tests.report.datasets import SHAPE, WHOLE, brain_like, write_runs

FUNCTIONS = {"sha256": hashlib.sha256, "blake3": blake3}
NEW = ConvertOptions(mask="none", split="none", update="new")
VOLUMES = ConvertOptions(mask="none", split="none", layout="volume")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    runs = {"sub-1_bold.nii.gz": brain_like(), "sub-2_bold.nii": bold_like(SHAPE, "f4")}
    return write_runs(tmp_path / "source", runs)


@pytest.fixture
def old(source: Path, tmp_path: Path, monkeypatch) -> Path:
    """A dataset as releases made it that knew no other digest."""
    with monkeypatch.context() as before:
        before.setattr(convert_module, "NEW_BULK_DIGEST", SHA256)
        convert(str(source), str(tmp_path / "old"), options=WHOLE)
    return tmp_path / "old"


def digests_of(url: Path) -> set[str]:
    """Names of the functions that give the digests of all objects of runs, found by trying; of attributes and columns."""
    dataset = open_dataset(str(url))
    found = set()
    for segment in dataset.generation.document["segments"]:
        for row in pq.read_table(url / segment["arrays"]["key"]).to_pylist():
            for file in row["files"]:
                (column,) = file.keys() - {"name", "bytes"}
                data = (url / row["object"] / file["name"]).read_bytes()
                (name,) = [name for name, of in FUNCTIONS.items() if of(data).digest().startswith(file[column])]
                assert column == f"{name}_prefix"
                found.add(name)
    for run in dataset.runs:
        told = zarr.open_group(url / run.object, mode="r").attrs["fmristream"]
        found.add(told.get("bulk_digest", "sha256"))
    return found


def test_new_datasets_have_blake3_and_say_so_to_readers_that_cannot_know_it(source, tmp_path):
    for name, options in (("voxels", WHOLE), ("volume", VOLUMES)):
        convert(str(source), str(tmp_path / name), options=options)
        document = fmristream.open(str(tmp_path / name)).generation.document
        assert (document["bulk_digest"], document["requires"]) == ("blake3", ["blake3"])
        assert digests_of(tmp_path / name) == {"blake3"}
        assert verify(str(tmp_path / name), deep=True, against=str(source)).is_sound


def test_an_old_dataset_verifies_grows_and_shrinks_and_keeps_its_digest(old, source):
    before = open_dataset(str(old))
    assert digests_of(old) == {"sha256"}
    assert verify(str(old), deep=True, against=str(source)).is_sound
    write_runs(source, {"sub-3_bold.nii": bold_like(SHAPE, "f4", seed=3)})
    assert convert(str(source), str(old), options=NEW).added == 1
    assert digests_of(old) == {"sha256"}
    assert verify(str(old), deep=True, against=str(source)).is_sound
    withdraw(str(old), ["2"])
    gc(str(old))
    after = open_dataset(str(old))
    assert [run.subject for run in after.runs] == ["1", "3"]
    for dataset in (before, after):
        assert "bulk_digest" not in dataset.generation.document
        assert dataset.generation.document["requires"] == []
    assert digests_of(old) == {"sha256"}
    assert verify(str(old), deep=True).is_sound


def test_a_new_dataset_keeps_its_digest_as_well(source, tmp_path):
    url = tmp_path / "new"
    convert(str(source), str(url), options=WHOLE)
    write_runs(source, {"sub-3_bold.nii": bold_like(SHAPE, "f4", seed=3)})
    convert(str(source), str(url), options=NEW)
    withdraw(str(url), ["2"])
    gc(str(url))
    document = open_dataset(str(url)).generation.document
    assert (document["bulk_digest"], document["requires"]) == ("blake3", ["blake3"])
    assert digests_of(url) == {"blake3"}
    assert verify(str(url), deep=True).is_sound


def test_both_hold_the_same_values_under_digests_of_their_own(old, source, tmp_path):
    convert(str(source), str(tmp_path / "new"), options=WHOLE)
    one, other = fmristream.open(str(old)), fmristream.open(str(tmp_path / "new"))
    for run in one.runs:
        np.testing.assert_array_equal(one.read(run.name), other.read(run.name))
    assert not set(one.runs.column("digest")) & set(other.runs.column("digest"))
    assert one.content_digest != other.content_digest


def test_a_run_that_was_finished_with_another_digest_is_converted_again(source, tmp_path, monkeypatch):
    url = tmp_path / "dataset"

    def dies(*args: object) -> None:
        raise StorageError("the machine went down")

    with monkeypatch.context() as before:
        before.setattr(convert_module, "NEW_BULK_DIGEST", SHA256)
        before.setattr(convert_module, "commit_addition", dies)
        with pytest.raises(StorageError):
            convert(str(source), str(url), options=WHOLE)
    report = convert(str(source), str(url), options=WHOLE)
    assert report.resumed == 0
    assert digests_of(url) == {"blake3"}
    assert verify(str(url), deep=True).is_sound


def test_runs_of_another_digest_never_join_a_dataset(old):
    base = open_dataset(str(old))
    addition = Addition(
        converted=(), split={}, mask={}, parameters=base.parameters, headers={}, codec={}, bulk_digest="blake3"
    )
    with pytest.raises(UsageError, match="sha256 digests, those that were converted now blake3"):
        commit_addition(base.store, base, addition)
    assert open_dataset(str(old)).generation.number == 1


def test_a_generation_that_names_another_digest_than_its_tables_is_damage(old):
    """Whoever forges it: digests of one kind are never compared with those of another."""
    present = open_dataset(str(old))
    from fmristream.shards.generation import commit

    own = {"digest", "format", "generation", "parent", "requires", "tool", "version", "write_id"}
    content = {name: value for name, value in present.generation.document.items() if name not in own}
    commit(open_store(str(old)), number=2, parent=None, write_id="x", content={**content, "bulk_digest": "blake3"})
    lying: Dataset = open_dataset(str(old))
    with pytest.raises(CorruptDataError, match="sha256_prefix in files, not blake3_prefix"):
        lying.read(0)
    assert not verify(str(old)).is_sound


def test_the_hint_and_tables_can_be_checked_without_blake3(source, tmp_path):
    """Documents and tables have sha256 in every dataset."""
    convert(str(source), str(tmp_path / "new"), options=WHOLE)
    document = json.loads((tmp_path / "new/generations/1.json").read_bytes())
    entries = [entry for segment in document["segments"] for entry in segment.values()]
    entries += [{**file, "key": file["name"]} for space in document["spaces"].values() for file in space["objects"]]
    assert len(entries) > 3
    for entry in entries:
        data = (tmp_path / "new" / entry["key"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
