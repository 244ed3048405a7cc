"""With weights, locality and mixtures as without: the same global batches on any world, each sample as often as it should."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.sampling.deal import MixedOrder, Schedule, ShuffledOrder, World
from fmristream.sampling.mixing import Turns
from fmristream.sampling.order import Locality, order_key
from fmristream.sampling.weights import balanced, weighted

COUNTS = st.lists(st.integers(4, 25), min_size=1, max_size=6)
LOCALITIES = st.one_of(st.none(), st.builds(Locality, windows=st.integers(1, 6), visits=st.integers(2, 5)))


@st.composite
def orders(draw) -> ShuffledOrder:
    counts = np.array(draw(COUNTS))
    first = np.concatenate([[0], np.cumsum(counts)])
    kind = draw(st.sampled_from(["none", "weights", "groups"]))
    size = len(counts)
    quotas = None
    if kind == "weights":
        quotas = weighted(draw(st.lists(st.floats(0.1, 5), min_size=size, max_size=size)), counts, first)
    if kind == "groups":
        quotas = balanced(np.array(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))), counts, first)
    return ShuffledOrder(
        samples=int(counts.sum()),
        seed=draw(st.integers(0, 3)),
        selection_digest=draw(st.sampled_from(["a" * 64, "b" * 64])),
        quotas=quotas,
        locality=draw(LOCALITIES),
    )


@st.composite
def mixtures(draw) -> MixedOrder:
    members = draw(st.lists(orders(), min_size=1, max_size=3))
    weights = draw(st.lists(st.integers(1, 5), min_size=len(members), max_size=len(members)))
    return MixedOrder(members=tuple(members), turns=Turns(weights))


ANY = st.one_of(orders(), mixtures())


def columns(drawn) -> list[tuple]:
    parts = (drawn.source, drawn.epoch, drawn.slot, drawn.number, drawn.valid)
    return list(zip(*(part.tolist() for part in parts), strict=True))


@settings(max_examples=25)
@given(order=ANY, size=st.integers(1, 64), extra=st.integers(0, 40), batch=st.integers(0, 30))
def test_the_shares_of_any_world_in_order_are_the_batch_of_one_process(order, size, extra, batch):
    plan = Schedule(order=order, batch_size=size + extra)
    whole = columns(plan.batch(batch * plan.batch_size, World()))
    shares = [columns(plan.batch(batch * plan.batch_size, World(rank=rank, size=size))) for rank in range(size)]
    assert [row for share in shares for row in share] == whole
    assert len(whole) == plan.batch_size


@settings(max_examples=25)
@given(order=ANY, start=st.integers(0, 200), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_what_lies_at_a_position_does_not_depend_on_where_one_began(order, start, cuts):
    """So a stream that stopped anywhere goes on with any batch size on any world."""
    stop = start + sum(cuts)
    parts, position = [], start
    for length in cuts:
        parts += columns(order.draws_at(position, position + length))
        position += length
    assert parts == columns(order.draws_at(start, stop))


@settings(max_examples=25)
@given(order=orders(), epoch=st.integers(0, 5))
def test_every_window_comes_once_in_an_epoch_or_as_often_as_its_quota_says(order, epoch):
    drawn = order.draws_at(epoch * order.samples, (epoch + 1) * order.samples)
    assert sorted(drawn.slot.tolist()) == list(range(order.samples))
    found = Counter(drawn.number.tolist())
    if order.quotas is None:
        assert found == Counter(range(order.samples))
        return
    key = order_key(order.selection_digest, seed=order.seed, epoch=epoch)
    assert found == Counter(order.quotas.windows(np.arange(order.samples), key=key).tolist())


@settings(max_examples=25)
@given(order=mixtures(), start=st.integers(0, 150))
def test_members_of_a_mixture_come_in_the_order_that_they_have_alone(order, start):
    drawn = order.draws_at(0, start + 60)
    for source, member in enumerate(order.members):
        mine = drawn.source == source
        alone = member.draws_at(0, int(mine.sum()))
        assert drawn.number[mine].tolist() == alone.number.tolist()
        assert drawn.epoch[mine].tolist() == alone.epoch.tolist()


@settings(max_examples=25)
@given(order=ANY, batch_size=st.integers(1, 40), consumed=st.integers(0, 200), epoch=st.integers(0, 6))
def test_an_epoch_begins_with_the_first_batch_that_starts_in_it(order, batch_size, consumed, epoch):
    plan = Schedule(order=order, batch_size=batch_size)
    start = plan.start_of(epoch, consumed=consumed)
    starts = range(consumed % batch_size, (epoch + 2) * order.samples + 2 * batch_size, batch_size)
    assert start == next(position for position in starts if position >= epoch * order.samples)


def test_batches_of_weights_and_locality_are_those_of_the_first_release():
    counts, first = np.array([3, 5]), np.array([0, 3, 8])
    order = ShuffledOrder(
        samples=8,
        seed=7,
        selection_digest="0" * 64,
        quotas=weighted([3, 1], counts, first),
        locality=Locality(windows=2, visits=2),
    )
    assert order.draws_at(0, 16).number.tolist() == PINNED


PINNED = [2, 2, 6, 4, 0, 0, 1, 1, 2, 6, 0, 2, 3, 5, 1, 0]
