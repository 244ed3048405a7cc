"""Damage to stored objects: every kind, every object."""

from pathlib import Path

import pytest

from fmristream.errors import FormatError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.findings import VerifyProgress
from fmristream.report.verify import verify
from tests.report.datasets import brain_like as brain
from tests.report.datasets import converted, files_of, flip_bit, recommit, two_runs, write_runs


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return two_runs(tmp_path)[1]


def test_an_untouched_dataset_is_sound_and_the_report_says_what_that_rests_on(dataset):
    report = verify(str(dataset))
    assert report.is_sound
    assert report.runs == 2
    assert report.chunks == 2 * 7
    # dataset.json and the generation are read to find the rest.
    named = [path for path in files_of(dataset) if path.name != "dataset.json" and path.parent.name != "generations"]
    assert report.objects == len(named)
    assert report.bytes == sum(path.stat().st_size for path in named)
    assert report.frames_decoded == report.voxels_compared == 0


def test_one_flipped_bit_in_any_object_is_a_fault_that_names_the_object(dataset):
    kinds = set()
    for path in files_of(dataset):
        restore = flip_bit(path)
        report = verify(str(dataset))
        restore()
        key = path.relative_to(dataset).as_posix()
        named = {fault.object for fault in report.faults}
        if path.parent.name == "generations":  # read before anything else, so the sentence names it
            assert key in report.faults[0].what
        else:
            assert key in named, key
        kinds.add(key.split("/")[0] if "runs/" not in key else "/".join(key.split("/")[2:]))
    assert {"dataset.json", "generations", "tables", "index", "spaces", "stats", "zarr.json"} <= kinds
    assert {"residual/c/0/0", "bold/c/0/0", "reference/c/0", "moments/c/0/0", "residual/zarr.json"} <= kinds
    assert verify(str(dataset)).is_sound


def test_any_deleted_object_is_a_fault_that_names_the_object(dataset):
    for path in files_of(dataset):
        if path.parent.name == "generations":
            continue
        data = path.read_bytes()
        path.unlink()
        report = verify(str(dataset))
        path.write_bytes(data)
        key = path.relative_to(dataset).as_posix()
        [fault] = [fault for fault in report.faults if fault.object == key]
        assert "missing" in fault.what


def test_a_lost_generation_is_never_a_sound_dataset(dataset):
    (dataset / "generations" / "1.json").unlink()
    assert not verify(str(dataset)).is_sound
    (dataset / "dataset.json").unlink()
    with pytest.raises(FormatError, match="no dataset here"):
        verify(str(dataset))


def test_a_truncated_or_longer_object_is_told_by_its_size(dataset):
    shard = next(dataset.rglob("residual/c/0/0"))
    data = shard.read_bytes()
    for changed in (data[:-1], data + b"\0"):
        shard.write_bytes(changed)
        [fault] = verify(str(dataset)).faults
        assert f"{len(changed)} bytes, {len(data)} were committed" in fault.what
        assert fault.run == "sub-1_bold"


def test_objects_larger_than_one_piece_are_digested_whole(tmp_path, monkeypatch):
    # The piece is a constant; a small one makes a small object large.
    monkeypatch.setattr("fmristream.report.objects.PIECE_BYTES", 100)
    source = write_runs(tmp_path / "source", {"run.nii": brain()})
    converted(source, tmp_path / "dataset")
    assert verify(str(tmp_path / "dataset")).is_sound
    shard = next((tmp_path / "dataset").rglob("residual/c/0/0"))
    flip_bit(shard)
    assert [fault.object for fault in verify(str(tmp_path / "dataset")).faults if "blake3" in fault.what]


def test_a_run_that_the_conversion_masked_has_its_own_mask_checked_too(tmp_path):
    url = tmp_path / "dataset"
    converted("synth://?subjects=2&shape=10x12x9&frames=6", url, ConvertOptions(split="none"))
    assert verify(str(url), deep=True).is_sound
    flip_bit(next(url.rglob("runs/*/mask/c/0")))
    assert any(fault.object.endswith("/mask/c/0") for fault in verify(str(url)).faults)


def test_tables_that_do_not_have_their_rows_are_a_fault(dataset):
    def lie(document):
        document["segments"][0]["runs"]["rows"] = 3

    recommit(dataset, document=lie)
    assert any("tables hold" in fault.what for fault in verify(str(dataset)).faults)


def test_tables_with_another_content_digest_are_a_fault(dataset):
    def lie(document):
        document["content_digest"] = "0" * 64

    recommit(dataset, document=lie)
    [fault] = verify(str(dataset)).faults
    assert "do not belong together" in fault.what


def test_progress_grows_to_its_total_in_every_stage(dataset, tmp_path):
    told: list[VerifyProgress] = []
    verify(str(dataset), deep=True, against=str(tmp_path / "source"), progress=told.append)
    stages = list(dict.fromkeys(now.stage for now in told))
    assert stages == [
        "checking tables", "checking objects", "checking indexes", "decoding", "comparing with the source",
    ]  # fmt: skip
    for stage in stages:
        done = [now.done for now in told if now.stage == stage]
        assert done == sorted(done)
        assert done[-1] == next(now.total for now in told if now.stage == stage)


def test_datasets_are_verified_wherever_they_lie(dataset_url):
    source = "synth://?subjects=2&shape=6x5x4&frames=5&kind=dummy"
    converted(source, dataset_url)
    report = verify(dataset_url, deep=True, against=source)
    assert report.is_sound, report.faults
    assert report.frames_cross_read == 6
    assert report.voxels_compared == 2 * 5 * 6 * 5 * 4
