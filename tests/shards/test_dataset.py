"""A dataset written by hand and read back: everything that was put in comes out, by name, number and window."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.sync import sync as zarr_sync

from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.shards import codec
from fmristream.shards import dataset as dataset_module
from fmristream.shards.dataset import open_dataset
from fmristream.shards.spaces import Space, read_space, space_document, write_space
from fmristream.signal.grid import Grid
from fmristream.storage import open_store
from tests.conftest import BUCKET
from tests.shards.tiny_dataset import (
    AFFINE,
    PARAMETERS,
    PARTICIPANTS,
    SKIPPED,
    small_shards,
    tiny_runs,
    write_dataset,
)

RUNS = tiny_runs()


@pytest.fixture
def tiny(dataset_url, monkeypatch):
    small_shards(monkeypatch.setattr)
    write_dataset(dataset_url)
    return open_dataset(dataset_url)


@pytest.fixture
def local(tmp_path, monkeypatch):
    small_shards(monkeypatch.setattr)
    write_dataset(str(tmp_path))
    return open_dataset(str(tmp_path))


def test_every_run_is_read_back_exactly_from_every_store(tiny):
    for run in RUNS:
        np.testing.assert_array_equal(tiny.read(run.name), run.scaled)
        np.testing.assert_array_equal(tiny.reader(run.name).read_stored(0, len(run.volumes)), run.values)


@pytest.fixture
def closed_http_sessions():
    yield
    for client in HTTPFileSystem._cache.values():
        if client._session is not None:
            sync(client.loop, client._session.close)
    HTTPFileSystem.clear_instance_cache()


def test_a_dataset_can_be_read_through_http(s3_endpoint, s3_url, closed_http_sessions):
    import boto3

    write_dataset(s3_url)
    client = boto3.client("s3")
    for key in open_store(f"s3://{BUCKET}").list(s3_url.rpartition("/")[2]):
        client.put_object_acl(Bucket=BUCKET, Key=key, ACL="public-read")
    client.close()
    served = open_dataset(s3_url.replace("s3://", f"{s3_endpoint}/"))
    np.testing.assert_array_equal(served.read("sub-01_bold", 3, 9), RUNS[0].scaled[3:9])
    with pytest.raises(UsageError, match="written to local folders"):
        served.store.put_new("a", b"")


@given(st.integers(0, 2), st.data())
def test_any_window_of_any_run_is_the_same_as_a_cut_of_the_whole(small_dataset, number, data):
    run = RUNS[number]
    start = data.draw(st.integers(0, len(run.volumes) - 1))
    stop = data.draw(st.integers(start + 1, len(run.volumes)))
    np.testing.assert_array_equal(small_dataset.read(run.name, start, stop), run.scaled[start:stop])
    packed = small_dataset.read(run.name, start, stop, packed=True)
    np.testing.assert_array_equal(packed, run.scaled[start:stop][:, run.mask])
    assert packed.dtype == np.float32


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch.setattr)
        write_dataset(url)
    return open_dataset(url)


def test_a_run_is_found_by_name_by_number_and_by_itself(local):
    assert [run.name for run in local.runs] == [run.name for run in RUNS]
    assert local.run(1) == local.run("sub-02_bold") == local.run(local.runs[1])
    assert local.run(-1).name == "sub-03_bold"
    for wrong in (3, -4, "sub-01", ""):
        with pytest.raises(UsageError):
            local.run(wrong)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 24), (5, 5), (7, 3), (23, 24), (23, None)])
def test_frames_that_are_not_there_are_refused(local, start, stop):
    with pytest.raises(UsageError, match="the run has 0 to 23"):
        local.read("sub-01_bold", start, stop)


def test_participants_skipped_inputs_and_parameters_come_back(local):
    assert list(local.participants) == PARTICIPANTS
    assert list(local.skipped) == SKIPPED
    assert local.parameters == PARAMETERS


def test_spaces_are_shared_by_the_runs_that_lie_in_them(local):
    assert local.space(0) is local.space(1)
    for run in RUNS:
        space = local.space(run.name)
        np.testing.assert_array_equal(space.mask, run.mask)
        assert space.grid == Grid(shape=run.mask.shape, affine=AFFINE)
        assert space.digest == local.run(run.name).space_digest


def test_per_voxel_vectors_come_back(local):
    for run in RUNS:
        reader = local.reader(run.name)
        wide = run.values.astype(np.float64)
        count = np.isfinite(wide).sum(axis=0)
        mean = np.nansum(wide, axis=0) / count
        sd = np.sqrt(np.nanmean((wide - mean) ** 2, axis=0))
        base = reader.reference.astype(np.float64) if reader.is_difference else 0
        np.testing.assert_allclose(reader.exact_moments[0] + base, mean, rtol=1e-6)
        np.testing.assert_allclose(reader.exact_moments[1], sd, rtol=1e-6)
        np.testing.assert_allclose(reader.moments[1].astype(float), sd, rtol=2**-10)
        assert reader.moments.shape == reader.exact_moments.shape == (2, run.mask.sum())
    np.testing.assert_array_equal(local.reader(0).own_mask, RUNS[0].own_mask[RUNS[0].mask])
    assert local.reader(1).own_mask is None
    assert local.reader(0).moments.dtype == local.reader(1).moments.dtype == np.float16
    assert local.reader(2).moments.dtype == np.float32


def test_floats_have_no_reference(local):
    with pytest.raises(UsageError, match="no reference"):
        _ = local.reader("sub-03_bold").reference


def test_the_zarr_group_of_a_run_is_handed_out(tiny):
    group = tiny.zarr("sub-01_bold")
    np.testing.assert_array_equal(group["residual"][:] + group["reference"][:], RUNS[0].values)
    with pytest.raises(ValueError, match="read-only"):
        group["residual"][0] = 0
    if tiny.url.startswith("s3://"):  # zarr leaves the client of its own event loop open
        zarr_sync(group.store.fs._s3.close())


@pytest.mark.parametrize("which", ["content", "generation"])
@pytest.mark.parametrize("cut", [8, 20, 64])
def test_a_pin_opens_what_it_names_and_nothing_else(local, which, cut):
    digest = local.content_digest if which == "content" else local.generation_digest
    assert open_dataset(local.url, digest=digest[:cut]).content_digest == local.content_digest
    assert open_dataset(local.url, digest="sha256:" + digest[:cut]).content_digest == local.content_digest
    wrong = ("0" if digest[0] != "0" else "1") + digest[1:cut]
    with pytest.raises(CorruptDataError, match="pinned to"):
        open_dataset(local.url, digest=wrong)


def test_the_content_digest_is_the_same_wherever_and_however_often_it_is_written(tmp_path, monkeypatch):
    urls = [str(tmp_path / name) for name in "abc"]
    write_dataset(urls[0])
    write_dataset(urls[1], RUNS[:1], RUNS[1:], write_id="another")
    small_shards(monkeypatch.setattr)
    write_dataset(urls[2], RUNS[::-1])
    found = [open_dataset(url) for url in urls]
    assert len({dataset.content_digest for dataset in found}) == 1
    assert len({dataset.generation_digest for dataset in found}) == 3


def test_several_segments_are_one_dataset(tmp_path):
    write_dataset(str(tmp_path), RUNS[2:], RUNS[:1], RUNS[1:2])
    dataset = open_dataset(str(tmp_path))
    assert [run.name for run in dataset.runs] == [run.name for run in RUNS]
    for run in RUNS:
        np.testing.assert_array_equal(dataset.read(run.name), run.scaled)


def test_a_later_generation_leaves_readers_of_the_earlier_one_undisturbed(local):
    again = replace(RUNS[0], volumes=RUNS[0].volumes + 1)
    write_dataset(local.url, [again, *RUNS[1:]], number=2, parent=local.generation_digest)
    later = open_dataset(local.url)
    assert later.generation.number == 2
    assert later.generation.document["parent"] == local.generation_digest
    np.testing.assert_array_equal(later.read(0), again.scaled)
    np.testing.assert_array_equal(local.read(0), RUNS[0].scaled)
    assert later.content_digest != local.content_digest


def test_two_runs_of_one_name_are_refused(tmp_path):
    write_dataset(str(tmp_path), [RUNS[0], replace(RUNS[1], name=RUNS[0].name)])
    with pytest.raises(CorruptDataError, match="two runs are called 'sub-01_bold'"):
        open_dataset(str(tmp_path)).read(0)


def test_tables_and_generation_that_do_not_belong_together_are_refused(tmp_path):
    from fmristream.shards.generation import commit
    from tests.shards.tiny_dataset import generation_content

    store = open_store(str(tmp_path))
    content = generation_content(store, RUNS)
    commit(store, number=1, parent=None, write_id="w", content={**content, "parameters": {"codec": "other"}})
    with pytest.raises(CorruptDataError, match="do not belong together"):
        _ = open_dataset(str(tmp_path)).content_digest


def test_a_space_of_an_unknown_kind_is_refused_when_it_is_needed(local):
    document = {**space_document(RUNS[0].space), "kind": "surface"}
    with pytest.raises(FormatError, match=r"'surface'.*newer"):
        read_space(local.store, digest=RUNS[0].space.digest, document=document)


def test_an_intact_mask_that_is_not_the_committed_one_is_refused(local):
    key = f"spaces/{RUNS[0].space.digest}/mask/c/0/0/0"
    local.store.delete(key)
    local.store.put_new(key, codec.encode((~RUNS[0].mask).astype(np.uint8)))
    with pytest.raises(CorruptDataError, match="not the one that was committed"):
        local.read(0)


def test_an_array_of_an_unknown_encoding_is_refused(local):
    reader = local.reader(0)
    other = replace(reader.arrays["residual"], encoding="wavelet")
    strange = replace(reader, arrays={**reader.arrays, "residual": other})
    with pytest.raises(FormatError, match=r"residual \(wavelet\)"):
        strange.read_stored(0, 1)


def test_a_space_is_stored_once_and_found_again(tmp_path):
    store = open_store(str(tmp_path))
    first = write_space(store, RUNS[0].space)
    assert write_space(store, RUNS[1].space) == first
    assert sorted(file.name for file in first) == store.list("spaces")
    found = read_space(store, digest=RUNS[0].space.digest, document=space_document(RUNS[0].space))
    assert isinstance(found, Space)
    np.testing.assert_array_equal(found.mask, RUNS[0].mask)


@given(st.tuples(*[st.integers(1, 5)] * 3), st.randoms())
def test_the_digest_of_a_space_is_that_of_its_grid_and_mask(shape, random):
    mask = np.array([random.random() < 0.5 for _ in range(int(np.prod(shape)))]).reshape(shape)
    space = Space(grid=Grid(shape=shape, affine=AFFINE), mask=mask)
    assert Space(grid=Grid(shape=shape, affine=AFFINE), mask=np.asfortranarray(mask)).digest == space.digest
    flipped = mask.copy()
    flipped[-1, -1, -1] ^= True
    assert Space(grid=space.grid, mask=flipped).digest != space.digest
    moved = (*AFFINE[:3], AFFINE[3] + 1e-9, *AFFINE[4:])
    assert Space(grid=Grid(shape=shape, affine=moved), mask=mask).digest != space.digest


def test_a_dataset_goes_through_pickle_and_reads_the_same(tiny):
    tiny.read(0)
    again = pickle.loads(pickle.dumps(tiny))
    np.testing.assert_array_equal(again.read(0), RUNS[0].scaled)
    assert again.content_digest == tiny.content_digest
    assert repr(again) == repr(tiny)


def test_many_threads_share_one_dataset(local):
    def read(number: int) -> bool:
        run = RUNS[number % 3]
        return np.array_equal(local.read(run.name), run.scaled, equal_nan=True)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))


def test_readers_that_were_not_used_lately_are_dropped(local, monkeypatch):
    monkeypatch.setattr(dataset_module, "CACHE_BYTES", 1)
    first = local.reader(0)
    assert local.reader(0) is first
    local.reader(1)
    assert local.reader(0) is not first
    np.testing.assert_array_equal(local.read(0), RUNS[0].scaled)
