"""Who gets which position: equal shares in global order on any world, every window exactly once per epoch."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.errors import UsageError
from fmristream.sampling.deal import Schedule, ShuffledOrder, StoredOrder, World, check_schedule


def schedule(windows: int, batch_size: int, seed: int | None = 7) -> Schedule:
    shuffled = seed is not None and ShuffledOrder(samples=windows, seed=seed, selection_digest="d" * 64)
    return Schedule(order=shuffled or StoredOrder(samples=windows), batch_size=batch_size)


def windows_at(plan: Schedule, start: int, stop: int):
    drawn = plan.order.draws_at(start, stop)
    return drawn.number, drawn.valid


def batch_of(plan: Schedule, position: int, world: World):
    drawn = plan.batch(position, world)
    return drawn.number, drawn.valid


SCHEDULES = st.builds(schedule, windows=st.integers(5, 200), batch_size=st.integers(1, 64), seed=st.integers(-3, 3))
EVALUATIONS = st.builds(schedule, windows=st.integers(1, 200), batch_size=st.integers(1, 96), seed=st.none())


@settings(max_examples=50)
@given(SCHEDULES, st.integers(1, 4))
def test_every_window_comes_exactly_once_in_every_epoch(plan, epochs):
    numbers, valid = windows_at(plan, 0, epochs * plan.order.samples)
    assert valid.all()
    for epoch in numbers.reshape(epochs, plan.order.samples):
        assert np.array_equal(np.sort(epoch), np.arange(plan.order.samples))


def test_epochs_differ_in_order():
    numbers, _ = windows_at(schedule(50, 5), 0, 150)
    assert len({tuple(epoch.tolist()) for epoch in numbers.reshape(3, 50)}) == 3


@settings(max_examples=60)
@given(plan=st.one_of(SCHEDULES, EVALUATIONS), size=st.integers(1, 64), batch=st.integers(0, 20))
def test_the_ranks_shares_in_order_are_the_batch_of_one_process(plan, size, batch):
    position = batch * plan.batch_size
    whole, whole_valid = batch_of(plan, position, World())
    shares = [batch_of(plan, position, World(rank=rank, size=size)) for rank in range(size)]
    assert np.array_equal(np.concatenate([numbers for numbers, _ in shares]), whole)
    assert np.array_equal(np.concatenate([valid for _, valid in shares]), whole_valid)
    assert len(whole) == plan.batch_size


@given(count=st.integers(0, 10_000), size=st.integers(1, 64))
def test_shares_follow_one_another_and_differ_by_one_at_most(count, size):
    shares = [World(rank=rank, size=size).share(count) for rank in range(size)]
    assert shares[0][0] == 0
    assert shares[-1][1] == count
    assert all(before[1] == after[0] for before, after in pairwise(shares))
    sizes = {stop - start for start, stop in shares}
    assert max(sizes) - min(sizes) <= 1


@given(size=st.integers(1, 64), extra=st.integers(0, 64))
def test_no_rank_is_without_samples_where_the_batch_is_as_large_as_the_world(size, extra):
    check_schedule(schedule(1000, size + extra), [size])
    for rank in range(size):
        start, stop = World(rank=rank, size=size).share(size + extra)
        assert stop > start


@given(plan=SCHEDULES, epochs=st.integers(1, 6), consumed=st.integers(0, 300))
def test_batches_of_an_epoch_are_those_that_start_in_it_wherever_a_resumed_stream_began(plan, epochs, consumed):
    starts = range(consumed % plan.batch_size, epochs * plan.order.samples, plan.batch_size)
    for epoch in range(epochs):
        expected = sum(plan.epoch_of(position) == epoch for position in starts)
        assert plan.batches_in(epoch, consumed=consumed) == expected


@settings(max_examples=40)
@given(plan=SCHEDULES, batch=st.integers(0, 50))
def test_training_never_cuts_a_batch_short(plan, batch):
    numbers, valid = batch_of(plan, batch * plan.batch_size, World())
    assert len(numbers) == plan.batch_size
    assert valid.all()


@given(plan=EVALUATIONS, size=st.integers(1, 64))
def test_evaluation_is_one_pass_in_stored_order_with_a_padded_last_batch(plan, size):
    numbers, valid = [], []
    for batch in range(plan.batches_in(0)):
        for rank in range(size):
            some, flags = batch_of(plan, batch * plan.batch_size, World(rank=rank, size=size))
            numbers.append(some)
            valid.append(flags)
    every, real = np.concatenate(numbers), np.concatenate(valid)
    assert np.array_equal(every[real], np.arange(plan.order.samples))
    assert len(every) == -(-plan.order.samples // plan.batch_size) * plan.batch_size
    assert ((every >= 0) & (every < plan.order.samples)).all()


def test_positions_far_into_training_are_found_without_the_way_there():
    plan = schedule(53_000_000, 64)
    numbers, _ = windows_at(plan, 53_000_000 * 1000 - 3, 53_000_000 * 1000 + 3)
    assert ((numbers >= 0) & (numbers < 53_000_000)).all()
    assert len(set(numbers.tolist())) == 6


def test_a_batch_across_the_end_of_an_epoch_continues_with_the_next_ones_order():
    plan = schedule(10, 4)
    numbers, _ = batch_of(plan, 8, World())
    first, _ = windows_at(plan, 0, 10)
    second, _ = windows_at(plan, 10, 20)
    assert numbers.tolist() == [*first[8:].tolist(), *second[:2].tolist()]


def test_the_batches_of_a_small_example_are_those_of_the_first_release():
    plan = Schedule(order=ShuffledOrder(samples=10, seed=7, selection_digest="0" * 64), batch_size=4)
    numbers, _ = windows_at(plan, 0, 20)
    assert numbers.tolist() == [1, 7, 0, 2, 6, 8, 5, 4, 9, 3, 7, 4, 9, 5, 8, 6, 2, 0, 3, 1]


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0), (5, 3)])
def test_a_rank_outside_its_world_is_refused(rank, size):
    with pytest.raises(UsageError, match=f"rank {rank} of a world of {size}"):
        World(rank=rank, size=size)


def test_a_batch_smaller_than_the_world_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"batch_size 3 .* world of 4"):
        check_schedule(schedule(100, 3), [1, 2, 4])


def test_a_selection_without_windows_is_refused():
    with pytest.raises(UsageError, match="holds no window"):
        check_schedule(schedule(0, 4), [1])
