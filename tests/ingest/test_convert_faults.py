"""Every call to the store fails once: the dataset is there whole or not at all, and doing it again gives the same."""

import pytest

import fmristream
from fmristream.errors import FormatError, StorageError
from fmristream.ingest.convert import convert_into
from fmristream.ingest.options import ConvertOptions
from fmristream.storage import open_store
from tests.ingest.cohorts import bold, contents, stored_bytes_of, write_runs
from tests.ingest.failing_store import FailingStore

OPTIONS = ConvertOptions(mask="none", split="none", space="MNI")
RUNS = {"sub-1_bold": bold(shape=(3, 4, 3, 3)), "sub-2_bold": bold("f4", seed=1, shape=(3, 4, 3, 2))}


def whole(url: str) -> bool:
    """Whether there is a dataset; what there is must be all of it."""
    try:
        found = contents(url)
    except FormatError as error:
        assert "no dataset here" in str(error)
        return False
    assert found == {name: stored_bytes_of(stored) for name, stored in RUNS.items()}
    return True


@pytest.mark.parametrize("answer_lost", [False, True])
def test_every_call_fails_once_and_nothing_half_done_is_seen(tmp_path, memory_url, answer_lost):
    source = write_runs(tmp_path / "in", RUNS, gzipped=False)
    expected = fmristream.convert(source, memory_url, options=OPTIONS).content_digest
    failed, resumed = 0, 0
    for fail_at in range(1, 1000):
        url = f"{memory_url}-{fail_at}"
        store = FailingStore(open_store(url), fail_at=fail_at, answer_lost=answer_lost)
        try:
            digest = convert_into(source, store, options=OPTIONS).content_digest
        except StorageError as error:
            failed += 1
            assert store.has_failed
            assert "memory://" in str(error)
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
