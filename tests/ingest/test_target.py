"""What is looked at before a conversion writes anything, and what a second one notices."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.errors import StorageError, UsageError
from fmristream.ingest.convert import convert_into
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.run_stream import quick_fingerprint
from fmristream.ingest.sources import find_runs
from fmristream.ingest.target import require_writable
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, convert, six_runs, write_runs
from tests.ingest.nifti_files import nifti_bytes
from tests.ingest.reading import as_run, read
from tests.stream.stores import PassingStore

OPTIONS = ConvertOptions(split="none", space="MNI")


def block_gzip(data: bytes, *, block: int = 8_000) -> bytes:
    """gzip as bgzip writes it: many members, the last one empty; uncompressed, so that a change keeps the size."""
    pieces = [data[i : i + block] for i in range(0, len(data), block)]
    return b"".join(gzip.compress(piece, compresslevel=0, mtime=0) for piece in [*pieces, b""])


def test_a_changed_file_whose_last_gzip_member_is_empty_is_another_file(tmp_path: Path) -> None:
    stored = bold(shape=(8, 8, 8, 20))
    first, second = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    first.write_bytes(block_gzip(nifti_bytes(stored)))
    second.write_bytes(block_gzip(nifti_bytes(stored + 5)))
    assert first.stat().st_size == second.stat().st_size
    one, other = (quick_fingerprint(as_run(path)) for path in (first, second))
    assert one.crc != other.crc
    assert (one, other) == (read(first)[2], read(second)[2])  # what the stream says at its end is the same


def test_an_empty_source_is_not_the_current_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the source is empty"):
        fmristream.convert("  ", str(tmp_path / "out"))


def test_a_folder_with_other_things_in_it_is_no_target_not_even_the_source(tmp_path: Path) -> None:
    source = six_runs(tmp_path / "in")
    before = sorted(os.listdir(source))
    with pytest.raises(UsageError, match="holds other things"):
        fmristream.convert(source, source, options=OPTIONS)
    assert sorted(os.listdir(source)) == before


def test_a_target_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    source = six_runs(tmp_path / "in")
    (tmp_path / "file").write_text("not a folder")
    stages: list[str] = []
    with pytest.raises(StorageError, match="cannot be written"):
        fmristream.convert(
            source, str(tmp_path / "file"), options=OPTIONS, progress=lambda now: stages.append(now.stage)
        )
    assert set(stages) == {"reading headers"}


class OverwritingStore(PassingStore):
    """A store without exclusive creation: whoever comes last wins."""

    def put_new(self, key: str, data: bytes) -> None:
        self.inner.replace_hint(key, data)


def test_a_store_that_overwrites_is_found_out_at_the_start(memory_url: str, tmp_path: Path) -> None:
    inner = open_store(memory_url)
    with pytest.raises(StorageError, match="overwrites objects"):
        convert_into(six_runs(tmp_path / "in"), OverwritingStore(inner), options=OPTIONS)
    assert inner.list("tmp") == []
    require_writable(inner)
    assert inner.list("tmp") == []


def bids(folder: Path, sex: str) -> str:
    runs = {f"sub-{n}/func/sub-{n}_task-rest_bold": bold(seed=n) for n in (1, 2)}
    write_runs(folder, runs)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    (folder / "participants.tsv").write_text(f"participant_id\tsex\nsub-1\t{sex}\nsub-9\tF\n")
    return str(folder)


def test_a_second_conversion_notices_another_participants_table(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    report = convert(bids(tmp_path / "in", "F"), url, mask="none", split="none")
    assert any("1 of 2 subjects have no row" in warning for warning in report.warnings)
    assert convert(bids(tmp_path / "in", "F"), url, mask="none", split="none").already_there
    with pytest.raises(UsageError, match="another participants table"):
        convert(bids(tmp_path / "in", "M"), url, mask="none", split="none")


def test_a_file_reached_by_two_folders_is_taken_by_the_real_one(tmp_path: Path) -> None:
    write_runs(tmp_path / "in" / "zz", {"sub-1_bold": bold()})
    (tmp_path / "in" / "aa").symlink_to(tmp_path / "in" / "zz")
    assert [run.key for run in find_runs(str(tmp_path / "in")).runs] == ["zz/sub-1_bold.nii.gz"]


def test_float64_means_beyond_float32_are_masked_without_a_warning(tmp_path: Path) -> None:
    stored = np.full((12, 12, 12, 4), 1e300)
    report = convert(write_runs(tmp_path / "in", {"sub-1_bold": stored}), str(tmp_path / "out"), split="none")
    assert report.runs == 1
