"""Every call to the store fails once: the dataset is there whole or not at all, and doing it again gives the same."""

import resource
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

import fmristream
from fmristream.errors import StorageError
from fmristream.ingest.convert import convert_into
from fmristream.ingest.options import ConvertOptions
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, is_committed, six_runs, stored_bytes_of, write_runs
from tests.ingest.failing_store import FailingStore

OPTIONS = ConvertOptions(mask="none", split="none", space="MNI")
RUNS = {"sub-1_bold": bold(shape=(3, 4, 3, 3)), "sub-2_bold": bold("f4", seed=1, shape=(3, 4, 3, 2))}


def whole(url: str) -> bool:
    """Whether there is a dataset; what there is must be all of it."""
    if not is_committed(url):
        return False
    assert contents(url) == {name: stored_bytes_of(stored) for name, stored in RUNS.items()}
    return True


BACK_ENDS = ["memory", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("local", "s3", "rgw"))]


@pytest.mark.parametrize("kind", BACK_ENDS)
@pytest.mark.parametrize("answer_lost", [False, True])
def test_every_call_fails_once_and_nothing_half_done_is_seen(request, tmp_path, kind, answer_lost):
    root = str(tmp_path / "out") if kind == "local" else request.getfixturevalue(f"{kind}_url")
    source = write_runs(tmp_path / "in", RUNS, gzipped=False)
    expected = fmristream.convert(source, root, options=OPTIONS).content_digest
    failed, resumed = 0, 0
    for fail_at in range(1, 1000):
        url = f"{root}-{fail_at}"
        store = FailingStore(open_store(url), fail_at=fail_at, answer_lost=answer_lost)
        try:
            digest = convert_into(source, store, options=OPTIONS).content_digest
        except StorageError:
            failed += 1
            assert store.has_failed
            whole(url)
        else:
            assert digest == expected
            assert whole(url)
        again = fmristream.convert(source, url, options=OPTIONS)
        assert again.content_digest == expected
        assert whole(url)
        resumed += again.resumed
        if not store.has_failed:
            break
    else:
        pytest.fail("the conversion calls its store without end")
    assert failed > 30
    assert resumed > 20


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_store_that_fails_at_the_commit_leaves_a_dataset_or_none_and_the_rerun_finishes_it(
    tmp_path, memory_url, answer_lost
):
    source = write_runs(tmp_path / "in", RUNS, gzipped=False)
    inner = open_store(memory_url)

    class FailsAtCommit(FailingStore):
        def put_new(self, key: str, data: bytes) -> None:
            if key.startswith("generations/"):
                if answer_lost:
                    inner.put_new(key, data)
                raise StorageError(f"{self.name}/{key}: no answer")
            super().put_new(key, data)

    if answer_lost:
        convert_into(source, FailsAtCommit(inner), options=OPTIONS)
        assert whole(memory_url)
    else:
        with pytest.raises(StorageError, match="no answer"):
            convert_into(source, FailsAtCommit(inner), options=OPTIONS)
        assert not whole(memory_url)
    report = fmristream.convert(source, memory_url, options=OPTIONS)
    assert (report.already_there, report.resumed) == ((True, 0) if answer_lost else (False, 2))


def test_a_full_disk_is_a_storage_error_and_the_rest_is_done_when_there_is_room(tmp_path):
    runs = {f"sub-{n}_bold": bold(seed=n, shape=(12, 12, 12, 40)) for n in range(2)}
    source, url = write_runs(tmp_path / "in", runs), str(tmp_path / "out")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2_000, 30_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a file that grows beyond it fails as on a full disk
        try:
            with pytest.raises(StorageError, match="File too large"):
                fmristream.convert(source, url, options=OPTIONS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert not is_committed(url)
        assert not list((tmp_path / "out" / "tmp").iterdir())
    fmristream.convert(source, url, options=OPTIONS)
    assert contents(url) == {name: stored_bytes_of(stored) for name, stored in runs.items()}


@pytest.mark.parametrize("count", [2, 4])
def test_of_many_converters_into_one_target_one_commits_and_the_dataset_is_whole(tmp_path, dataset_url, count):
    source = six_runs(tmp_path / "in")
    expected = fmristream.convert(source, str(tmp_path / "alone"), options=OPTIONS).content_digest
    gate = Barrier(count)

    def attempt(_: int) -> str:
        gate.wait()
        try:
            return fmristream.convert(source, dataset_url, options=OPTIONS).content_digest
        except StorageError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(attempt, range(count)))
    assert expected in answers
    assert all(answer == expected or "another writer" in answer for answer in answers)
    assert contents(dataset_url) == contents(str(tmp_path / "alone"))
    assert fmristream.convert(source, dataset_url, options=OPTIONS).already_there
