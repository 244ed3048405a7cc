"""A subject who withdraws: the next version has not a byte of him, and after `gc --purge` the store has none either."""

import pytest

import fmristream
from fmristream.errors import FormatError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.verify import verify
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, convert, stored, write_runs

RUNS = {f"sub-{label}_task-{task}_bold": bold(seed=n * 2 + k, shape=(3, 4, 3, 3 + n))
        for n, label in enumerate(("ann", "ben", "cid", "dot")) for k, task in enumerate(("rest", "move"))}  # fmt: skip


def bids(folder, runs=RUNS) -> str:
    source = write_runs(folder, runs)
    labels = sorted({name.split("_")[0] for name in runs})
    rows = "".join(f"{label}\t{20 + n}\n" for n, label in enumerate(labels))
    (folder / "participants.tsv").write_text("participant_id\tage\n" + rows)
    return source


def test_the_next_version_has_nothing_of_the_subject_and_purging_removes_every_byte(tmp_path, dataset_url):
    source = bids(tmp_path / "in")
    (tmp_path / "in" / "sub-ben_task-broken_bold.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    convert(source, dataset_url)
    old = fmristream.open(dataset_url)
    theirs = {run.object for run in old.runs if run.subject == "ben"}
    their_index = [old.store.read_range(*block(old, run.name)) for run in old.runs if run.subject == "ben"]
    report = fmristream.withdraw(dataset_url, ["ben"])
    assert (report.runs, report.participants, report.skipped, report.runs_left) == (2, 1, 1, 6)
    assert report.older == (old.generation_digest,)
    new = fmristream.open(dataset_url)
    assert new.generation.number == 2
    assert "ben" not in new.runs.column("subject")
    assert {row["subject"] for row in new.participants} == {"ann", "cid", "dot"}
    assert new.skipped == ()
    assert contents(dataset_url).keys() == {name for name in RUNS if "ben" not in name}
    assert verify(dataset_url, deep=True).is_sound
    collected = fmristream.gc(dataset_url, purge=True)
    assert [one.generation_digest for one in collected.versions] == [old.generation_digest]
    left = stored(dataset_url)
    assert not any(key.startswith(tuple(theirs)) for key in left)
    assert not any(data in held for data in their_index for held in left.values())
    assert not any(b"ben" in data for data in left.values())
    assert verify(dataset_url, deep=True).is_sound


def block(dataset, name: str) -> tuple[str, int, int]:
    key, arrays = dataset.arrays_of(name)
    frames = next(array for array in arrays.values() if array.frames_per_shard)
    return key, frames.index_offset, frames.index_offset + frames.index_bytes


def test_the_result_is_what_a_source_without_the_subject_gives(tmp_path, memory_url):
    convert(bids(tmp_path / "in"), memory_url)
    report = fmristream.withdraw(memory_url, ["ann", "sub-dot"])
    others = {name: values for name, values in RUNS.items() if "ann" not in name and "dot" not in name}
    assert report.content_digest == convert(bids(tmp_path / "others", others), f"{memory_url}-others").content_digest


def test_an_update_does_not_take_a_withdrawn_subject_in_again(tmp_path, memory_url):
    source = bids(tmp_path / "in")
    convert(source, memory_url)
    fmristream.withdraw(memory_url, ["cid"])
    fmristream.gc(memory_url, purge=True)
    write_runs(tmp_path / "in", {"sub-new_task-rest_bold": bold(seed=50, shape=(3, 4, 3, 2))})
    report = convert(source, memory_url, update="all")
    assert report.added == 1
    assert any("2 runs belong to subjects that were withdrawn" in line for line in report.warnings)
    found = fmristream.open(memory_url)
    assert set(found.runs.column("subject")) == {"ann", "ben", "dot", "new"}
    assert {row["subject"] for row in found.participants} == {"ann", "ben", "dot"}


def test_versions_that_never_named_the_subject_survive_a_purge(tmp_path, memory_url):
    few = {name: values for name, values in RUNS.items() if "dot" not in name}
    source = bids(tmp_path / "in", few)
    convert(source, memory_url)
    first = fmristream.open(memory_url).generation_digest
    bids(tmp_path / "in")
    convert(source, memory_url, update="all")
    second = fmristream.open(memory_url).generation_digest
    fmristream.withdraw(memory_url, ["dot"])
    report = fmristream.gc(memory_url, purge=True)
    assert [one.generation_digest for one in report.versions] == [second] != [first]


def test_a_withdrawal_can_be_tried_and_names_who_is_not_there(tmp_path, memory_url):
    convert(bids(tmp_path / "in"), memory_url)
    before = stored(memory_url)
    report = fmristream.withdraw(memory_url, ["ben"], dry_run=True)
    assert (report.dry_run, report.runs, report.frames, report.generation) == (True, 2, 8, 0)
    assert stored(memory_url) == before
    with pytest.raises(UsageError, match="no subject is called 'eve'"):
        fmristream.withdraw(memory_url, ["ben", "eve"])
    with pytest.raises(UsageError, match="no subject was named"):
        fmristream.withdraw(memory_url, [])
    with pytest.raises(FormatError, match="no dataset here"):
        fmristream.withdraw(f"{memory_url}-nothing", ["ben"])


def test_cells_of_others_that_name_a_withdrawn_subject_are_emptied_and_stay_so(tmp_path, memory_url):
    source = bids(tmp_path / "in")
    table = "participant_id\tage\tremark\nsub-ann\t20\tsister of ben\nsub-ben\t21\tn\nsub-cid\t22\tbenign\nsub-dot\t23\tBen?\n"
    (tmp_path / "in" / "participants.tsv").write_text(table)
    convert(source, memory_url)
    fmristream.withdraw(memory_url, ["ben"])
    remarks = {"ann": None, "cid": "benign", "dot": "Ben?"}
    assert {row["subject"]: row["remark"] for row in fmristream.open(memory_url).participants} == remarks
    generation = fmristream.open(memory_url).generation_digest
    convert(source, memory_url, update="all")
    assert fmristream.open(memory_url).generation_digest == generation
    report = verify(memory_url, deep=True, against=source)
    assert report.is_sound, report.faults


def test_a_withdrawal_that_is_done_changes_nothing(tmp_path, memory_url):
    convert(bids(tmp_path / "in"), memory_url)
    first = fmristream.withdraw(memory_url, ["ben"])
    before = stored(memory_url)
    again = fmristream.withdraw(memory_url, ["ben"])
    assert stored(memory_url) == before
    assert (again.generation, again.generation_digest, again.runs) == (first.generation, first.generation_digest, 0)
    assert again.older == first.older


def test_an_older_version_that_nobody_can_read_goes_with_a_purge(tmp_path, memory_url):
    convert(bids(tmp_path / "in"), memory_url)
    old = fmristream.open(memory_url).generation
    fmristream.withdraw(memory_url, ["ben"])
    open_store(memory_url).delete(old.document["participants"]["key"])
    report = fmristream.gc(memory_url, purge=True)
    assert [one.generation_digest for one in report.versions] == [old.digest]
    assert verify(memory_url, deep=True).is_sound


def test_everybody_may_withdraw(tmp_path, memory_url):
    convert(bids(tmp_path / "in"), memory_url)
    report = fmristream.withdraw(memory_url, ["ann", "ben", "cid", "dot"])
    assert report.runs_left == 0
    fmristream.gc(memory_url, purge=True)
    found = fmristream.open(memory_url)
    assert (len(found.runs), found.participants) == (0, ())
    assert not open_store(memory_url).list("runs")
    assert verify(memory_url, deep=True).is_sound


def test_a_subject_who_withdraws_while_an_update_adds_more_of_him_stays_out(tmp_path, dataset_url):
    source = bids(tmp_path / "in")
    convert(source, dataset_url)
    more = {"sub-ben_task-more_bold": bold(seed=60, shape=(3, 4, 3, 2)), "sub-new_task-rest_bold": bold(seed=61)}
    write_runs(tmp_path / "in", more)
    withdrawn = []

    def withdraw(now):
        if now.stage == "converting" and now.runs_done == 1 and not withdrawn:
            withdrawn.append(fmristream.withdraw(dataset_url, ["ben"]))

    options = ConvertOptions(mask="none", split="none", update="all")
    fmristream.convert(source, dataset_url, options=options, progress=withdraw)
    assert withdrawn
    found = fmristream.open(dataset_url)
    assert set(found.runs.column("subject")) == {"ann", "cid", "dot", "new"}
    assert {row["subject"] for row in found.participants} <= {"ann", "cid", "dot", "new"}
    fmristream.gc(dataset_url, purge=True)
    assert not any(b"ben" in data for key, data in stored(dataset_url).items() if key.startswith("tables/"))
    assert verify(dataset_url, deep=True).is_sound


def test_a_broken_file_of_a_withdrawn_subject_does_not_bring_his_label_back(tmp_path, memory_url):
    source = bids(tmp_path / "in")
    convert(source, memory_url)
    fmristream.withdraw(memory_url, ["ben"])
    (tmp_path / "in" / "sub-ben_task-late_bold.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    write_runs(tmp_path / "in", {"sub-new_task-rest_bold": bold(seed=61, shape=(3, 4, 3, 2))})
    assert convert(source, memory_url, update="new").added == 1
    assert fmristream.open(memory_url).skipped == ()
