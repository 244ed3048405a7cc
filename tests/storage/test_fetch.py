"""Ranges that touch are one request, others are not; depth follows latency and bandwidth."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import StorageError
from fmristream.storage.fetch import Depth, RangeFetcher, Wanted
from fmristream.storage.filesystem import event_loop
from fmristream.storage.local import LocalStore
from fmristream.storage.retry import AgainError, RetryPolicy

OBJECT = bytes(range(256)) * 40


class Bytes:
    """A store of one object in memory that counts, waits, and fails when it is told to."""

    retries = False

    def __init__(self, failures: int = 0) -> None:
        self.asked: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failures = failures

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return event_loop()

    async def read(self, key: str, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        while not self.gate.is_set():
            await asyncio.sleep(0.001)
        if self.failures:
            self.failures -= 1
            raise AgainError("busy")
        return OBJECT[start:stop]


def fetcher_of(reads: Bytes, limit_bytes: int = 10**6, **options) -> RangeFetcher:
    return RangeFetcher(LocalStore("/nowhere"), reads, limit_bytes=limit_bytes, **options)


def wanted(*ranges: tuple[int, int]) -> list[Wanted]:
    return [Wanted("a", start, stop, (stop,), "a run") for start, stop in ranges]


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 900)), min_size=1, max_size=12))
def test_every_range_gets_its_bytes_and_no_byte_is_fetched_twice_or_for_nobody(places):
    reads, ranges = Bytes(), [(start, start + size) for start, size in places]
    fetcher = fetcher_of(reads)
    handles = fetcher.submit(wanted(*ranges))
    assert [bytes(handle.future.result(10)) for handle in handles] == [OBJECT[start:stop] for start, stop in ranges]
    covered = {byte for start, stop in ranges for byte in range(start, stop)}
    assert sorted(byte for start, stop in reads.asked for byte in range(start, stop)) == sorted(covered)
    assert fetcher.counts.bytes_fetched == len(covered)
    fetcher.close()


def test_neighbours_are_one_request_and_a_gap_of_one_byte_makes_two():
    reads = Bytes()
    fetcher = fetcher_of(reads)
    for handle in fetcher.submit(wanted((0, 10), (10, 20), (15, 30), (31, 40))):
        handle.future.result(10)
    assert sorted(reads.asked) == [(0, 30), (31, 40)]
    fetcher.close()


def test_what_is_held_stays_below_the_bound_until_it_is_released():
    reads = Bytes()
    fetcher = fetcher_of(reads, limit_bytes=250)
    handles = fetcher.submit(wanted(*((1000 * n, 1000 * n + 100) for n in range(6))))
    assert handles[1].future.result(10)
    with pytest.raises(TimeoutError):
        handles[2].future.result(0.1)
    for number, handle in enumerate(handles):
        assert bytes(handle.future.result(10)) == OBJECT[1000 * number : 1000 * number + 100]
        handle.release()
    assert fetcher.counts.most_held_bytes == 200
    fetcher.close()


def test_a_range_above_the_bound_comes_alone():
    fetcher = fetcher_of(Bytes(), limit_bytes=10)
    handles = fetcher.submit(wanted((0, 100), (200, 205)))
    handles[0].future.result(10)
    handles[0].release()
    assert handles[1].future.result(10) == OBJECT[200:205]
    fetcher.close()


def test_what_nobody_waits_for_any_more_makes_room():
    reads = Bytes()
    reads.gate.clear()
    fetcher = fetcher_of(reads, limit_bytes=100)
    first, second = fetcher.submit(wanted((0, 100))), fetcher.submit(wanted((500, 600)))
    first[0].release()
    reads.gate.set()
    assert second[0].future.result(10) == OBJECT[500:600]
    fetcher.close()


def test_closing_fails_what_is_under_way():
    reads = Bytes()
    reads.gate.clear()
    fetcher = fetcher_of(reads)
    (handle,) = fetcher.submit(wanted((0, 100)))
    fetcher.close()
    with pytest.raises(StorageError):
        handle.future.result(10)


@pytest.mark.parametrize(("failures", "comes"), [(2, True), (3, False)])
def test_attempts_are_counted(failures, comes):
    policy = RetryPolicy(attempts=3, first_pause_s=0.001)
    fetcher = fetcher_of(Bytes(failures), policy=policy)
    (handle,) = fetcher.submit(wanted((0, 100)))
    if comes:
        assert handle.future.result(10) == OBJECT[:100]
    else:
        with pytest.raises(StorageError, match=r"a run.*busy; given up after 3 attempts"):
            handle.future.result(10)
    assert fetcher.counts.retries == 2
    fetcher.close()


@given(
    latency_s=st.floats(0.005, 0.2),
    bandwidth=st.floats(1e7, 1e9),  # bytes/s of the link, shared by all
    size=st.integers(10**6, 10**7),
    start=st.sampled_from([4, 16, 48]),
)
def test_depth_settles_where_the_link_is_full_and_no_deeper_than_queues_allow(latency_s, bandwidth, size, start):
    depth = Depth(start=start)
    for _ in range(5000):
        # Each answer waits for its round trip, or for those before it where the link is full.
        depth.answered(max(latency_s + size / bandwidth, depth.now * size / bandwidth), in_flight=depth.now)
    needed = (latency_s + size / bandwidth) / (size / bandwidth)
    assert depth.now >= min(48, max(4, 0.9 * needed)) / 2  # half of it while it is measured anew
    assert depth.now <= max(10, 4 * needed)


def test_depth_does_not_grow_while_nobody_asks_for_more():
    depth = Depth()
    for _ in range(200):
        depth.answered(0.05, in_flight=3)
    assert depth.now == 16
