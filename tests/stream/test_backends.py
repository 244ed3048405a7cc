"""Where a dataset lies changes no bit of a batch, and a window costs one request."""

import shutil

import pytest
import torch

import fmristream
from fmristream.ingest.options import ConvertOptions
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.stream.conftest import COHORT
from tests.stream.stores import CountingStore, opened_through
from tests.stream.worlds import epochs, same

BATCH = 6


def clips_of(source, **changes) -> StreamingDataset:
    return StreamingDataset(source, **{"window": 7, "split": "train", "seed": 2, "targets": ("sex",), **changes})


@pytest.fixture(scope="module")
def expected(cohort_url) -> list[dict]:
    return epochs(clips_of(cohort_url), 1, batch_size=BATCH)


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_store_in_memory_or_in_a_bucket_gives_the_batches_of_a_local_one(request, kind, cohort_url, expected):
    url = request.getfixturevalue(f"{kind}_url")
    report = fmristream.convert(COHORT, url, options=ConvertOptions(split="exact"))
    assert report.content_digest == fmristream.open(cohort_url).content_digest
    found = epochs(clips_of(url), 1, batch_size=BATCH, threads=2)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_a_moved_folder_gives_the_same_batches(cohort_url, expected, tmp_path):
    moved = shutil.copytree(cohort_url, tmp_path / "elsewhere" / "b")
    found = epochs(clips_of(f"file://{moved}"), 1, batch_size=BATCH)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("normalize", ["voxel-zscore", "global-zscore", "none"])
def test_a_window_costs_one_range_request_once_its_run_is_known(cohort_url, normalize):
    dataset = opened_through(cohort_url, CountingStore)
    clips = clips_of(dataset, normalize=normalize)
    for number in range(len(clips)):
        clips[number]
    counted = dataset.store
    counted.forget()
    for number in range(len(clips)):
        clips[number]
    assert sum(counted.calls.values()) == len(clips)
    assert {verb for verb, _ in counted.calls} == {"read_range"}


@pytest.mark.parametrize(("normalize", "extra"), [("voxel-zscore", 2), ("global-zscore", 2), ("none", 2)])
def test_a_runs_first_window_costs_its_index_block_and_one_vector_more(cohort_url, normalize, extra):
    dataset = opened_through(cohort_url, CountingStore)
    clips = clips_of(dataset, normalize=normalize)
    assert len(clips[0]["bold"]) == 1
    dataset.store.forget()
    other = next(number for number in range(len(clips)) if clips.locate(number)[0] != clips.locate(0)[0])
    assert len(clips[other]["bold"]) == 1
    assert sum(dataset.store.calls.values()) == 1 + extra


def test_a_window_fetches_the_bytes_of_its_own_frames_and_no_others(cohort_url):
    dataset = opened_through(cohort_url, CountingStore)
    clips = clips_of(dataset)
    run, start = clips.locate(3)
    for number in range(len(clips)):
        clips[number]
    dataset.store.forget()
    assert len(clips[3]["bold"]) == 1
    assert dataset.store.bytes == int(dataset.reader(run).lengths[start : start + 7].sum())


def test_a_loader_reads_every_window_of_an_epoch_once(cohort_url):
    dataset = opened_through(cohort_url, CountingStore)
    with StreamingLoader(clips_of(dataset, seed=None), batch_size=BATCH, threads=2) as loader:
        for _ in loader:
            pass
        dataset.store.forget()
        for _ in loader:
            pass
        padded = len(loader) * BATCH
    frames = [count for (verb, key), count in dataset.store.calls.items() if "/c/" in key and verb == "read_range"]
    assert sum(frames) == padded


def test_opening_costs_few_requests_whatever_the_number_of_runs(cohort_url):
    dataset = opened_through(cohort_url, CountingStore)
    assert len(dataset.runs) == 16
    clips = clips_of(dataset)
    assert clips.num_windows
    # Hint, generation, a look behind it; runs, arrays, participants and the space, side by side.
    assert sum(dataset.store.calls.values()) <= 7


def test_windows_across_shards_take_one_request_per_shard(tmp_path, monkeypatch):
    from fmristream.shards import frames

    monkeypatch.setattr(frames, "SHARD_BYTES", 5 * 336 * 2 * 2)
    url = str(tmp_path / "dataset")
    options = ConvertOptions(mask="none", split="none")
    fmristream.convert("synth://?subjects=2&shape=6x8x7&frames=29&seed=5", url, options=options)
    dataset = opened_through(url, CountingStore)
    per_shard = dataset.reader(0).frames_array.frames_per_shard
    assert 1 < per_shard < 16
    clips = StreamingDataset(dataset, window=16, stride=1, normalize="none")
    whole = torch.from_numpy(dataset.read(0))
    for number in range(14):
        clips[number]
    for number in range(14):
        dataset.store.forget()
        bold = torch.from_numpy(clips[number]["bold"][0])
        assert torch.equal(bold.movedim(-1, 0), whole[number : number + 16])
        touched = (number + 15) // per_shard - number // per_shard + 1
        assert sum(dataset.store.calls.values()) == touched
