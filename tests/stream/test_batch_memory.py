"""A batch that somebody holds never changes, whatever the loader does meanwhile; memory that nobody holds is used again."""

import gc
import threading

import numpy as np
import pytest
import torch

from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from fmristream.stream.pool import BatchPool
from tests.stream.stores import GatedStore, opened_through
from tests.stream.worlds import epochs

BATCH = 5
SHAPE = (2, 3, 4)


def clips_of(source) -> StreamingDataset:
    return StreamingDataset(source, window=7, split="train", seed=3, targets=("sex",))


@pytest.fixture(scope="module")
def expected(cohort_url) -> list[torch.Tensor]:
    return [batch["packed"] for batch in epochs(clips_of(cohort_url), 2, batch_size=BATCH)]


def test_kept_batches_stay_as_they_were_while_later_ones_are_loaded(cohort_url, expected):
    with StreamingLoader(clips_of(cohort_url), batch_size=BATCH, threads=2, prefetch_batches=3) as loader:
        kept = [batch for _ in range(2) for batch in loader]
    assert all(torch.equal(batch.packed, packed) for batch, packed in zip(kept, expected, strict=True))


@pytest.mark.parametrize("hold", ["row", "reshaped", "numpy", "time"])
def test_a_view_of_a_batch_keeps_its_memory(cohort_url, expected, hold):
    views = {
        "row": lambda packed: packed[1],
        "reshaped": lambda packed: packed.view(-1)[3:],
        "numpy": lambda packed: packed.numpy()[:, 0, 2],
        "time": lambda packed: packed.movedim(2, -1)[0],
    }
    with StreamingLoader(clips_of(cohort_url), batch_size=BATCH, threads=2) as loader:
        kept = [views[hold](batch.packed) for _ in range(2) for batch in loader]
    assert all(
        np.array_equal(np.asarray(view), np.asarray(views[hold](packed)))
        for view, packed in zip(kept, expected, strict=True)
    )


def test_kept_batches_outlive_the_loader(cohort_url, expected):
    loader = StreamingLoader(clips_of(cohort_url), batch_size=BATCH, threads=2)
    kept = [batch for _, batch in zip(range(4), loader, strict=False)]
    loader.close()
    del loader
    gc.collect()
    with StreamingLoader(clips_of(cohort_url), batch_size=BATCH) as other:
        for _ in other:
            pass
    assert all(torch.equal(batch.packed, packed) for batch, packed in zip(kept, expected, strict=False))


def test_a_read_that_comes_back_late_writes_into_nobodys_batch(cohort_url, expected):
    dataset = opened_through(cohort_url, GatedStore)
    store = dataset.store
    with StreamingLoader(clips_of(dataset), batch_size=BATCH, threads=1) as loader:
        for _ in loader:  # one thread reads in the order of the windows
            pass
    first_reads = set(store.seen[:BATCH])
    with StreamingLoader(clips_of(dataset), batch_size=BATCH, threads=2, prefetch_batches=2) as loader:
        start = loader.state_dict()
        for _ in loader:  # from here on, batches get used memory
            pass
        for _ in range(3):
            loader.load_state_dict(start)
            # The first batch arrives; a read for a later one hangs, and the loader is sent back.
            store.hold_other_than(first_reads)
            first = next(iter(loader))
            assert store.is_holding.wait(timeout=60)
            loader.load_state_dict(start)
            again = list(loader)  # by the other thread alone
            store.let_go()
            loader.load_state_dict(start)
            for _ in loader:  # both threads are back
                pass
            assert torch.equal(first.packed, expected[0])
            assert all(torch.equal(batch.packed, packed) for batch, packed in zip(again, expected, strict=False))


def test_a_loader_that_is_left_in_the_middle_of_an_epoch_closes_at_once(cohort_url):
    before = threading.active_count()
    for _ in range(5):
        with StreamingLoader(clips_of(cohort_url), batch_size=BATCH, threads=2, prefetch_batches=4) as loader:
            next(iter(loader))
    assert threading.active_count() == before


def test_memory_that_nobody_looks_at_is_lent_again():
    pool = BatchPool(pinned=False)
    array, tensor = pool.lend(SHAPE)
    place = tensor.data_ptr()
    del array, tensor
    assert pool.lend(SHAPE)[1].data_ptr() == place


def test_memory_that_is_looked_at_is_not_lent_again():
    pool = BatchPool(pinned=False)
    view = pool.lend(SHAPE)[1][0, 1]
    place = view.untyped_storage().data_ptr()
    assert place not in [pool.lend(SHAPE)[1].data_ptr() for _ in range(3)]


def test_another_shape_gets_memory_of_its_own_size():
    pool = BatchPool(pinned=False)
    pool.lend((1, 2, 3))
    array, tensor = pool.lend((4, 5, 6))
    array[:] = 7
    assert tensor.shape == (4, 5, 6)
    assert bool((tensor == 7).all())


def test_garbage_collected_while_memory_is_lent_hangs_nobody():
    pool = BatchPool(pinned=False)
    done = threading.Event()

    def lend_amid_garbage() -> None:
        for _ in range(200):
            cycle: list[object] = [pool.lend(SHAPE)]
            cycle.append(cycle)  # only the collector finds it, and it runs inside lend
        done.set()

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        threading.Thread(target=lend_amid_garbage, daemon=True).start()
        assert done.wait(timeout=60)
    finally:
        gc.set_threshold(*thresholds)
