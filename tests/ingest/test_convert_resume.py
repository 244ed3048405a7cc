"""An interrupted conversion goes on where it was, and only with what is still what would be made now."""

import json

import numpy as np
import pytest

import fmristream
from fmristream.errors import FormatError
from fmristream.ingest.options import ConvertOptions, Progress
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, convert, objects, six_runs, write_runs
from tests.ingest.nifti_files import nifti_bytes


class Interrupted(BaseException):
    """What a signal would raise, at a chosen moment."""


def interrupt(source: str, url: str, *, after_runs: int, **options) -> None:
    """Convert until so many runs are finished and the next one has begun."""

    def stop(now: Progress) -> None:
        if now.stage == "converting" and now.runs_done == after_runs and now.frames_done > after_runs * 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        fmristream.convert(
            source, url, options=ConvertOptions(**{"mask": "none", "split": "none", **options}), progress=stop
        )
    with pytest.raises(FormatError, match="no dataset here"):
        fmristream.open(url)


def fresh(source: str, url: str, **options) -> str:
    """Content digest of an uninterrupted conversion."""
    return convert(source, f"{url}-fresh", **options).content_digest


@pytest.mark.parametrize("after", [0, 1, 5])
def test_finished_runs_are_not_done_again(tmp_path, dataset_url, after):
    source = six_runs(tmp_path / "in")
    interrupt(source, dataset_url, after_runs=after)
    report = convert(source, dataset_url)
    assert (report.resumed, report.runs) == (after, 6)
    assert report.content_digest == fresh(source, dataset_url)
    assert contents(dataset_url) == contents(f"{dataset_url}-fresh")
    assert not [key for key in objects(dataset_url) if key.startswith("pending/")]


def test_a_conversion_that_is_interrupted_again_and_again_gets_on(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    for after in range(1, 6):
        interrupt(source, memory_url, after_runs=after)
    assert convert(source, memory_url).resumed == 5


def test_masks_that_were_computed_are_not_computed_again(tmp_path, dataset_url):
    from tests.ingest.test_masks import head

    source = write_runs(tmp_path / "in", {f"sub-{n}_bold": head(n) for n in range(4)})

    def stop(now: Progress) -> None:
        if now.stage == "computing masks" and now.frames_done > 2 * 12:
            raise Interrupted

    seen: list[Progress] = []
    options = ConvertOptions(split="none")
    with pytest.raises(Interrupted):
        fmristream.convert(source, dataset_url, options=options, progress=stop)
    records = open_store(dataset_url).list("pending")
    assert len(records) == 2
    assert not [key for key in records if "sub-" in open_store(dataset_url).read(key).decode()]
    write_runs(tmp_path / "in", {"sub-0_bold": head(5)})  # changed meanwhile: its record is of no use
    report = fmristream.convert(source, dataset_url, options=options, progress=seen.append)
    assert max(now.frames_done for now in seen if now.stage == "computing masks") == 3 * 12
    assert report.content_digest == fresh(source, dataset_url, mask="auto")
    assert not open_store(dataset_url).list("pending")


def test_records_name_nobody_and_no_path(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3)
    store = open_store(memory_url)
    records = store.list("pending")
    assert len(records) == 3
    text = "".join([*records, *(store.read(key).decode() for key in records)])
    assert not [word for word in ("sub-", "_bold", str(tmp_path), "nii") if word in text]


def test_a_source_that_changed_meanwhile_is_converted_anew(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3)
    write_runs(tmp_path / "in", {"sub-a/sub-a_run-1_bold": bold(seed=77)})
    report = convert(source, memory_url)
    assert report.resumed == 2
    assert report.content_digest == fresh(source, memory_url)


@pytest.mark.parametrize(
    ("then", "resumed"),
    [
        ({"tr_s": 0.72}, 0),
        ({"space": "MNI152NLin6Asym"}, 4),
        ({"split": "exact"}, 4),
        ({"mask": "first:3"}, 4),
        ({"mask": "GIVEN"}, 0),
    ],
)
def test_other_options_take_only_what_they_would_have_made_themselves(tmp_path, memory_url, then, resumed):
    mask = np.zeros((7, 6, 5), dtype="u1")
    mask[2:5] = 1
    (tmp_path / "mask.nii").write_bytes(nifti_bytes(mask))
    options = {name: str(tmp_path / "mask.nii") if value == "GIVEN" else value for name, value in then.items()}
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=4)
    report = convert(source, memory_url, **options)
    assert report.resumed == resumed
    assert report.content_digest == fresh(source, memory_url, **options)


def test_after_a_change_of_mind_the_new_runs_are_resumed_too(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=4)
    interrupt(source, memory_url, after_runs=3, tr_s=0.72)
    report = convert(source, memory_url, tr_s=0.72)
    assert report.resumed == 3
    assert report.content_digest == fresh(source, memory_url, tr_s=0.72)


def test_a_finished_run_whose_objects_are_gone_is_done_again(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3)
    store = open_store(memory_url)
    lost = next(key for key in store.list("runs") if key.endswith("/residual/c/0/0"))
    store.delete(lost)
    interrupt(source, memory_url, after_runs=4)
    report = convert(source, memory_url)
    assert report.resumed == 4  # the run that was done again has a record that holds
    assert report.content_digest == fresh(source, memory_url)


@pytest.mark.parametrize("damage", ["cut", "text", "other", "list"])
def test_a_damaged_record_is_of_no_use_and_does_no_harm(tmp_path, memory_url, damage):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3)
    store = open_store(memory_url)
    key = store.list("pending")[1]
    data = store.read(key)
    changed = {"cut": data[:-30], "text": b"\xff\x00", "list": b"[1, 2]"}
    changed["other"] = json.dumps({**json.loads(data), "digest": "0" * 64}).encode()
    store.delete(key)
    store.put_new(key, changed[damage])
    interrupt(source, memory_url, after_runs=4)
    report = convert(source, memory_url)
    assert report.resumed == 4
    assert report.content_digest == fresh(source, memory_url)


def test_interrupted_runs_leave_no_objects_behind(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=2)
    folders = {key.split("/")[1] for key in objects(memory_url) if key.startswith("runs/")}
    assert len(folders) == 2
