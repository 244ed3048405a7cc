"""Which runs are streamed together, and what they are labelled with: never voxels that do not correspond."""

import math
import pickle

import numpy as np
import pytest

import fmristream
from fmristream.errors import SpaceError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.stream.clips import StreamingDataset
from tests.ingest.nifti_files import AFFINE, nifti_bytes
from tests.stream.test_normalization import brain_like

SHIFTED = (AFFINE[0], AFFINE[1], (0.125, 0.0, 4.0, -60.0))


def convert_folder(folder, files: dict[str, bytes], *, table: str = "", **options) -> str:
    """A dataset of these files; `table` becomes participants.tsv."""
    source = folder / "source"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    if table:
        (source / "participants.tsv").write_text(table)
    given = {"mask": "none", "split": "none", **options}
    fmristream.convert(str(source), str(folder / "dataset"), options=ConvertOptions(**given))
    return str(folder / "dataset")


def bold(seed: int = 0, **header) -> bytes:
    return nifti_bytes(brain_like("i2", seed=seed), **header)


FILES = {f"sub-{label}_bold.nii": bold(seed) for seed, label in enumerate("abcd")}
TABLE = (
    "participant_id\tsex\tage\tsite\tmood\n"
    "sub-a\tM\t31.5\tzürich\tn/a\n"
    "sub-b\tF\tn/a\tbern\tn/a\n"
    "sub-c\tn/a\t70\tn/a\tn/a\n"
)


@pytest.fixture
def labelled_url(tmp_path) -> str:
    return convert_folder(tmp_path, FILES, table=TABLE, space="MNI")


def targets_of(clips: StreamingDataset, name: str) -> dict[str, float]:
    with fmristream.StreamingLoader(clips, batch_size=2) as loader:
        return {
            subject: value
            for batch in loader
            for subject, value in zip(batch.subject, batch.targets[name].tolist(), strict=True)
        }


def test_numbers_are_targets_as_they_are_and_what_is_missing_is_nan(labelled_url):
    clips = StreamingDataset(labelled_url, window=5, targets=("age",))
    found = targets_of(clips, "age")
    assert (found["a"], found["c"]) == (31.5, 70.0)
    assert math.isnan(found["b"])
    assert math.isnan(found["d"])  # in no row of the table
    assert clips.target_labels == {"age": ()}


def test_words_are_coded_in_sorted_order(labelled_url):
    clips = StreamingDataset(labelled_url, window=5, targets=("sex", "site"))
    assert clips.target_labels == {"sex": ("F", "M"), "site": ("bern", "zürich")}
    found = targets_of(clips, "sex")
    assert (found["a"], found["b"]) == (1.0, 0.0)
    assert math.isnan(found["c"])
    assert targets_of(clips, "site")["a"] == 1.0


def test_codes_are_the_same_in_every_split_even_where_a_word_is_missing(tmp_path):
    (tmp_path / "parts.csv").write_text("subject,split\na,train\nb,val\nc,test\nd,train\n")
    table = "participant_id\tsite\nsub-a\tz\nsub-b\ty\nsub-c\tx\nsub-d\tz\n"
    url = convert_folder(tmp_path, FILES, table=table, space="MNI", split=str(tmp_path / "parts.csv"))
    for split, expected in {"train": {"a": 2.0, "d": 2.0}, "val": {"b": 1.0}, "test": {"c": 0.0}}.items():
        clips = StreamingDataset(url, window=5, split=split, targets=("site",))
        assert clips.target_labels == {"site": ("x", "y", "z")}
        assert targets_of(clips, "site") == expected


def test_the_map_style_items_carry_the_same_targets(labelled_url):
    clips = StreamingDataset(labelled_url, window=5, targets=("age", "sex"))
    by_number = {number: clips[number] for number in range(len(clips))}
    for item in by_number.values():
        expected = targets_of(clips, "age")[item["subject"]]
        assert np.array_equal(item["targets"]["age"], np.float32(expected), equal_nan=True)


def test_a_column_without_values_gives_nan_for_everybody(labelled_url):
    found = targets_of(StreamingDataset(labelled_url, window=5, targets=("mood",)), "mood")
    assert len(found) == 4
    assert all(map(math.isnan, found.values()))


def test_an_unknown_column_is_refused_and_the_known_ones_are_named(labelled_url):
    with pytest.raises(UsageError, match=r"no column 'gender'.*age, mood, sex, site"):
        StreamingDataset(labelled_url, window=5, targets=("gender",))


def test_a_dataset_without_participants_says_so(tmp_path):
    url = convert_folder(tmp_path, FILES, space="MNI")
    with pytest.raises(UsageError, match="had no participants table"):
        StreamingDataset(url, window=5, targets=("age",))


def test_subjects_in_an_undeclared_space_are_not_mixed(tmp_path):
    url = convert_folder(tmp_path, {name: bold(sform_code=1) for name in FILES})
    with pytest.raises(SpaceError, match=r"'native'.*4 subjects"):
        StreamingDataset(url, window=5)
    assert StreamingDataset(url, window=5, mix_spaces=True).num_windows == 16


def test_one_subject_alone_corresponds_to_itself(tmp_path):
    names = ("sub-a_run-1_bold.nii", "sub-a_run-2_bold.nii")
    url = convert_folder(tmp_path, {name: bold(sform_code=1) for name in names})
    assert StreamingDataset(url, window=5).num_windows == 8


def test_two_sessions_of_a_subject_do_not_correspond_without_a_template(tmp_path):
    names = ("sub-a_ses-1_bold.nii", "sub-a_ses-2_bold.nii")
    url = convert_folder(tmp_path, {name: bold(sform_code=1) for name in names})
    with pytest.raises(SpaceError, match="sessions do not correspond"):
        StreamingDataset(url, window=5)


def test_a_declared_space_is_believed(tmp_path):
    url = convert_folder(tmp_path, {name: bold(sform_code=1) for name in FILES}, space="MNI152NLin2009cAsym")
    assert StreamingDataset(url, window=5).num_windows == 16


def test_runs_on_two_grids_are_not_mixed_even_if_asked(tmp_path):
    url = convert_folder(tmp_path, {"sub-a_bold.nii": bold(), "sub-b_bold.nii": bold(srow=SHIFTED)}, space="MNI")
    for mix_spaces in (False, True):
        with pytest.raises(SpaceError, match="2 grids or masks"):
            StreamingDataset(url, window=5, mix_spaces=mix_spaces)


def test_runs_with_different_numbers_of_voxels_are_never_mixed(tmp_path):
    other = nifti_bytes(brain_like("i2", shape=(6, 4, 3, 23)))
    url = convert_folder(tmp_path, {"sub-a_bold.nii": bold(), "sub-b_bold.nii": other}, space="MNI")
    with pytest.raises(SpaceError, match="2 grids or masks"):
        StreamingDataset(url, window=5, mix_spaces=True)


def test_runs_in_two_spaces_are_refused_and_both_are_named(tmp_path):
    files = {"sub-a_space-MNI_bold.nii": bold(), "sub-b_space-TAL_bold.nii": bold()}
    url = convert_folder(tmp_path, files)
    with pytest.raises(SpaceError, match="MNI, TAL"):
        StreamingDataset(url, window=5)
    assert StreamingDataset(url, window=5, mix_spaces=True).num_windows == 8


def test_an_empty_split_is_refused_and_the_present_ones_are_named(labelled_url, cohort_url):
    with pytest.raises(UsageError, match="was not split"):
        StreamingDataset(labelled_url, window=5, split="train")
    with pytest.raises(UsageError, match="test, train, val"):
        StreamingDataset(cohort_url, window=5, split="validation")


def test_a_selection_of_runs_shorter_than_the_window_is_refused_by_the_loader(labelled_url):
    clips = StreamingDataset(labelled_url, window=24)
    assert clips.num_windows == 0
    with pytest.raises(UsageError, match="shorter than the window"):
        fmristream.StreamingLoader(clips, batch_size=1)


def test_a_window_number_outside_is_an_index_error(labelled_url):
    clips = StreamingDataset(labelled_url, window=5)
    assert clips[-1]["window"] == 15
    for number in (16, -17):
        with pytest.raises(IndexError, match="there are 16"):
            clips[number]


def test_a_pickled_dataset_streams_the_same(cohort_url):
    clips = StreamingDataset(cohort_url, window=7, seed=1, split="train", targets=("sex",), grid=(8, 8, 8))
    assert np.array_equal(clips[3]["bold"], pickle.loads(pickle.dumps(clips))[3]["bold"])
    other = pickle.loads(pickle.dumps(clips))
    assert other.selection_digest == clips.selection_digest
    assert other.target_labels == {"sex": ("F", "M")}


def test_the_order_does_not_depend_on_names_of_objects_or_where_the_data_lie(cohort_url, tmp_path):
    from tests.stream.conftest import COHORT

    again = str(tmp_path / "again")
    fmristream.convert(COHORT, again, options=ConvertOptions(split="exact"))
    one, other = (StreamingDataset(url, window=7, split="train", seed=1) for url in (cohort_url, again))
    assert one.selection_digest == other.selection_digest
    assert one.generation_digest != other.generation_digest


def test_a_cache_keeps_the_conditions_of_the_dataset_that_it_is_given_with(labelled_url, tmp_path):
    chosen = fmristream.open(labelled_url).where("sex is not missing").where("age > 30")
    plain = StreamingDataset(chosen, window=5, seed=1)
    cached = StreamingDataset(chosen, window=5, seed=1, cache=tmp_path / "cache")
    assert cached.subjects == plain.subjects == ("a",)
    assert cached.state(0) == plain.state(0)


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [({"normalize": None}, "'none' leaves values alone"), ({"step": None}, "1 is every frame")],
)
def test_arguments_of_another_kind_are_refused_in_words(labelled_url, wrong, shown):
    with pytest.raises(UsageError, match=shown):
        StreamingDataset(labelled_url, window=5, **wrong)


def test_a_path_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(UsageError, match=r"str\(path\)"):
        fmristream.open(tmp_path)
