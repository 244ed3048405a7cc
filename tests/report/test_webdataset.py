"""Tar shards: the webdataset package reads every window once, bit for bit; the bytes depend on nothing but the input."""

import dataclasses
import hashlib
import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.errors import CorruptDataError, SpaceError, StorageError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.tar_options import TarOptions
from fmristream.report.tar_plan import plan_tars
from fmristream.report.webdataset import TarReport, write_planned, write_webdataset
from fmristream.shards.dataset import Dataset
from fmristream.storage import open_store
from tests.ingest.failing_store import FailingStore
from tests.ingest.nifti_files import bold_like, nifti_bytes
from tests.report.datasets import SHAPE, brain_like, converted, write_runs
from tests.report.tars import members_of, objects_of, samples_of, unpacked, window_ids

COHORT = "synth://?subjects=6&runs=2&shape=7x8x6&frames=19&seed=3"
FRAMES = 4  # of a window: four fit into a run and leave a rest
OPTIONS = TarOptions(window=FRAMES, samples_per_shard=5)
LABELS = ("KAROLINE", "MAXIMILIAN", "THEODORA")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    url = str(tmp_path_factory.mktemp("cohort") / "dataset")
    fmristream.convert(COHORT, url, options=ConvertOptions(split="exact"))
    return fmristream.open(url)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Dataset:
    """Three subjects with names that can be searched for, int16 and float32, with slope and intercept."""
    folder = tmp_path_factory.mktemp("labelled")
    for number, label in enumerate(LABELS):
        name = f"sub-{label}/func/sub-{label}_task-rest_bold.nii"
        values = brain_like(seed=number) if number else bold_like(SHAPE, "f4")
        write_runs(
            folder / "source", {name: values}, scl_slope=0.5 if number else 1.0, scl_inter=-2.0 if number else 0.0
        )
    table = [
        "participant_id\tage\tsex\tcode",
        *(f"sub-{s}\t{30 + n}\t{'FMn/a'[n]}\tX{s}9" for n, s in enumerate(LABELS)),
    ]
    (folder / "source" / "participants.tsv").write_text("\n".join(table).replace("\tn\t", "\tn/a\t"))
    description = {"Name": "x", "BIDSVersion": "1.8.0"}
    (folder / "source" / "dataset_description.json").write_text(json.dumps(description))
    converted(folder / "source", folder / "dataset", ConvertOptions(mask="none", split="none", space="MNI"))
    return fmristream.open(str(folder / "dataset"))


def written(dataset: Dataset, folder: Path, options: TarOptions = OPTIONS, **more) -> TarReport:
    return write_webdataset(dataset, str(folder), options=dataclasses.replace(options, **more))


def clips(dataset: Dataset, split: str | None, **options) -> dict[tuple[str, int], dict]:
    """Every window of a part as StreamingDataset gives it, by run and start."""
    found = fmristream.StreamingDataset(dataset, window=FRAMES, split=split, **options)
    return {(item["run"], item["start"]): item for item in (found[number] for number in range(len(found)))}


@pytest.mark.parametrize(
    ("recipe", "arrays"),
    [("voxel-zscore", "packed"), ("global-minmax", "packed"), ("global-minmax", "placed"), ("none", "packed")],
)
def test_webdataset_reads_every_window_once_as_the_stream_gives_it(dataset, tmp_path, recipe, arrays):
    report = written(dataset, tmp_path / "out", normalize=recipe, arrays=arrays, with_subjects=True)
    assert [part.name for part in report.parts] == ["train", "val", "test"]
    for part in report.parts:
        expected = clips(dataset, part.name, normalize=recipe)
        mask = np.load(tmp_path / "out" / part.name / "mask.npy", allow_pickle=False)
        samples = samples_of(tmp_path / "out" / part.name)
        found = [(sample["json"]["run"], sample["json"]["start"]) for sample in samples]
        assert Counter(found) == Counter(window_ids(dataset, part.name, FRAMES))
        assert len(samples) == part.samples
        for sample, which in zip(samples, found, strict=True):
            record, bold = sample["json"], sample["bold.npy"]
            if arrays == "packed":
                bold = unpacked(bold, mask, record["fill"])
            assert bold.dtype == np.dtype("<f4")
            assert np.moveaxis(bold, 0, -1)[None].tobytes() == expected[which]["bold"].tobytes()
            assert record["subject"] == expected[which]["subject"]
            assert record["normalize"] == recipe


@pytest.mark.parametrize("arrays", ["packed", "placed"])
def test_raw_samples_are_the_stored_values_and_give_the_signal_with_slope_and_intercept(labelled, tmp_path, arrays):
    written(labelled, tmp_path / "out", arrays=arrays, with_subjects=True)
    samples = samples_of(tmp_path / "out" / "unsplit")
    assert {sample["bold.npy"].dtype.str for sample in samples} == {"<i2", "<f4"}
    for sample in samples:
        record, stop = sample["json"], sample["json"]["start"] + FRAMES
        stored = labelled.reader(record["run"]).read_stored(record["start"], stop)
        values = sample["bold.npy"]
        if arrays == "placed":  # whole volumes are stored: nothing lies outside the mask
            values = values.reshape(FRAMES, -1)
        assert values.tobytes() == stored.tobytes()
        with np.errstate(invalid="ignore"):  # the floats have NaNs of every kind
            signal = (values.astype(np.float64) * record["slope"] + record["inter"]).astype(np.float32)
        np.testing.assert_array_equal(signal, labelled.read(record["run"], record["start"], stop, packed=True))


def test_placed_raw_values_mean_nothing_outside_the_mask(dataset, tmp_path):
    written(dataset, tmp_path / "out", arrays="placed", parts=("val",))
    mask = np.load(tmp_path / "out" / "val" / "mask.npy")
    assert not mask.all()
    for sample in samples_of(tmp_path / "out" / "val"):
        record, values = sample["json"], sample["bold.npy"]
        assert (values[:, ~mask] * record["slope"] + record["inter"] == 0).all()
        assert values[:, mask].any()


def test_float16_is_the_nearest_to_float32(dataset, tmp_path):
    whole = {"normalize": "voxel-zscore", "parts": ("test",), "with_subjects": True}
    written(dataset, tmp_path / "single", **whole)
    written(dataset, tmp_path / "half", **whole, dtype="float16")
    for single, half in zip(
        samples_of(tmp_path / "single" / "test"), samples_of(tmp_path / "half" / "test"), strict=True
    ):
        assert half["bold.npy"].dtype == np.dtype("<f2")
        assert half["bold.npy"].tobytes() == single["bold.npy"].astype("<f2").tobytes()
        assert half["json"] == single["json"]


def test_a_grid_pads_and_cuts_placed_samples_as_the_stream_does(dataset, tmp_path):
    grid = (9, 5, 6)
    written(dataset, tmp_path / "out", arrays="placed", grid=grid, normalize="global-zscore", with_subjects=True)
    expected = clips(dataset, "train", normalize="global-zscore", grid=grid)
    for sample in samples_of(tmp_path / "out" / "train"):
        one = expected[sample["json"]["run"], sample["json"]["start"]]
        assert np.moveaxis(sample["bold.npy"], 0, -1)[None].tobytes() == one["bold"].tobytes()


def test_overlapping_windows_are_all_there(dataset, tmp_path):
    written(dataset, tmp_path / "out", stride=3, parts=("val",), with_subjects=True)
    found = Counter((s["json"]["run"], s["json"]["start"]) for s in samples_of(tmp_path / "out" / "val"))
    runs = [run for run in dataset.runs if run.split == "val"]
    assert found == Counter((run.name, start) for run in runs for start in range(0, run.frames - FRAMES + 1, 3))


def test_the_order_is_shuffled_and_another_seed_is_another_order(dataset, tmp_path):
    orders = {}
    for seed in (0, 1):
        written(dataset, tmp_path / str(seed), seed=seed, with_subjects=True)
        samples = samples_of(tmp_path / str(seed) / "train")
        orders[seed] = [(sample["json"]["run"], sample["json"]["start"]) for sample in samples]
        assert [sample["__key__"] for sample in samples] == [f"train-{n:09d}" for n in range(len(samples))]
    stored = sorted(window_ids(dataset, "train", FRAMES))
    assert sorted(orders[0]) == sorted(orders[1]) == stored
    assert stored != orders[0] != orders[1] != stored
    assert len({run for run, _ in orders[0][:5]}) > 1, "a shard holds windows of several runs"


@pytest.mark.parametrize("options", [{}, {"normalize": "voxel-zscore", "arrays": "placed", "dtype": "float16"}])
def test_every_byte_is_the_same_whoever_writes_with_however_many_workers(dataset, tmp_path, memory_url, options):
    first = {}
    for workers in (1, 2, 5):
        written(dataset, tmp_path / str(workers), workers=workers, **options)
        found = objects_of(open_store(str(tmp_path / str(workers))))
        assert len(found) > 8
        assert found == (first := first or found)
    write_webdataset(dataset, memory_url, options=dataclasses.replace(OPTIONS, **options))
    assert objects_of(open_store(memory_url)) == first


def test_another_conversion_of_the_same_data_gives_the_same_tars(dataset, tmp_path):
    fmristream.convert(COHORT, str(tmp_path / "again"), options=ConvertOptions(split="exact"))
    again = fmristream.open(str(tmp_path / "again"))
    assert [run.object for run in again.runs] != [run.object for run in dataset.runs]
    written(dataset, tmp_path / "a")
    written(again, tmp_path / "b")
    one, other = objects_of(open_store(str(tmp_path / "a"))), objects_of(open_store(str(tmp_path / "b")))
    del one["index.json"], other["index.json"]  # names the version that it was made of
    assert one == other


def test_shards_are_plain_sorted_tars_and_the_index_says_what_they_are(dataset, tmp_path):
    written(dataset, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    listed = {"index.json"}
    for name, part in index["parts"].items():
        assert sum(shard["samples"] for shard in part["shards"]) == part["samples"]
        for entry in (part["mask"], *part["shards"]):
            data = (tmp_path / "out" / entry["key"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
            listed.add(entry["key"])
        for shard in part["shards"]:
            members = members_of((tmp_path / "out" / shard["key"]).read_bytes())
            assert list(members) == sorted(members)
            assert len(members) == 2 * shard["samples"] <= 10
            assert all(member.startswith(name) for member in members)
            for member, data in members.items():
                if member.endswith(".npy"):
                    assert np.load(io.BytesIO(data), allow_pickle=False).shape == (FRAMES, part["voxels"])
    assert files == listed, "no notes and no scratch are left"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.json", *index["parts"]}
    assert index["source"]["content"] == dataset.content_digest


def test_no_label_of_a_subject_is_in_any_byte_unless_asked_for(labelled, tmp_path):
    written(labelled, tmp_path / "opaque", targets=("age", "sex"))
    written(labelled, tmp_path / "labels", targets=("age", "sex"), with_subjects=True)
    hits = {}
    for name in ("opaque", "labels"):
        data = [path.read_bytes() + str(path.name).encode() for path in (tmp_path / name).rglob("*") if path.is_file()]
        hits[name] = sum(label.lower().encode() in one.lower() for label in LABELS for one in data)
    assert hits["labels"] > 0, "else nothing was looked for"
    assert hits["opaque"] == 0
    assert str(labelled.url) not in (tmp_path / "opaque" / "index.json").read_text()


def test_opaque_names_tell_subjects_and_runs_apart_and_targets_stay_with_them(labelled, tmp_path):
    written(labelled, tmp_path / "opaque", targets=("age", "sex"))
    written(labelled, tmp_path / "labels", targets=("age", "sex"), with_subjects=True)
    pairs = {"run": set(), "subject": set(), "group": set()}
    ages = {}
    opaque, labels = (samples_of(tmp_path / name / "unsplit") for name in ("opaque", "labels"))
    for one, other in zip(opaque, labels, strict=True):
        assert one["bold.npy"].tobytes() == other["bold.npy"].tobytes()
        for name, found in pairs.items():
            found.add((one["json"][name], other["json"]["subject"]))
        assert one["json"]["targets"] == other["json"]["targets"]
        ages[other["json"]["subject"]] = tuple(one["json"]["targets"].values())
    for found in pairs.values():
        assert len(found) == len({left for left, _ in found}) == len(LABELS)
    assert ages == {LABELS[0]: (30, "F"), LABELS[1]: (31, "M"), LABELS[2]: (32, None)}


def test_a_column_that_repeats_labels_is_refused(labelled, tmp_path):
    with pytest.raises(UsageError, match="repeats subject labels"):
        written(labelled, tmp_path / "out", targets=("code",))
    written(labelled, tmp_path / "out", targets=("code",), with_subjects=True)


def shards_of(store) -> set[str]:
    return {key for part in ("train", "val", "test") for key in store.list(part) if key.endswith(".tar")}


@pytest.mark.parametrize("answer_lost", [False, True])
def test_whatever_call_fails_the_same_command_finishes_with_the_same_bytes(dataset, memory_url, answer_lost):
    plan = plan_tars(dataset, TarOptions(window=6, samples_per_shard=4, parts=("val",)))  # six samples
    counted = FailingStore(open_store(f"{memory_url}-whole"))
    write_planned(plan, counted)
    calls = counted.calls
    whole = objects_of(counted)
    resumed = failures = 0
    for fail_at in range(1, calls + 1):
        store = open_store(f"{memory_url}-{fail_at}")
        try:
            write_planned(plan, FailingStore(store, fail_at=fail_at, answer_lost=answer_lost))
        except StorageError:
            failures += 1
        visible = {key: store.read(key) for key in shards_of(store)}
        assert visible.items() <= whole.items(), "nothing partial has a name"
        resumed += write_planned(plan, store).resumed
        assert objects_of(store) == whole
        assert not store.list("pending")
    assert resumed > 0
    # A lost answer of "there is no such object" is no lost answer.
    assert failures == calls if not answer_lost else failures > calls / 2


def test_finished_shards_are_not_written_again(dataset, tmp_path):
    plan = plan_tars(dataset, OPTIONS)
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(StorageError):
        write_planned(plan, FailingStore(store, fail_at=60))
    finished = {key: (tmp_path / "out" / key).stat().st_ino for key in shards_of(store)}
    assert 0 < len(finished) < len(plan.shards)
    report = write_planned(plan, store)
    assert len(finished) - 1 <= report.resumed <= len(finished)
    assert {key: (tmp_path / "out" / key).stat().st_ino for key in finished} == finished


def test_a_shard_that_is_there_and_not_ours_is_told(dataset, tmp_path):
    plan = plan_tars(dataset, OPTIONS)
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(StorageError):
        write_planned(plan, FailingStore(store, fail_at=20))
    missing = next(shard.key for shard in plan.shards if shard.key not in shards_of(store))
    store.put_new(missing, b"something else")
    with pytest.raises(CorruptDataError, match="not what this dataset"):
        write_planned(plan, store)


def test_a_second_time_nothing_is_written(dataset, tmp_path):
    assert not written(dataset, tmp_path / "out").already_there
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = written(dataset, tmp_path / "out", workers=3)
    assert again.already_there
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"window": 5}, {"with_subjects": True}, {"normalize": "voxel-zscore"}])
def test_other_options_are_refused_where_shards_are_finished_or_begun(dataset, tmp_path, other):
    written(dataset, tmp_path / "done")
    with pytest.raises(UsageError, match=r"not of this dataset with these options"):
        written(dataset, tmp_path / "done", **other)
    store = open_store(str(tmp_path / "begun"))
    with pytest.raises(StorageError):
        write_planned(plan_tars(dataset, OPTIONS), FailingStore(store, fail_at=60))
    with pytest.raises(UsageError, match="unfinished shards"):
        written(dataset, tmp_path / "begun", **other)
    assert written(dataset, tmp_path / "begun").resumed > 0


def test_two_writers_of_the_same_shards_end_in_the_same_bytes(dataset, tmp_path):
    """The second comes in whenever the first has written something, and finishes before it."""
    plan = plan_tars(dataset, OPTIONS)
    store = open_store(str(tmp_path / "out"))
    write_planned(plan, reference := open_store(str(tmp_path / "reference")))
    reports = []

    def overtake(done: int, total: int) -> None:
        if done == 7:
            reports.append(write_planned(plan, store))

    reports.append(write_planned(plan, store, progress=overtake))
    assert len(reports) == 2
    assert objects_of(store) == objects_of(reference)


def test_other_things_are_left_alone(dataset, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("x")
    with pytest.raises(UsageError, match=r"letter\.txt"):
        written(dataset, tmp_path / "out")
    with pytest.raises(UsageError, match="other things"):
        write_webdataset(dataset, dataset.url, options=OPTIONS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_a_dry_run_counts_and_writes_nothing(dataset, tmp_path):
    planned = write_webdataset(dataset, str(tmp_path / "out"), options=OPTIONS, dry_run=True)
    assert not (tmp_path / "out").exists()
    done = written(dataset, tmp_path / "out")
    for before, after in zip(planned.parts, done.parts, strict=True):
        assert dataclasses.replace(before, bytes=0) == dataclasses.replace(after, bytes=0)
        assert 0.5 < before.bytes / after.bytes < 2


def test_damage_in_the_dataset_stops_it_and_names_the_run(tmp_path, dataset):
    fmristream.convert(COHORT, str(tmp_path / "damaged"), options=ConvertOptions(split="exact"))
    damaged = fmristream.open(str(tmp_path / "damaged"))
    run = damaged.runs[3]
    [shard] = (tmp_path / "damaged" / run.object / "residual" / "c").rglob("0/0")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptDataError, match=run.name):
        written(damaged, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_shards_in_a_bucket_are_those_on_disk(dataset, tmp_path, s3_url):
    options = dataclasses.replace(OPTIONS, workers=2)
    write_webdataset(dataset, s3_url, options=options)
    written(dataset, tmp_path / "out")
    assert objects_of(open_store(s3_url)) == objects_of(open_store(str(tmp_path / "out")))
    assert write_webdataset(dataset, s3_url, options=options).already_there


def test_runs_too_short_for_a_window_are_told(tmp_path):
    write_runs(tmp_path / "in", {"sub-1_bold.nii": brain_like(), "sub-2_bold.nii": brain_like((5, 4, 6, 3), seed=1)})
    converted(tmp_path / "in", tmp_path / "d", ConvertOptions(mask="none", split="none", space="MNI"))
    report = written(fmristream.open(str(tmp_path / "d")), tmp_path / "out")
    assert "1 runs are shorter than a window" in report.warnings[0]
    assert (report.parts[0].runs, report.parts[0].samples) == (1, 1)


def test_what_makes_no_sense_is_refused_with_a_reason(dataset, tmp_path):
    for options, reason in (
        ({"normalize": "zscore"}, "no such normalisation"),
        ({"dtype": "float16"}, "raw values keep the stored dtype"),
        ({"dtype": "float16", "normalize": "none"}, "not normalised"),
        ({"grid": (8, 8, 8)}, "--arrays placed"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0"),
        ({"workers": 0}, "--workers 0"),
        ({"parts": ("train", "train")}, "twice"),
        ({"parts": ("training",)}, "has no part training; it has train, val, test"),
        ({"targets": ("height",)}, "--targets height"),
        ({"window": 20}, "no run of part train has 20 frames"),
    ):
        with pytest.raises(UsageError, match=reason):
            written(dataset, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_raw_values_that_cannot_mean_zero_are_not_placed(tmp_path):
    image = nifti_bytes(brain_like(), scl_slope=1.0, scl_inter=0.5)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub-1_bold.nii").write_bytes(image)
    converted(tmp_path / "in", tmp_path / "d", ConvertOptions(mask="none", split="none"))
    dataset = fmristream.open(str(tmp_path / "d"))
    with pytest.raises(UsageError, match="no stored value means 0"):
        written(dataset, tmp_path / "out", arrays="placed")
    written(dataset, tmp_path / "out")
    assert {sample["json"]["fill"] for sample in samples_of(tmp_path / "out" / "unsplit")} == {None}


def test_runs_of_several_grids_or_unaligned_spaces_are_not_mixed(tmp_path):
    two = {"sub-1_bold.nii": brain_like(), "sub-2_bold.nii": brain_like(seed=1)}
    write_runs(tmp_path / "in", two, sform_code=1)
    converted(tmp_path / "in", tmp_path / "d")
    dataset = fmristream.open(str(tmp_path / "d"))
    with pytest.raises(SpaceError, match="do not correspond"):
        written(dataset, tmp_path / "out")
    written(dataset, tmp_path / "out", mix_spaces=True)
    write_runs(tmp_path / "in", {"sub-3_bold.nii": brain_like((5, 4, 7, 6))})
    converted(tmp_path / "in", tmp_path / "e")
    with pytest.raises(SpaceError, match="2 grids or masks"):
        written(fmristream.open(str(tmp_path / "e")), tmp_path / "more", mix_spaces=True)


def test_memory_holds_a_few_windows_and_never_a_shard(tmp_path):
    cohort = "synth://?subjects=2&shape=24x24x24&frames=120&seed=1"
    fmristream.convert(cohort, str(tmp_path / "d"), options=ConvertOptions(split="none"))
    dataset = fmristream.open(str(tmp_path / "d"))
    options = TarOptions(window=6, stride=2, arrays="placed", normalize="voxel-zscore")
    written(dataset, tmp_path / "warm", options, samples_per_shard=3, parts=None)  # compiled, cached vectors in memory
    window_bytes = 6 * 24**3 * 4
    tracemalloc.start()
    try:
        written(dataset, tmp_path / "out", options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    [shard] = (tmp_path / "out" / "unsplit").glob("*.tar")
    assert shard.stat().st_size > 100 * window_bytes
    assert peak < 8 * window_bytes
