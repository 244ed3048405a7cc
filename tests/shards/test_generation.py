"""Commits: visible whole or not at all, one winner, found again whatever became of the hint."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fmristream.errors import CorruptDataError, FmriStreamError, FormatError, ObjectMissingError, StorageError
from fmristream.shards import FORMAT_VERSION
from fmristream.shards.digest import canonical_json, sha256_json
from fmristream.shards.generation import HINT, Generation, commit, key_of, newest_generation, parse
from fmristream.storage import Store, open_store


@pytest.fixture
def store(dataset_url) -> Store:
    return open_store(dataset_url)


def commit_number(store: Store, number: int, write_id: str = "w", **content) -> Generation:
    return commit(store, number=number, parent=None, write_id=write_id, content=content)


def test_what_was_committed_is_the_newest(store):
    committed = commit_number(store, 1, x=[1.5, None, "é"])
    found = newest_generation(store)
    assert (found.number, found.digest) == (1, committed.digest)
    assert found.document == committed.document
    assert found.document["x"] == [1.5, None, "é"]
    assert (found.document["version"], found.document["requires"], found.document["parent"]) == (
        FORMAT_VERSION,
        [],
        None,
    )


def test_the_digest_of_a_generation_is_that_of_its_canonical_json(store):
    digest = commit_number(store, 1, x=1).digest
    stored = json.loads(store.read(key_of(1)))
    assert stored.pop("digest") == digest == sha256_json(stored)
    assert store.read(key_of(1)) == canonical_json({**stored, "digest": digest})


def test_without_a_commit_there_is_no_dataset(store):
    for key in ("tables/a", "runs/b", "pending/c"):
        store.put_new(key, b"1")
    with pytest.raises(FormatError, match="no dataset here"):
        newest_generation(store)


def test_a_folder_that_is_not_there_is_no_dataset(dataset_url):
    with pytest.raises(FormatError, match="no dataset here"):
        newest_generation(open_store(f"{dataset_url}/nowhere"))


@pytest.mark.parametrize("hinted", [1, 2, 3])
def test_a_stale_hint_never_gives_an_old_answer(store, hinted):
    hints = []
    for number in (1, 2, 3):
        commit_number(store, number)
        hints.append(store.read(HINT))
    store.replace_hint(HINT, hints[hinted - 1])
    assert newest_generation(store).number == 3


@pytest.mark.parametrize(
    "hint",
    [b"", b"{", b"[]", b"1", b"null", b"\xff\xfe\x00", b'{"generation":1}', b'{"generation":NaN}', b'{"generation":1e999}',
     b'{"generation":"1"}', b'{"generation":-1}', b'{"generation":1,"x":NaN}', b"[" * 100_000, b"\0" * 100],
)  # fmt: skip
def test_a_damaged_hint_is_no_hint(store, hint):
    for number in (1, 2):
        commit_number(store, number)
    store.replace_hint(HINT, hint)
    assert newest_generation(store).number == 2


def test_a_missing_hint_is_no_hint(store):
    for number in (1, 2, 10):
        commit_number(store, number)
    store.delete(HINT)
    assert newest_generation(store).number == 10


def test_every_bit_flip_of_the_hint_is_harmless(memory_url):
    store = open_store(memory_url)
    for number in (1, 2):
        commit_number(store, number)
    hint = store.read(HINT)
    for bit in range(8 * len(hint)):
        damaged = bytearray(hint)
        damaged[bit // 8] ^= 1 << bit % 8
        store.replace_hint(HINT, bytes(damaged))
        assert newest_generation(store).number == 2


def test_other_files_among_the_generations_are_not_generations(store):
    commit_number(store, 1)
    store.delete(HINT)
    for name in ("notes.json", "1.json.bak", "01x.json", "2.txt", "-3.json"):
        store.put_new(f"generations/{name}", b"x")
    assert newest_generation(store).number == 1


def test_a_lost_newest_generation_is_an_error_and_not_the_one_before(store):
    for number in (1, 2):
        commit_number(store, number)
    store.delete(key_of(2))
    with pytest.raises(CorruptDataError, match=r"generations/2\.json: is named by dataset\.json and missing"):
        newest_generation(store)
    store.delete(HINT)
    assert newest_generation(store).number == 1


@given(st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b'{"digest":"x","digest":"y"}')
@example(b'{"digest":[1],"requires":5}')
@example(b'{"a":NaN}')
def test_bytes_that_are_no_generation_are_refused(data):
    with pytest.raises(CorruptDataError):
        parse(data, number=1, where="x")


def test_every_bit_flip_of_a_generation_is_noticed(memory_url):
    store = open_store(memory_url)
    commit_number(
        store, 1, content_digest="0" * 64, spaces={"a": {"affine": [1.0, -2.5]}}, split={"kind": "hash", "seed": 0}
    )
    data = store.read(key_of(1))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            parse(bytes(damaged), number=1, where="x")


@given(st.data())
def test_a_generation_cut_short_or_with_bytes_behind_it_is_noticed(data):
    document = {"generation": 1, "requires": [], "version": FORMAT_VERSION}
    whole = canonical_json({**document, "digest": sha256_json(document)})
    parse(whole, number=1, where="x")
    for damaged in (
        whole[: data.draw(st.integers(0, len(whole) - 1))],
        whole + data.draw(st.binary(min_size=1, max_size=5)),
    ):
        with pytest.raises(CorruptDataError):
            parse(damaged, number=1, where="x")


def test_a_generation_under_another_number_is_refused(store):
    commit_number(store, 1)
    store.put_new(key_of(2), store.read(key_of(1)))
    with pytest.raises(CorruptDataError, match=r"generations/2\.json"):
        newest_generation(store)


def signed(**changes) -> bytes:
    document = {"generation": 1, "requires": [], "version": FORMAT_VERSION, **changes}
    return canonical_json({**document, "digest": sha256_json(document)})


def test_a_later_version_is_refused_with_advice():
    with pytest.raises(FormatError, match=r"needs format version 2.*newer release"):
        parse(signed(version=2), number=1, where="x")


def test_a_feature_that_is_not_known_is_refused_by_name():
    with pytest.raises(FormatError, match="needs censoring, wavelets"):
        parse(signed(requires=["wavelets", "censoring"]), number=1, where="x")


def test_a_digest_of_bulk_data_that_is_not_known_is_refused_by_name():
    with pytest.raises(FormatError, match=r"x: bulk data have the digest 'k12'.*newer release"):
        parse(signed(bulk_digest="k12"), number=1, where="x")


@pytest.mark.parametrize(("content", "requires"), [({}, []), ({"bulk_digest": "blake3"}, ["blake3"])])
def test_a_generation_requires_the_digest_of_its_bulk_data_unless_it_is_sha256(store, content, requires):
    commit_number(store, 1, **content)
    found = newest_generation(store)
    assert found.document["requires"] == requires
    assert found.bulk_digest == content.get("bulk_digest", "sha256")


def test_keys_that_are_not_known_are_ignored():
    assert parse(signed(colour="blue"), number=1, where="x").document["colour"] == "blue"


@pytest.mark.parametrize("count", [8])
def test_of_many_committers_exactly_one_wins(store, count):
    gate = threading.Barrier(count)

    def try_it(number: int) -> str:
        gate.wait()
        try:
            return commit_number(store, 1, write_id=f"writer {number}", by=number).digest
        except StorageError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(try_it, range(count)))
    losers = [answer for answer in answers if "another writer committed generation 1" in answer]
    assert len(losers) == count - 1
    assert newest_generation(store).digest in answers


def test_a_second_commit_of_a_number_changes_nothing(store):
    first = commit_number(store, 1, write_id="one")
    with pytest.raises(StorageError, match="another writer"):
        commit_number(store, 1, write_id="two")
    assert newest_generation(store).digest == first.digest


class LosesReplies:
    """A store whose first answer to a put gets lost: the client asks again, or is told that the connection broke."""

    def __init__(self, store: Store, *, retries: bool) -> None:
        self._store = store
        self._retries = retries
        self.name, self.read, self.replace_hint, self.list = store.name, store.read, store.replace_hint, store.list

    def put_new(self, key: str, data: bytes) -> None:
        self._store.put_new(key, data)
        if self._retries:
            self._store.put_new(key, data)
        raise StorageError(f"{self.name}/{key}: connection reset")


@pytest.mark.parametrize("retries", [True, False])
def test_a_commit_whose_reply_was_lost_is_recognised(store, retries):
    committed = commit_number(LosesReplies(store, retries=retries), 1, write_id="mine")
    assert newest_generation(store).digest == committed.digest


class NeverWrites(LosesReplies):
    """A store that fails before anything is written."""

    def put_new(self, key: str, data: bytes) -> None:
        raise StorageError(f"{self.name}/{key}: disk full")


def test_a_commit_that_failed_is_an_error_and_leaves_nothing(store):
    with pytest.raises(StorageError, match="disk full"):
        commit_number(NeverWrites(store, retries=False), 1)
    with pytest.raises(FormatError):
        newest_generation(store)
    with pytest.raises(ObjectMissingError):
        store.read(HINT)


class CannotList(LosesReplies):
    """A plain web server: known objects can be read, folders cannot be listed."""

    def list(self, prefix: str) -> list[str]:
        raise StorageError(f"{self.name}/{prefix}: forbidden")

    def __init__(self, store: Store) -> None:
        self.name, self.read = store.name, store.read


def test_a_store_that_cannot_list_is_opened_by_the_hint_or_from_the_first_generation_on(store):
    for number in (1, 2):
        commit_number(store, number)
    assert newest_generation(CannotList(store)).number == 2
    store.delete(HINT)
    assert newest_generation(CannotList(store)).number == 2


class DeniesWhatIsMissing(LosesReplies):
    """S3 where objects may be read and folders not listed: what is not there is forbidden."""

    def __init__(self, store: Store) -> None:
        self.name, self._store = store.name, store

    def read(self, key: str) -> bytes:
        try:
            return self._store.read(key)
        except ObjectMissingError as error:
            raise StorageError(f"{self.name}/{key}: access denied") from PermissionError(error)


def test_a_bucket_that_forbids_listing_is_opened_although_it_denies_the_next_generation(store):
    for number in (1, 2):
        commit_number(store, number)
    assert newest_generation(DeniesWhatIsMissing(store)).number == 2
    store.delete(HINT)
    with pytest.raises(StorageError, match="access denied"):
        newest_generation(DeniesWhatIsMissing(store))


def test_readers_see_only_whole_generations_while_writers_commit(store):
    seen = []
    finished = threading.Event()

    def read() -> None:
        while not finished.is_set():
            with suppress(FormatError):  # before the first commit
                seen.append(newest_generation(store).number)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, 11):
            commit_number(store, number)
    finally:
        finished.set()
        reader.join()
    assert seen == sorted(seen)
    assert isinstance(newest_generation(store), Generation)
    assert issubclass(FormatError, FmriStreamError)
