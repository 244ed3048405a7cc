"""Splits at conversion: by subject, decided before any work is done, the same for whoever does it again."""

import pytest

import fmristream
from fmristream.errors import ObjectMissingError, SplitError, UsageError
from tests.ingest.cohorts import bold, convert, six_runs, write_runs

TINY = (3, 3, 3, 2)


def cohort(folder, subjects: int) -> str:
    return write_runs(folder, {f"sub-{n:03d}_bold": bold(seed=n, shape=TINY) for n in range(subjects)}, gzipped=False)


def parts_of(url: str) -> dict[str, str]:
    return {run.subject: run.split for run in fmristream.open(url).runs}


@pytest.fixture
def other_url(memory_url) -> str:
    return f"{memory_url}-2"


def test_exact_shares_are_exact(tmp_path, memory_url):
    report = convert(cohort(tmp_path / "in", 20), memory_url, split="exact")
    assert report.splits == {"train": 14, "val": 3, "test": 3}
    counts = list(parts_of(memory_url).values())
    assert {part: counts.count(part) for part in set(counts)} == report.splits


def test_runs_of_a_subject_are_in_one_part(tmp_path, memory_url):
    convert(six_runs(tmp_path / "in"), memory_url, split="exact")
    runs = fmristream.open(memory_url).runs
    assert len({(run.subject, run.split) for run in runs}) == 3


def test_splits_by_hash_stay_when_subjects_are_added(tmp_path, memory_url, other_url):
    convert(cohort(tmp_path / "few", 30), memory_url, split="hash")
    convert(cohort(tmp_path / "more", 36), other_url, split="hash")
    few, more = parts_of(memory_url), parts_of(other_url)
    assert {subject: more[subject] for subject in few} == few


def test_another_seed_is_another_split(tmp_path, memory_url, other_url):
    source = cohort(tmp_path / "in", 20)
    convert(source, memory_url, split="exact")
    convert(source, other_url, split="exact", split_seed=1)
    assert parts_of(memory_url) != parts_of(other_url)


def test_no_split_leaves_the_part_empty(tmp_path, memory_url):
    assert convert(cohort(tmp_path / "in", 2), memory_url, split="none").splits == {}
    assert set(parts_of(memory_url).values()) == {""}


@pytest.mark.parametrize("split", ["hash", "exact"])
def test_a_part_without_subjects_is_refused_before_anything_is_written(tmp_path, split):
    with pytest.raises(SplitError, match=r"leaves .* empty.*--split none"):
        convert(cohort(tmp_path / "in", 2), str(tmp_path / "out"), split=split)
    assert not (tmp_path / "out").exists()


def test_a_part_that_should_be_empty_may_be(tmp_path):
    source = cohort(tmp_path / "in", 2)
    report = convert(source, str(tmp_path / "out"), split="exact", split_ratios=(0.5, 0.0, 0.5))
    assert report.splits == {"train": 1, "test": 1}


@pytest.mark.parametrize("header", ["subject,split", "participant_id\tsplit"])
@pytest.mark.parametrize("prefix", ["", "sub-"])
def test_a_given_table_is_followed(tmp_path, header, prefix):
    separator = "\t" if "\t" in header else ","
    rows = [("000", "train"), ("001", "val"), ("002", "test"), ("999", "train")]
    text = "\n".join([header, *(f"{prefix}{subject}{separator}{part}" for subject, part in rows)])
    (tmp_path / "parts.csv").write_text("\ufeff" + text + "\n")
    convert(cohort(tmp_path / "in", 3), str(tmp_path / "out"), split=str(tmp_path / "parts.csv"))
    assert parts_of(str(tmp_path / "out")) == dict(rows[:3])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("subject,split\n000,train\n001,val\n", "does not name 1 of the subjects"),
        ("subject,split\n000,train\n001,val\n002,holdout\n", "holdout"),
        ("subject,split\n000,train\n000,val\n001,val\n002,test\n", "subject 000 is in train and in val"),
        ("name,part\n000,train\n", "columns name, part"),
        ("", "no columns|columns \\(none\\)"),
        ("subject,split\n000,train\n001,train\n002,train\n003,val\n004,test\n", "leaves val and test empty"),
    ],
)
def test_a_table_that_cannot_be_followed_is_refused_before_anything_is_written(tmp_path, text, reason):
    (tmp_path / "parts.csv").write_text(text)
    with pytest.raises(SplitError, match=reason):
        convert(cohort(tmp_path / "in", 3), str(tmp_path / "out"), split=str(tmp_path / "parts.csv"))
    assert not (tmp_path / "out").exists()


def test_a_table_may_leave_a_part_out_altogether(tmp_path):
    (tmp_path / "parts.csv").write_text("subject,split\n000,train\n001,train\n002,test\n")
    report = convert(cohort(tmp_path / "in", 3), str(tmp_path / "out"), split=str(tmp_path / "parts.csv"))
    assert report.splits == {"train": 2, "test": 1}


def test_a_table_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises((ObjectMissingError, UsageError), match="no such file"):
        convert(cohort(tmp_path / "in", 3), str(tmp_path / "out"), split=str(tmp_path / "parts.csv"))


@pytest.mark.parametrize("ratios", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_shares_that_are_none_are_refused(ratios):
    with pytest.raises(UsageError, match="split ratios"):
        convert("synth://", "memory://never", split="exact", split_ratios=ratios)


def test_a_damaged_subject_that_empties_a_part_is_told_and_the_finished_runs_are_kept(tmp_path):
    source = cohort(tmp_path / "in", 3)
    (tmp_path / "parts.csv").write_text("subject,split\n000,train\n001,val\n002,test\n")
    bad = tmp_path / "in" / "sub-002_bold.nii"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-3])
    with pytest.raises(SplitError, match="leaves test empty"):
        convert(source, str(tmp_path / "out"), split=str(tmp_path / "parts.csv"))
    bad.write_bytes(whole)
    report = convert(source, str(tmp_path / "out"), split=str(tmp_path / "parts.csv"))
    assert report.splits == {"train": 1, "val": 1, "test": 1}
