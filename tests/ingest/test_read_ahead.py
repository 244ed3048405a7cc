"""Items come from a thread in order, errors come once, and the thread ends with the block."""

import threading
import time
from collections.abc import Iterator

import pytest

from fmristream.errors import SourceError
from fmristream.ingest.read_ahead import RING, ReadAhead

pytestmark = pytest.mark.timeout(60)


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fmristream-read"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert reading() == []


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_all_items_come_in_order_and_are_made_by_another_thread(count):
    makers = set()

    def items() -> Iterator[int]:
        for number in range(count):
            makers.add(threading.current_thread().name)
            yield number

    with ReadAhead(items()) as ahead:
        assert list(ahead) == list(range(count))
    assert makers == ({"fmristream-read"} if count else set())


def test_no_more_items_exist_at_a_time_than_the_ring_holds():
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        for number in range(30):
            made = number + 1
            yield number

    with ReadAhead(items()) as ahead:
        for number in ahead:
            ahead_now = made - number
            assert ahead_now <= RING
            if number == 10:  # given all the time it wants, the thread stops where the ring is full
                wait_until(lambda: made == 10 + RING)
                time.sleep(0.05)
                assert made == 10 + RING


def test_an_error_of_the_source_comes_after_the_items_before_it_and_once():
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise SourceError("cut short")

    seen = []
    with ReadAhead(items()) as ahead, pytest.raises(SourceError, match="cut short"):
        seen.extend(ahead)  # keeps what came before
    assert seen == [1, 2]


@pytest.mark.parametrize("error", [SourceError, KeyboardInterrupt, MemoryError])
def test_an_error_of_who_uses_the_items_ends_the_thread(error):
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.set()

    def use(source: Iterator[int]) -> None:
        with ReadAhead(source) as ahead:
            for item in ahead:
                if item == 3:
                    raise error

    source = items()
    with pytest.raises(error):
        use(source)
    assert reading() == []
    source.close()
    assert closed.is_set()


def test_the_end_of_the_thread_is_waited_for_where_it_fails_after_it_was_stopped():
    go = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        go.wait()
        raise SourceError("too late to matter")

    with ReadAhead(items()) as ahead:
        assert next(iter(ahead)) == 1
        threading.Timer(0.05, go.set).start()
    assert reading() == []


def test_what_ends_the_thread_silently_is_told_all_the_same():
    def items() -> Iterator[int]:
        yield 1
        raise SystemExit(3)

    with pytest.raises(SystemExit), ReadAhead(items()) as ahead:
        list(ahead)
