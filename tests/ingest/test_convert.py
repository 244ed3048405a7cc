"""A conversion as a whole: the same digest however it is done, bad inputs left out by name, nothing half done."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fmristream
from fmristream.errors import FormatError, SourceError, UsageError
from fmristream.ingest import convert as convert_module
from fmristream.ingest import options as options_module
from fmristream.ingest.options import ConvertOptions, Progress
from tests.ingest.cohorts import bold, contents, convert, objects, six_runs, stored_bytes_of, write_runs
from tests.ingest.nifti_files import gzip_members, nifti_bytes

SYNTH = "synth://?subjects=4&runs=2&shape=8x9x7&frames=25&seed=3"
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [1, 2])
def test_every_stored_value_comes_back_bit_for_bit(tmp_path, dtype, version):
    info = None if dtype.startswith("f") else np.iinfo(dtype)
    stored = bold(dtype)
    if info is not None:
        stored[1] = np.random.default_rng(1).integers(info.min, info.max, stored[1].shape, stored.dtype, endpoint=True)
    else:
        stored[1, 1, 1, :4] = (np.nan, np.inf, -np.inf, -0.0)
    source = write_runs(tmp_path / "in", {"sub-1_bold": stored}, version=version, order=">", scl_slope=0.5)
    convert(source, str(tmp_path / "out"))
    assert contents(str(tmp_path / "out")) == {"sub-1_bold": stored_bytes_of(stored)}


@settings(max_examples=20)
@given(
    frames=st.integers(1, 40),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    dtype=st.sampled_from(("i2", "u1", "f4")),
    seed=st.integers(0, 99),
)
def test_runs_of_any_size_convert_even_one_voxel_and_one_frame(tmp_path_factory, frames, shape, dtype, seed):
    folder = tmp_path_factory.mktemp("run")
    stored = bold(dtype, seed=seed, shape=(*shape, frames))
    convert(write_runs(folder / "in", {"sub-1_bold": stored}), str(folder / "out"))
    assert contents(str(folder / "out")) == {"sub-1_bold": stored_bytes_of(stored)}


@pytest.mark.parametrize("value", [0, 7, -32768])
def test_a_run_without_any_change_converts(tmp_path, value):
    stored = np.full((4, 5, 6, 18), value, dtype="<i2")
    report = convert(write_runs(tmp_path / "in", {"sub-1_bold": stored}), str(tmp_path / "out"))
    assert report.exit_code == 0
    assert contents(str(tmp_path / "out")) == {"sub-1_bold": stored_bytes_of(stored)}
    assert fmristream.open(str(tmp_path / "out")).reader(0).moments[1].max() == 0


def test_a_run_without_a_single_finite_value_converts(tmp_path):
    stored = np.full((3, 3, 3, 5), np.nan, dtype="<f4")
    convert(write_runs(tmp_path / "in", {"sub-1_bold": stored}), str(tmp_path / "out"))
    assert fmristream.open(str(tmp_path / "out")).runs[0].nonfinite == stored.size


def test_two_conversions_of_the_same_have_one_content_and_two_generations(tmp_path):
    source = six_runs(tmp_path / "in")
    one, other = (convert(source, str(tmp_path / name)) for name in ("a", "b"))
    assert one.content_digest == other.content_digest
    assert one.generation_digest != other.generation_digest
    runs = [fmristream.open(str(tmp_path / name)).runs for name in ("a", "b")]
    assert [run.digest for run in runs[0]] == [run.digest for run in runs[1]]
    assert not {run.object for run in runs[0]} & {run.object for run in runs[1]}


def test_gzip_levels_members_and_byte_order_of_the_source_do_not_change_the_content(tmp_path):
    stored = bold()
    digests = set()
    for number, (data, suffix) in enumerate(
        [
            (nifti_bytes(stored), ".nii"),
            (gzip_members(nifti_bytes(stored, order=">"), level=9), ".nii.gz"),
            (gzip_members(nifti_bytes(stored), cuts=(100, 3000)), ".nii.gz"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"sub-1_bold{suffix}").write_bytes(data)
        digests.add(convert(str(folder), str(tmp_path / f"out-{number}")).content_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("mask", ["none", "auto"])
def test_the_order_of_the_listing_does_not_change_the_digest(tmp_path, monkeypatch, mask):
    source = six_runs(tmp_path / "in")
    whole_listing = convert_module.find_runs
    expected = convert(source, str(tmp_path / "sorted"), mask=mask).content_digest

    def shuffled(*args, **kwargs):
        listing = whole_listing(*args, **kwargs)
        return replace(listing, runs=tuple(random.Random(4).sample(listing.runs, len(listing.runs))))

    monkeypatch.setattr(convert_module, "find_runs", shuffled)
    assert convert(source, str(tmp_path / "shuffled"), mask=mask).content_digest == expected


@pytest.mark.parametrize("dtype", ["i2", "u1", "i4", "f4", "f8"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_one_thread_and_two_write_the_same_bytes_and_leave_no_thread(tmp_path, dtype, gzipped):
    stored = {f"sub-{subject}_bold": bold(dtype, seed=number) for number, subject in enumerate("abc")}
    source = write_runs(tmp_path / "in", stored, gzipped=gzipped)
    reports = {threads: convert(source, str(tmp_path / str(threads)), threads=threads) for threads in (1, 2)}
    assert reports[1].content_digest == reports[2].content_digest
    assert contents(str(tmp_path / "1")) == contents(str(tmp_path / "2"))
    runs = {threads: fmristream.open(str(tmp_path / str(threads))).runs for threads in (1, 2)}
    nameless = {"object": "", "objects_digest": ""}
    assert [replace(run, **nameless) for run in runs[1]] == [replace(run, **nameless) for run in runs[2]]
    for one, other in zip(runs[1], runs[2], strict=True):
        for path in (tmp_path / "1" / one.object).rglob("c/*/0"):
            relative = path.relative_to(tmp_path / "1" / one.object)
            assert path.read_bytes() == (tmp_path / "2" / other.object / relative).read_bytes()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fmristream")]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_a_run_leaves_neither_a_thread_nor_an_object(tmp_path, threads, error):
    source = six_runs(tmp_path / "in")
    seen = []

    def interrupt(now: Progress) -> None:
        seen.append(now)
        if now.stage == "converting" and now.frames_done == 23:
            raise error

    options = ConvertOptions(mask="none", split="none", threads=threads)
    with pytest.raises(error):
        fmristream.convert(source, str(tmp_path / "out"), options=options, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fmristream")]
    stems = {key.split("/")[1] for key in objects(str(tmp_path / "out")) if key.startswith("runs/")}
    assert len(stems) == 1, "only the run that was finished is there"
    report = convert(source, str(tmp_path / "out"))
    assert report.resumed == 1
    assert report.content_digest == convert(source, str(tmp_path / "undisturbed")).content_digest


def test_threads_are_two_where_each_worker_has_two_cpus(monkeypatch):
    for cpus, workers, expected in [(1, 1, 1), (2, 1, 2), (3, 2, 1), (4, 2, 2), (64, 8, 2)]:
        monkeypatch.setattr(options_module, "_usable_cpus", lambda cpus=cpus: cpus)
        assert ConvertOptions(workers=workers).threads_per_worker == expected
    assert ConvertOptions(threads=1).threads_per_worker == 1
    with pytest.raises(UsageError, match="--threads 3: expected 1 or 2"):
        ConvertOptions(threads=3)


def test_two_workers_give_what_one_gives_quarantine_and_warnings_included(tmp_path):
    source = six_runs(tmp_path / "in")
    bad = tmp_path / "in" / "sub-b" / "sub-b_run-1_bold.nii.gz"
    bad.write_bytes(flipped_checksum(bad.read_bytes()))
    options = {"mask": "auto", "split": "exact"}
    alone = convert(source, str(tmp_path / "alone"), **options)
    together = convert(source, str(tmp_path / "together"), workers=2, **options)
    assert together.content_digest == alone.content_digest
    assert (together.runs, together.frames) == (alone.runs, alone.frames) == (5, 100)
    assert together.quarantined == alone.quarantined
    assert sorted(together.warnings) == sorted(alone.warnings)
    assert contents(str(tmp_path / "together")) == contents(str(tmp_path / "alone"))


def test_workers_cannot_share_a_store_in_memory_and_that_is_said_before_any_work(memory_url):
    with pytest.raises(UsageError, match=r"memory://.*--workers 1"):
        convert(SYNTH, memory_url, workers=2)
    assert objects(memory_url) == set()


def test_every_back_end_holds_the_same_content(tmp_path, dataset_url):
    expected = convert(SYNTH, str(tmp_path / "local"), mask="auto").content_digest
    report = convert(SYNTH, dataset_url, mask="auto")
    assert report.content_digest == expected == fmristream.open(dataset_url).content_digest
    assert contents(dataset_url) == contents(str(tmp_path / "local"))
    assert not [key for key in objects(dataset_url) if key.startswith("pending/")]


def cut_short(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


def flipped_payload(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]


def text(data: bytes) -> bytes:
    return b"this is no image"


DAMAGE = {"cut": cut_short, "crc": flipped_checksum, "payload": flipped_payload, "text": text, "empty": lambda _: b""}


@pytest.mark.parametrize(("mask", "threads"), [("none", 1), ("none", 2), ("auto", None), ("first:3", None)])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_left_out_by_name_and_the_others_are_whole(tmp_path, damage, mask, threads):
    source = six_runs(tmp_path / "in")
    bad = tmp_path / "in" / "sub-b" / "sub-b_run-1_bold.nii.gz"
    bad.write_bytes(DAMAGE[damage](bad.read_bytes()))
    report = convert(source, str(tmp_path / "out"), mask=mask, threads=threads)
    assert report.exit_code == 3
    assert report.runs == 5
    assert len(report.quarantined) == 1
    assert "sub-b_run-1_bold" in report.quarantined[0].name
    assert report.quarantined[0].reason
    bad.unlink()
    assert convert(source, str(tmp_path / "without"), mask=mask).content_digest == report.content_digest
    dataset = fmristream.open(str(tmp_path / "out"))
    assert [(q.name, q.reason) for q in report.quarantined] == list(dataset.skipped)
    stems = {key.split("/")[1] for key in objects(str(tmp_path / "out")) if key.startswith("runs/")}
    assert len(stems) == 5, "objects of the damaged run were left behind"


def test_where_no_run_is_good_nothing_is_committed(tmp_path):
    source = six_runs(tmp_path / "in")
    for path in (tmp_path / "in").rglob("*.nii.gz"):
        path.write_bytes(flipped_checksum(path.read_bytes()))
    with pytest.raises(SourceError, match="none of 6 inputs can be converted"):
        convert(source, str(tmp_path / "out"))
    with pytest.raises(FormatError, match="no dataset here"):
        fmristream.open(str(tmp_path / "out"))


def test_runs_on_two_grids_share_a_dataset_in_two_spaces(tmp_path):
    wide = bold(seed=9, shape=(8, 6, 5, 20))
    source = write_runs(tmp_path / "in", {"sub-a_bold": bold(), "sub-b_bold": wide, "sub-c_bold": bold(seed=2)})
    report = convert(source, str(tmp_path / "out"), space="MNI")
    dataset = fmristream.open(str(tmp_path / "out"))
    a, b, c = dataset.runs
    assert a.space_digest == c.space_digest != b.space_digest
    assert (a.voxels, b.voxels) == (210, 240)
    assert contents(str(tmp_path / "out"))["sub-b_bold"] == stored_bytes_of(wide)
    assert report.runs == 3


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_dry_run_writes_nothing(request, tmp_path, kind):
    url = str(tmp_path / "out") if kind == "local" else request.getfixturevalue(f"{kind}_url")
    report = fmristream.convert(six_runs(tmp_path / "in"), url, options=ConvertOptions(split="none"), dry_run=True)
    assert report.dry_run
    assert (report.runs, report.subjects, report.frames) == (6, 3, 120)
    assert report.stored_bytes > 0
    assert objects(url) == set()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_what_would_be_left_out(tmp_path):
    source = six_runs(tmp_path / "in")
    (tmp_path / "in" / "sub-b" / "sub-b_run-1_bold.nii.gz").write_bytes(b"text")
    report = fmristream.convert(source, "memory://never", options=ConvertOptions(split="none"), dry_run=True)
    assert (report.exit_code, report.runs) == (3, 5)


def test_what_is_there_already_is_not_done_again(tmp_path):
    source, url = six_runs(tmp_path / "in"), str(tmp_path / "out")
    first = convert(source, url)
    before = objects(url)
    again = convert(source, url)
    assert again.already_there
    assert (again.content_digest, again.generation_digest) == (first.content_digest, first.generation_digest)
    assert (again.runs, again.subjects, again.frames) == (first.runs, first.subjects, first.frames)
    assert objects(url) == before


def test_a_quarantined_run_is_told_again_when_everything_is_there_already(tmp_path):
    source, url = six_runs(tmp_path / "in"), str(tmp_path / "out")
    bad = tmp_path / "in" / "sub-b" / "sub-b_run-1_bold.nii.gz"
    bad.write_bytes(flipped_checksum(bad.read_bytes()))
    first = convert(source, url)
    again = convert(source, url)
    assert again.already_there
    assert again.exit_code == 3
    assert again.quarantined == first.quarantined


def test_a_target_with_other_runs_is_refused_and_left_as_it_is(tmp_path):
    source, url = six_runs(tmp_path / "in"), str(tmp_path / "out")
    digest = convert(source, url).generation_digest
    write_runs(tmp_path / "in", {"sub-d/sub-d_bold": bold(seed=8)})
    with pytest.raises(UsageError, match="1 new, 0 changed, 0 missing"):
        convert(source, url)
    write_runs(tmp_path / "in", {"sub-a/sub-a_run-1_bold": bold(seed=8)})
    (tmp_path / "in" / "sub-d" / "sub-d_bold.nii.gz").unlink()
    (tmp_path / "in" / "sub-c" / "sub-c_run-1_bold.nii.gz").unlink()
    with pytest.raises(UsageError, match="0 new, 1 changed, 1 missing"):
        convert(source, url)
    assert fmristream.open(url).generation_digest == digest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask": "auto"}, "mask"),
        ({"mask": "first:2"}, "mask"),
        ({"split": "exact"}, "split"),
        ({"space": "MNI152NLin6Asym"}, "space"),
        ({"tr_s": 0.7}, "tr"),
    ],
)
def test_a_target_made_with_other_options_is_refused_and_the_option_is_named(tmp_path, options, named):
    source, url = six_runs(tmp_path / "in"), str(tmp_path / "out")
    convert(source, url)
    with pytest.raises(UsageError, match=f"{named}.*into a new folder"):
        convert(source, url, **options)


def test_another_mask_file_is_another_option_and_the_same_one_is_not(tmp_path):
    source, url = six_runs(tmp_path / "in"), str(tmp_path / "out")
    for name, first in (("one", 2), ("two", 3)):
        mask = np.zeros((7, 6, 5), dtype="u1")
        mask[first:] = 1
        (tmp_path / f"{name}.nii").write_bytes(nifti_bytes(mask))
    convert(source, url, mask=str(tmp_path / "one.nii"))
    assert convert(source, url, mask=str(tmp_path / "one.nii")).already_there
    with pytest.raises(UsageError, match="mask"):
        convert(source, url, mask=str(tmp_path / "two.nii"))


def test_an_empty_folder_is_a_usage_error(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="no imaging file"):
        convert(str(tmp_path / "in"), str(tmp_path / "out"))


def test_progress_counts_every_run_and_frame_once(tmp_path):
    seen = []
    options = ConvertOptions(split="none")
    fmristream.convert(six_runs(tmp_path / "in"), str(tmp_path / "out"), options=options, progress=seen.append)
    last = {now.stage: now for now in seen}
    assert list(last) == ["reading headers", "computing masks", "converting"]
    assert (last["converting"].runs_done, last["converting"].frames_done) == (6, 120)
    assert (last["computing masks"].frames_done, last["computing masks"].frames) == (120, 120)
    assert all(now.frames_done <= now.frames or now.frames == 0 for now in seen)
