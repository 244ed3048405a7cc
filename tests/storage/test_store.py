"""One contract for every back end: objects are written once, become visible whole, and are read exactly."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fmristream.errors import CorruptDataError, ObjectExistsError, ObjectMissingError
from fmristream.storage import Store, open_store, put_all

MIB = 2**20


@pytest.fixture
def store(dataset_url: str) -> Store:
    return open_store(dataset_url)


def some_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def stream(store: Store, key: str, data: bytes, before_commit=lambda: None) -> None:
    with store.stream_new(key) as new:
        new.write(data)
        before_commit()
        new.commit()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_was_put_is_read_back(store):
    store.put_new("tables/a.parquet", b"0123456789")
    assert store.read("tables/a.parquet") == b"0123456789"
    assert store.size("tables/a.parquet") == 10


def test_objects_that_are_put_together_are_all_there(store):
    objects = {f"runs/a.zarr/{name}/c/0": some_bytes(1000, seed) for seed, name in enumerate("abcdefghijkl")}
    put_all(store, objects)
    assert {key: store.read(key) for key in store.list("runs")} == objects
    put_all(store, {})


def test_objects_that_are_put_together_take_no_name_that_is_taken(store):
    store.put_new("runs/b", b"first")
    with pytest.raises(ObjectExistsError, match="runs/b"):
        put_all(store, {"runs/a": b"1", "runs/b": b"2", "runs/c": b"3"})
    assert store.read("runs/b") == b"first"
    assert store.list("tmp") == []  # of what was not published nothing stays


def test_an_empty_object_can_be_put(store):
    store.put_new("empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0


def test_a_name_is_taken_only_once(store):
    store.put_new("generations/1.json", b"first")
    with pytest.raises(ObjectExistsError, match=r"generations/1\.json"):
        store.put_new("generations/1.json", b"second")
    assert store.read("generations/1.json") == b"first"


def test_the_error_for_a_taken_name_is_also_the_builtin_one(store):
    store.put_new("a", b"1")
    with pytest.raises(FileExistsError):
        store.put_new("a", b"2")


@pytest.mark.parametrize("verb", ["put_new", "stream_new"])
@pytest.mark.parametrize("count", [8])
def test_of_many_threads_that_want_a_name_exactly_one_gets_it(store, verb, count):
    for attempt in range(3):
        key = f"race/{attempt}"
        gate = threading.Barrier(count)

        def write(number: int, key: str = key, gate: threading.Barrier = gate) -> int | None:
            gate.wait()
            try:
                if verb == "put_new":
                    store.put_new(key, b"%d" % number)
                else:
                    stream(store, key, b"%d" % number)
            except ObjectExistsError:
                return None
            return number

        with ThreadPoolExecutor(count) as pool:
            winners = [number for number in pool.map(write, range(count)) if number is not None]
        assert len(winners) == 1
        assert store.read(key) == b"%d" % winners[0]


@pytest.mark.parametrize("pieces", [[3], [1000, 0, 24], [8 * MIB], [5 * MIB, 5 * MIB, 1], [17 * MIB + 3]])
def test_a_streamed_object_is_the_sum_of_its_pieces(store, pieces):
    data = [some_bytes(size, seed=i) for i, size in enumerate(pieces)]
    with store.stream_new("runs/a.zarr/c/0/0") as new:
        for piece in data:
            new.write(piece)
        new.commit()
    assert store.read("runs/a.zarr/c/0/0") == b"".join(data)
    assert store.size("runs/a.zarr/c/0/0") == sum(pieces)


def test_a_streamed_object_takes_memoryviews(store):
    with store.stream_new("a") as new:
        new.write(memoryview(b"abcdef")[2:4])
        new.commit()
    assert store.read("a") == b"cd"


def test_an_empty_streamed_object_is_published_empty(store):
    with store.stream_new("a") as new:
        new.commit()
    assert store.read("a") == b""


@pytest.mark.parametrize("size", [0, 10, 9 * MIB])
def test_streaming_never_replaces_an_object(store, size):
    store.put_new("a", b"first")
    with pytest.raises(ObjectExistsError):
        stream(store, "a", some_bytes(size))
    assert store.read("a") == b"first"


@pytest.mark.parametrize("size", [0, 10, 9 * MIB])
def test_an_object_that_appeared_while_streaming_is_not_replaced(store, size):
    with pytest.raises(ObjectExistsError):
        stream(store, "a", some_bytes(size), before_commit=lambda: store.put_new("a", b"first"))
    assert store.read("a") == b"first"


@pytest.mark.parametrize("size", [10, 9 * MIB])
def test_nothing_is_visible_before_commit(store, size):
    with store.stream_new("runs/a") as new:
        new.write(some_bytes(size))
        assert store.list("runs") == []
        with pytest.raises(ObjectMissingError):
            store.read("runs/a")
        with pytest.raises(ObjectMissingError):
            store.size("runs/a")
        new.commit()
    assert store.list("runs") == ["runs/a"]


@pytest.mark.parametrize("size", [0, 10, 9 * MIB])
def test_leaving_without_commit_discards(store, size):
    with store.stream_new("runs/a") as new:
        new.write(some_bytes(size))
    assert store.list("runs") == []
    store.put_new("runs/a", b"the name is still free")


@pytest.mark.parametrize("size", [0, 10, 9 * MIB])
def test_an_exception_while_streaming_leaves_nothing_visible(store, size):
    with pytest.raises(KeyboardInterrupt):
        stream(store, "runs/a", some_bytes(size), before_commit=interrupt)
    assert store.list("runs") == []
    with pytest.raises(ObjectMissingError):
        store.read("runs/a")


def test_a_discarded_object_may_be_left_twice(store):
    new = store.stream_new("a")
    new.write(b"1")
    new.__exit__(None, None, None)
    new.__exit__(None, None, None)
    assert store.list("runs") == []


def test_a_failed_commit_may_be_left_twice(store):
    store.put_new("a", b"first")
    new = store.stream_new("b")
    new.write(b"1")
    store.put_new("b", b"meanwhile")
    with pytest.raises(ObjectExistsError):
        new.commit()
    new.__exit__(None, None, None)
    new.__exit__(None, None, None)
    assert store.read("b") == b"meanwhile"


def test_a_range_is_read_exactly(store):
    store.put_new("a", b"0123456789")
    assert store.read_range("a", 0, 10) == b"0123456789"
    assert store.read_range("a", 3, 4) == b"3"
    assert store.read_range("a", 9, 10) == b"9"
    assert store.read_range("a", 5, 5) == b""


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (9, 11), (10, 11), (50, 60)])
def test_a_range_beyond_the_end_is_an_error_and_never_short(store, start, stop):
    store.put_new("a", b"0123456789")
    with pytest.raises(CorruptDataError, match="cut short"):
        store.read_range("a", start, stop)


def test_what_is_not_there_is_missing_for_every_way_of_reading(store):
    for read in (
        lambda: store.read("no/such"),
        lambda: store.read_range("no/such", 0, 1),
        lambda: store.size("no/such"),
    ):
        with pytest.raises(ObjectMissingError, match="no/such"):
            read()
        with pytest.raises(FileNotFoundError):
            read()


def test_a_name_below_an_object_is_missing(store):
    store.put_new("a", b"1")
    with pytest.raises(ObjectMissingError):
        store.read("a/b")


def test_a_hint_is_created_and_replaced(store):
    store.replace_hint("dataset.json", b"one")
    assert store.read("dataset.json") == b"one"
    store.replace_hint("dataset.json", b"the second")
    assert store.read("dataset.json") == b"the second"
    assert store.size("dataset.json") == 10


def test_a_hint_is_always_whole_while_it_is_replaced(store):
    hints = [bytes([65 + i]) * 2000 for i in range(4)]
    store.replace_hint("dataset.json", hints[0])
    seen = set()

    def write(number: int) -> None:
        for _ in range(5):
            store.replace_hint("dataset.json", hints[number])

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, number) for number in range(4)]
        while not all(writer.done() for writer in writers):
            seen.add(store.read("dataset.json"))
        for writer in writers:
            writer.result()
    assert seen <= set(hints)


def test_listing_gives_sorted_keys_below_a_folder_at_any_depth(store):
    for key in ("runs/b", "runs/a/c/0/0", "runs/a/zarr.json", "runs2/x", "run", "other/y"):
        store.put_new(key, b"1")
    assert store.list("runs") == ["runs/a/c/0/0", "runs/a/zarr.json", "runs/b"]
    assert store.list("runs/a") == ["runs/a/c/0/0", "runs/a/zarr.json"]
    assert store.list("nowhere") == []


def test_listing_sees_what_came_since_the_last_listing(store):
    store.put_new("pending/1", b"1")
    assert store.list("pending") == ["pending/1"]
    store.put_new("pending/2", b"1")
    stream(store, "pending/3", b"1")
    assert store.list("pending") == ["pending/1", "pending/2", "pending/3"]
    store.delete("pending/1")
    assert store.list("pending") == ["pending/2", "pending/3"]


def test_unfinished_objects_never_show_in_a_listing_of_the_dataset(store):
    with store.stream_new("runs/a") as new:
        new.write(some_bytes(9 * MIB))
        for folder in ("runs", "generations", "tables", "spaces", "index"):
            assert store.list(folder) == []


def test_what_was_deleted_is_gone_and_its_name_free(store):
    store.put_new("runs/a/b", b"1")
    store.delete("runs/a/b")
    with pytest.raises(ObjectMissingError):
        store.read("runs/a/b")
    store.put_new("runs/a/b", b"2")
    assert store.read("runs/a/b") == b"2"


def test_deleting_what_is_gone_is_no_error(store):
    store.delete("runs/never")
    store.put_new("a", b"1")
    store.delete("a")
    store.delete("a")


def test_objects_can_be_made_in_a_folder_while_others_leave_it(store):
    def make_and_remove(number: int) -> None:
        for attempt in range(10 if store.name.startswith("s3") else 100):
            # tmp is where a local store writes before it names: whoever leaves it last removes it
            for key in (f"pending/plan/{number}-{attempt}", f"tmp/{number}-{attempt}"):
                store.put_new(key, b"1")
                store.delete(key)

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(make_and_remove, number) for number in range(4)]:
            result.result()
    assert store.list("pending") == []


BAD_KEYS = ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./a", "a//b", "a/", "a\\..\\b", "a\0b", "a\nb", "é",
            "a?versionId=1", "a*", "[a]", "a::b", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_leave_the_root_or_mean_something_to_a_client_are_refused_by_every_verb(store, key):
    verbs = [
        lambda: store.put_new(key, b"1"),
        lambda: store.stream_new(key),
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.replace_hint(key, b"1"),
        lambda: store.size(key),
        lambda: store.list(key),
        lambda: store.delete(key),
    ]
    for verb in verbs:
        with pytest.raises(CorruptDataError):
            verb()


def test_a_store_that_went_through_pickle_reaches_the_same_objects(store):
    store.put_new("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.read("a") == b"1"
    again.put_new("b", b"2")
    assert store.read("b") == b"2"
    assert again.name == store.name


def test_two_stores_at_one_url_see_the_same_objects(dataset_url):
    one, other = open_store(dataset_url), open_store(dataset_url + "/")
    one.put_new("a", b"1")
    assert other.read("a") == b"1"
    assert one.name == other.name
