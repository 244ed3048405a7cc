"""Work spread over threads: in order, bounded, stopped when nobody waits."""

import threading

import pytest

from fmristream.report.threads import THREADS, Counter, Stopped, in_threads


def test_results_come_in_the_order_of_the_items():
    def slow_first(item: int) -> int:
        if item == 0:
            later.wait(10)
        later.set()
        return item * item

    later = threading.Event()
    assert list(in_threads(slow_first, range(50), Counter(None))) == [item * item for item in range(50)]


def test_only_a_bounded_number_of_items_is_taken_ahead():
    taken = []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_threads(lambda item: item, items(), Counter(None))
    next(results)
    assert len(taken) <= 2 * THREADS + 1
    results.close()


def test_an_error_in_a_worker_reaches_the_consumer_and_stops_the_others():
    counter = Counter(None)

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(work, range(1000), counter))
    assert counter.stop.is_set()


def test_workers_stop_when_the_consumer_goes():
    counter = Counter(None)
    stopped = threading.Event()

    def work(item: int) -> int:
        if item:
            try:
                while True:
                    counter.add(1)
            except Stopped:
                stopped.set()
                raise
        return item

    results = in_threads(work, range(10), counter)
    assert next(results) == 0
    results.close()
    assert stopped.is_set()


def test_a_listener_is_told_growing_sums_by_one_thread_at_a_time():
    told = []
    counter = Counter(told.append)

    def work(item: int) -> None:
        for _ in range(100):
            counter.add(1)

    list(in_threads(work, range(20), counter))
    assert told == list(range(1, 2001))
