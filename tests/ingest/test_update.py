"""A dataset grows: new runs join, changed ones are replaced on request, and whoever has an older version open keeps it."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

import fmristream
from fmristream.errors import ConflictError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources import Phenotypes
from fmristream.report.info import describe
from fmristream.shards import segments
from fmristream.shards.generation import repair_hint
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, convert, stored, write_runs

FIRST = {"sub-1_bold": bold(shape=(3, 4, 3, 3)), "sub-2_bold": bold("f4", seed=1, shape=(3, 4, 3, 2))}
MORE = {"sub-0_bold": bold(seed=2, shape=(3, 4, 3, 4)), "sub-3_bold": bold("u1", seed=3, shape=(3, 4, 3, 2))}


def alone(source: str, url: str) -> str:
    """Content digest of the same source converted at once."""
    return convert(source, f"{url}-alone").content_digest


def test_new_runs_join_and_the_result_is_what_one_conversion_gives(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    before = convert(source, dataset_url)
    old = fmristream.open(dataset_url)
    write_runs(tmp_path / "in", MORE)
    report = convert(source, dataset_url, update="new")
    assert (report.runs, report.added, report.replaced) == (4, 2, 0)
    assert report.content_digest == alone(source, dataset_url) != before.content_digest
    assert contents(dataset_url) == contents(f"{dataset_url}-alone")
    assert fmristream.open(dataset_url).generation.number == 2
    np.testing.assert_array_equal(old.read("sub-1_bold"), fmristream.open(dataset_url).read("sub-1_bold"))
    assert len(old.runs) == 2
    assert convert(source, dataset_url, update="new").already_there


def test_objects_of_runs_that_are_there_are_not_written_again(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, dataset_url)
    before = {key: data for key, data in stored(dataset_url).items() if key.startswith(("runs/", "stats/"))}
    write_runs(tmp_path / "in", MORE)
    convert(source, dataset_url, update="new")
    after = stored(dataset_url)
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize(("update", "what"), [(None, "2 new, 0 changed"), ("new", "2 new, 1 changed")])
def test_nothing_is_changed_that_nobody_asked_to_change(tmp_path, memory_url, update, what):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, memory_url)
    write_runs(tmp_path / "in", MORE)
    if update:
        write_runs(tmp_path / "in", {"sub-1_bold": bold(seed=9, shape=(3, 4, 3, 3))})
    before = stored(memory_url)
    with pytest.raises(UsageError, match=f"other runs \\({what}"):
        convert(source, memory_url, update=update)
    assert stored(memory_url) == before


def test_a_run_whose_source_changed_is_replaced_on_request_and_the_older_version_still_reads(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, dataset_url)
    old = fmristream.open(dataset_url)
    was = old.read("sub-1_bold")
    write_runs(tmp_path / "in", {"sub-1_bold": bold(seed=9, shape=(3, 4, 3, 3)), **MORE})
    report = convert(source, dataset_url, update="all")
    assert (report.runs, report.added, report.replaced) == (4, 2, 1)
    assert report.content_digest == alone(source, dataset_url)
    assert contents(dataset_url) == contents(f"{dataset_url}-alone")
    np.testing.assert_array_equal(old.read("sub-1_bold"), was)
    assert (fmristream.open(dataset_url).read("sub-1_bold") != was).any()


def test_runs_that_the_source_lost_stay(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", {**FIRST, **MORE})
    whole = convert(source, memory_url).content_digest
    (tmp_path / "in" / "sub-0_bold.nii.gz").unlink()
    report = convert(source, memory_url, update="all")
    assert report.already_there
    assert report.content_digest == whole
    assert any("1 runs of the dataset are not in the source; they stay" in line for line in report.warnings)


def test_other_options_are_refused_for_an_update_as_well(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, memory_url)
    write_runs(tmp_path / "in", MORE)
    for options in ({"tr_s": 3.0}, {"space": "other"}, {"split": "hash", "split_ratios": (1.0, 0.0, 0.0)}):
        with pytest.raises(UsageError, match=r"another .*; convert into a new folder"):
            convert(source, memory_url, update="all", **options)


@pytest.mark.parametrize("split", ["hash", "exact"])
def test_nobody_changes_sides_when_others_join(tmp_path, memory_url, split):
    few = {f"sub-{n}_bold": bold(seed=n, shape=(2, 3, 2, 2)) for n in range(12)}
    source = write_runs(tmp_path / "in", few)
    options = {"split": split, "split_ratios": (0.5, 0.25, 0.25)}
    convert(source, memory_url, **options)
    before = {run.subject: run.split for run in fmristream.open(memory_url).runs}
    write_runs(tmp_path / "in", {f"sub-{n}_bold": bold(seed=n, shape=(2, 3, 2, 2)) for n in range(12, 30)})
    convert(source, memory_url, update="new", **options)
    after = {run.subject: run.split for run in fmristream.open(memory_url).runs}
    assert len(after) == 30
    assert {subject: after[subject] for subject in before} == before
    assert set(after.values()) == {"train", "val", "test"}
    assert convert(source, memory_url, update="new", **options).already_there


@pytest.mark.parametrize("split", ["hash", "exact"])
def test_a_new_member_of_a_family_joins_its_part(tmp_path, memory_url, split):
    def family(numbers: range) -> str:
        """Three members of each of eight families."""
        source = write_runs(
            tmp_path / "in", {f"sub-{n:02}_bold": bold(seed=n, shape=(2, 3, 2, 2)) for n in numbers}, gzipped=False
        )
        rows = "".join(f"sub-{n:02}\tf{n % 8}\n" for n in range(24) if n in numbers or n < 16)
        (tmp_path / "in" / "participants.tsv").write_text("participant_id\tfamily\n" + rows)
        return source

    options = {"split": split, "split_ratios": (0.5, 0.25, 0.25), "phenotypes": Phenotypes(group_by="family")}
    convert(family(range(16)), memory_url, **options)
    before = {run.subject: run.split for run in fmristream.open(memory_url).runs}
    assert convert(family(range(16, 24)), memory_url, update="new", **options).added == 8
    found = fmristream.open(memory_url).runs
    assert {run.subject: run.split for run in found if run.subject in before} == before
    assert {run.split for run in found} == {"train", "val", "test"}
    assert len({(run.group, run.split) for run in found}) == 8


def test_a_file_that_was_quarantined_and_is_repaired_joins(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    (tmp_path / "in" / "sub-0_bold.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    assert convert(source, memory_url).quarantined
    write_runs(tmp_path / "in", {"sub-0_bold": MORE["sub-0_bold"]})
    report = convert(source, memory_url, update="new")
    assert (report.runs, report.added, report.quarantined) == (3, 1, ())
    assert not fmristream.open(memory_url).skipped


def test_many_small_commits_are_written_as_one_segment(tmp_path, memory_url, monkeypatch):
    monkeypatch.setattr(segments, "MAX_SEGMENTS", 4)
    source = str(tmp_path / "in")
    for number in range(7):
        write_runs(tmp_path / "in", {f"sub-{number}_bold": bold(seed=number, shape=(2, 3, 2, 2))})
        convert(source, memory_url, update="new")
        assert len(fmristream.open(memory_url).generation.document["segments"]) <= 4
    assert fmristream.open(memory_url).content_digest == alone(source, memory_url)
    assert contents(memory_url) == contents(f"{memory_url}-alone")


def test_an_interrupted_update_shows_nothing_and_goes_on(tmp_path, dataset_url):
    source = write_runs(tmp_path / "in", FIRST)
    before = convert(source, dataset_url)
    write_runs(tmp_path / "in", MORE)

    def stop(now):
        if now.stage == "converting" and now.runs_done == 1:
            raise KeyboardInterrupt

    options = ConvertOptions(mask="none", split="none", update="new")
    with pytest.raises(KeyboardInterrupt):
        fmristream.convert(source, dataset_url, options=options, progress=stop)
    assert fmristream.open(dataset_url).content_digest == before.content_digest
    report = convert(source, dataset_url, update="new")
    assert (report.resumed, report.added) == (1, 2)
    assert report.content_digest == alone(source, dataset_url)


def test_updates_of_different_runs_at_the_same_time_all_get_in(tmp_path, dataset_url):
    convert(write_runs(tmp_path / "first", FIRST), dataset_url)
    sources = [write_runs(tmp_path / f"in{n}", {f"sub-1{n}_bold": bold(seed=n, shape=(3, 4, 3, 2))}) for n in range(4)]
    gate = Barrier(4)

    def join(source: str) -> int:
        gate.wait()
        return convert(source, dataset_url, update="new").added

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(join, sources)) == [1] * 4
    found = fmristream.open(dataset_url)
    assert {run.name for run in found.runs} == {*FIRST, *(f"sub-1{n}_bold" for n in range(4))}
    assert found.generation.number == 5
    write_runs(tmp_path / "first", {f"sub-1{n}_bold": bold(seed=n, shape=(3, 4, 3, 2)) for n in range(4)})
    assert found.content_digest == alone(str(tmp_path / "first"), dataset_url)


def test_who_commits_first_leaves_the_records_of_others_alone(tmp_path, dataset_url):
    convert(write_runs(tmp_path / "first", FIRST), dataset_url)
    ours = write_runs(tmp_path / "ours", MORE)
    theirs = write_runs(tmp_path / "theirs", {"sub-9_bold": bold(seed=9, shape=(3, 4, 3, 2))})

    def stop(now):
        if now.stage == "converting" and now.runs_done == 1:
            raise KeyboardInterrupt

    options = ConvertOptions(mask="none", split="none", update="new")
    with pytest.raises(KeyboardInterrupt):
        fmristream.convert(ours, dataset_url, options=options, progress=stop)
    assert convert(theirs, dataset_url, update="new").added == 1
    assert convert(theirs, dataset_url, update="new").already_there
    report = convert(ours, dataset_url, update="new")
    assert (report.added, report.resumed) == (2, 1)
    assert not open_store(dataset_url).list("pending")


def test_two_versions_of_one_run_at_the_same_time_do_not_overwrite_each_other(tmp_path, dataset_url):
    convert(write_runs(tmp_path / "first", FIRST), dataset_url)
    sources = [write_runs(tmp_path / f"in{n}", {"sub-5_bold": bold(seed=n, shape=(3, 4, 3, 2))}) for n in range(2)]
    gate = Barrier(2)

    def join(source: str) -> str:
        gate.wait()
        try:
            return convert(source, dataset_url, update="new").content_digest
        except (ConflictError, UsageError) as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(join, sources))
    digest = fmristream.open(dataset_url).content_digest
    assert sorted(answer == digest for answer in answers) == [False, True]
    assert any("other versions of the same runs" in a or "other runs (0 new, 1 changed" in a for a in answers)


def test_participants_of_new_subjects_are_added_and_those_of_others_stay_until_all_is_updated(tmp_path, memory_url):
    def table(rows: str) -> None:
        (tmp_path / "in" / "participants.tsv").write_text("participant_id\tage\n" + rows)

    source = write_runs(tmp_path / "in", FIRST)
    table("sub-1\t20\nsub-2\t30\n")
    convert(source, memory_url)
    write_runs(tmp_path / "in", MORE)
    table("sub-0\t10\nsub-1\t21\nsub-2\t30\nsub-3\t40\n")
    report = convert(source, memory_url, update="new")
    assert any("rows of the participants table differ" in line for line in report.warnings)
    ages = {row["subject"]: row["age"] for row in fmristream.open(memory_url).participants}
    assert ages == {"0": 10, "1": 20, "2": 30, "3": 40}
    convert(source, memory_url, update="all")
    assert {row["subject"]: row["age"] for row in fmristream.open(memory_url).participants}["1"] == 21
    table("sub-1\told\n")
    with pytest.raises(UsageError, match="column 'age' holds numbers"):
        convert(source, memory_url, update="all")


def test_nothing_that_was_replaced_by_an_update_is_lost_from_the_store(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, memory_url)
    before = stored(memory_url)
    write_runs(tmp_path / "in", {"sub-1_bold": bold(seed=9, shape=(3, 4, 3, 3))})
    convert(source, memory_url, update="all")
    after = stored(memory_url)
    assert {key: after.get(key) for key in before if key != "dataset.json"} == {
        key: data for key, data in before.items() if key != "dataset.json"
    }
    assert open_store(memory_url).list("pending") == []


def test_a_new_broken_file_is_told_whatever_is_asked(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    convert(source, memory_url)
    (tmp_path / "in" / "sub-9_bold.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    report = convert(source, memory_url)
    assert ([one.name for one in report.quarantined], report.exit_code) == (["sub-9_bold"], 3)
    assert convert(source, memory_url, update="new").exit_code == 3
    assert [name for name, _ in fmristream.open(memory_url).skipped] == ["sub-9_bold"]
    number = fmristream.open(memory_url).generation.number
    assert convert(source, memory_url, update="new").exit_code == 3
    assert fmristream.open(memory_url).generation.number == number, "nothing is new about it"


def test_an_older_version_opens_by_its_digest_and_a_late_hint_harms_nobody(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    first = convert(source, memory_url)
    write_runs(tmp_path / "in", MORE)
    second = convert(source, memory_url, update="new")
    for digest in (first.generation_digest, first.content_digest[:16]):
        assert len(fmristream.open(memory_url, digest=digest).runs) == 2
    fmristream.gc(memory_url, keep=1)
    store = open_store(memory_url)
    repair_hint(store, 1)  # of a writer that stalled after its commit, which is gone by now
    assert fmristream.open(memory_url).content_digest == second.content_digest


def test_two_first_conversions_with_other_options_do_not_end_in_one_dataset(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    theirs = []

    def overtake(now):
        if now.stage == "converting" and now.runs_done == 1 and not theirs:
            theirs.append(convert(source, memory_url))

    options = ConvertOptions(mask="none", split="none", layout="volume", tr_s=3.0, update="new")
    with pytest.raises(ConflictError, match="another tr and another layout"):
        fmristream.convert(source, memory_url, options=options, progress=overtake)
    assert fmristream.open(memory_url).content_digest == theirs[0].content_digest


def test_the_same_data_under_two_names_is_told(tmp_path, memory_url):
    first, second = bold(shape=(3, 4, 3, 3)), bold(seed=1, shape=(3, 4, 3, 3))
    source = write_runs(
        tmp_path / "in",
        {"sub-1_bold": first, "sub-2_bold": second, "sub-3_run-1_bold": first, "sub-2_run-9_bold": second},
    )
    report = convert(source, memory_url)
    told = {line.partition(":")[0]: line for line in report.warnings if "the same data" in line}
    assert len(told) == 2
    assert any("2 runs hold the same data under different subjects" in line for line in told.values())
    assert any(line.count(" = ") == 1 and "sub-1_bold = sub-3_run-1_bold" in line for line in told.values())
    assert any(
        "2 runs of the same subjects" in line and "sub-2_bold = sub-2_run-9_bold" in line for line in told.values()
    )
    assert set(told.values()) <= set(describe(fmristream.open(memory_url)).warnings)


def test_no_two_runs_alike_is_not_worth_a_word(tmp_path, memory_url):
    runs = {f"sub-{n}_bold": bold(seed=n, shape=(3, 4, 3, 3)) for n in range(3)}
    assert not any("same data" in line for line in convert(write_runs(tmp_path / "in", runs), memory_url).warnings)


def test_two_first_conversions_with_other_things_beside_the_voxels_do_not_end_in_one_dataset(tmp_path, memory_url):
    source = write_runs(tmp_path / "in", FIRST)
    theirs = []

    def overtake(now):
        if now.stage == "converting" and now.runs_done == 1 and not theirs:
            theirs.append(convert(source, memory_url))

    options = ConvertOptions(mask="none", split="none", sketch=False, update="new")
    with pytest.raises(ConflictError, match="sketches on or off"):
        fmristream.convert(source, memory_url, options=options, progress=overtake)
    assert fmristream.open(memory_url).sketch(0) is not None


@pytest.mark.parametrize("update", ["new", "all"])
def test_an_input_that_stays_broken_makes_no_version(tmp_path, memory_url, update):
    source = write_runs(tmp_path / "in", FIRST)
    (tmp_path / "in" / "sub-9_bold.nii.gz").write_bytes(b"\x1f\x8bbroken")
    convert(source, memory_url)
    before = stored(memory_url)
    report = convert(source, memory_url, update=update)
    assert (report.added, report.exit_code) == (0, 3)
    assert stored(memory_url) == before
