"""Global batches are the same on every world, every thread count and after every resume; every window once per epoch."""

import json
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.errors import ResumeError, UsageError
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.stream.worlds import epochs, in_step, loaders, same, whole

BATCH = 6


@pytest.fixture(scope="module")
def clips(cohort_url) -> StreamingDataset:
    return StreamingDataset(cohort_url, window=7, split="train", seed=11, targets=("sex",))


@pytest.fixture(scope="module")
def evaluation(cohort_url) -> StreamingDataset:
    return StreamingDataset(cohort_url, window=7, stride=5, split="train", targets=("sex",))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["clips", "evaluation"])
def test_any_number_of_ranks_and_threads_gives_the_same_global_batches(request, kind, world, threads):
    chosen = request.getfixturevalue(kind)
    expected = epochs(chosen, 2, batch_size=BATCH)
    found = epochs(chosen, 2, world=world, batch_size=BATCH, threads=threads)
    assert len(found) == len(expected)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch_size", [1, 5, 6, 16])
def test_every_window_comes_exactly_once_in_every_epoch(clips, batch_size):
    batches = epochs(clips, 4, batch_size=batch_size)
    seen = [number for batch in batches for number in batch["window"]]
    for epoch in range(3):
        part = seen[epoch * clips.num_windows : (epoch + 1) * clips.num_windows]
        assert Counter(part) == Counter(range(clips.num_windows))


def test_a_batch_holds_the_frames_that_its_labels_say(clips):
    dataset = clips.dataset
    for batch in epochs(clips, 1, batch_size=BATCH):
        for row, (name, start, number) in enumerate(zip(batch["run"], batch["start"], batch["window"], strict=True)):
            run = dataset.run(name)
            stored = torch.from_numpy(dataset.read(run, start, start + 7, packed=True)).double()
            whole_run = torch.from_numpy(dataset.read(run, packed=True)).double()
            z = (stored - whole_run.mean(0)) / whole_run.std(0, correction=0)
            assert torch.allclose(batch["packed"][row, 0].double(), z.nan_to_num(0, 0, 0), atol=2e-2)
            assert clips.locate(number) == (run, start)
            assert batch["subject"][row] == run.subject
            assert run.split == "train"


def test_an_epoch_has_as_many_batches_as_the_loader_says(clips, evaluation):
    for chosen in (clips, evaluation):
        with StreamingLoader(chosen, batch_size=5) as loader:
            for _ in range(4):
                said = len(loader)
                assert sum(1 for _ in loader) == said


def test_the_epoch_is_that_of_the_next_batch(clips):
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        for epoch in range(3):
            assert loader.epoch == epoch
            for _ in loader:
                pass


def test_evaluation_is_one_pass_in_stored_order_padded_at_the_end(evaluation):
    batches = epochs(evaluation, 1, batch_size=7)
    numbers = [number for batch in batches for number in batch["window"]]
    valid = [flag for batch in batches for flag in batch["valid"]]
    assert [n for n, real in zip(numbers, valid, strict=True) if real] == list(range(evaluation.num_windows))
    assert len(numbers) % 7 == 0
    assert valid == sorted(valid, reverse=True)


def test_evaluation_starts_anew_every_time_even_after_it_was_left_early(evaluation):
    with StreamingLoader(evaluation, batch_size=7) as loader:
        first = [batch.window.tolist() for batch in loader]
        for _ in loader:
            break
        assert [batch.window.tolist() for batch in loader] == first


def test_training_that_was_left_early_goes_on_with_the_next_batch(clips):
    expected = [batch["window"] for batch in epochs(clips, 1, batch_size=BATCH)]
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        seen = []
        for batch in loader:
            seen.append(batch.window.tolist())
            if len(seen) == 3:
                break
        seen += [batch.window.tolist() for batch in loader]
    assert seen == expected


@pytest.fixture(scope="module")
def two_epochs(clips) -> list[dict]:
    return epochs(clips, 2, batch_size=BATCH)


@pytest.fixture(scope="module")
def one_pass(evaluation) -> list[dict]:
    return epochs(evaluation, 1, batch_size=BATCH)


WORLDS = st.integers(1, 4)


@settings(max_examples=20)
@given(taken=st.integers(0, 16), before=WORLDS, after=WORLDS, threads=st.integers(1, 2))
def test_training_goes_on_exactly_where_it_was_on_any_other_world(clips, two_epochs, taken, before, after, threads):
    state = state_after(taken, clips, world=before, threads=threads)
    rest = []
    with ExitStack() as stack:
        ranks = loaders(stack, clips, world=after, batch_size=BATCH)
        for rank in ranks:
            rank.load_state_dict(state)
        while len(rest) < len(two_epochs) - taken:
            rest += [whole(batches) for batches in in_step(ranks)]
    assert all(same(one, other) for one, other in zip(rest, two_epochs[taken:], strict=True))


@settings(max_examples=10)
@given(taken=st.integers(0, 10), before=WORLDS, after=WORLDS, threads=st.integers(1, 2))
def test_evaluation_goes_on_exactly_where_it_was_on_any_other_world(
    evaluation, one_pass, taken, before, after, threads
):
    state = state_after(taken, evaluation, world=before, threads=threads)
    with ExitStack() as stack:
        ranks = loaders(stack, evaluation, world=after, batch_size=BATCH)
        for rank in ranks:
            rank.load_state_dict(state)
        rest, again = ([whole(batches) for batches in in_step(ranks)] for _ in range(2))
    assert all(same(one, other) for one, other in zip(rest, one_pass[taken:], strict=True))
    assert all(same(one, other) for one, other in zip(again, one_pass, strict=True))


def state_after(taken: int, clips: StreamingDataset, *, world: int, threads: int) -> dict:
    """The state after this many batches, as it comes back from a file; all ranks must agree on it."""
    with ExitStack() as stack:
        ranks = loaders(stack, clips, world=world, batch_size=BATCH, threads=threads)
        states = take(ranks, taken)
    assert all(state == states[0] for state in states)
    return json.loads(json.dumps(states[0]))


def take(ranks: list[StreamingLoader], count: int) -> list[dict]:
    """The states after this many batches, in whichever epoch that is."""
    while count:
        for _ in in_step(ranks):
            count -= 1
            if count == 0:
                break
    return [rank.state_dict() for rank in ranks]


def test_a_state_is_of_the_last_batch_handed_out_however_much_is_fetched_ahead(clips):
    with StreamingLoader(clips, batch_size=BATCH, prefetch_batches=5) as loader:
        for number, batch in enumerate(loader):
            assert batch.position == number * BATCH
            assert loader.state_dict()["consumed"] == (number + 1) * BATCH


def test_a_state_survives_another_batch_size_and_no_window_is_lost_or_repeated(clips):
    with StreamingLoader(clips, batch_size=6) as loader:
        state = take([loader], 2)[0]
        seen = [number for batch in epochs(clips, 1, batch_size=6)[:2] for number in batch["window"]]
    with StreamingLoader(clips, batch_size=7) as loader:
        loader.load_state_dict(state)
        while len(seen) < 2 * clips.num_windows:
            said = len(loader)
            before = loader.state_dict()["consumed"]
            batches = [batch.window.tolist() for batch in loader]
            if before != state["consumed"]:
                assert len(batches) == said
            seen += [number for batch in batches for number in batch]
    assert Counter(seen[: clips.num_windows]) == Counter(range(clips.num_windows))
    assert Counter(seen[clips.num_windows : 2 * clips.num_windows]) == Counter(range(clips.num_windows))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"window": 8}, ("window 7", "8")),
        ({"stride": 3}, ("stride 7", "3")),
        ({"seed": 12}, ("seed 11", "12")),
        ({"seed": None}, ("seed 11", "None")),
        ({"split": None}, ("split train", "None")),
        ({"split": "val"}, ("split train", "val")),
    ],
)
def test_a_state_of_another_stream_is_refused_and_says_how_they_differ(cohort_url, clips, changes, shown):
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        state = loader.state_dict()
    settings_ = {"window": 7, "split": "train", "seed": 11, **changes}
    with StreamingLoader(StreamingDataset(cohort_url, **settings_), batch_size=BATCH) as other:
        with pytest.raises(ResumeError) as caught:
            other.load_state_dict(state)
        assert all(text in str(caught.value) for text in shown)
        assert other.state_dict()["consumed"] == 0


def test_a_batch_smaller_than_the_world_is_refused(clips):
    with pytest.raises(UsageError, match=r"batch_size 3 .* world of 4"):
        StreamingLoader(clips, batch_size=3, rank=0, world_size=4)


def test_half_a_world_is_refused(clips):
    with pytest.raises(UsageError, match="both rank and world_size"):
        StreamingLoader(clips, batch_size=3, rank=0)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 4, "threads": 0}])
def test_counts_below_one_are_refused(clips, wrong):
    with pytest.raises(UsageError, match="expected 1 or more each"):
        StreamingLoader(clips, **wrong)


@pytest.mark.parametrize("wrong", [{"batch_size": 6.0}, {"batch_size": 6, "threads": 1.5}])
def test_counts_that_are_no_whole_numbers_are_refused(clips, wrong):
    with pytest.raises(UsageError, match="expected a whole number"):
        StreamingLoader(clips, **wrong)


def test_numbers_of_numpy_give_a_state_that_can_be_written_and_loaded(clips):
    with (
        StreamingLoader(clips, batch_size=np.int64(BATCH)) as loader,
        StreamingLoader(clips, batch_size=BATCH) as other,
    ):
        loader.set_epoch(np.int64(1))
        next(iter(loader))
        state = loader.state_dict()
        other.load_state_dict(json.loads(json.dumps(state)))
        other.load_state_dict(state)
        with pytest.raises(UsageError, match=r"epoch=2\.5: expected a whole number"):
            loader.set_epoch(2.5)


def test_a_batch_larger_than_an_epoch_runs_on_into_the_next_ones(cohort_url):
    few = StreamingDataset(cohort_url, window=29, split="val", seed=1, targets=("sex",))
    assert few.num_windows == 2
    seen = []
    with StreamingLoader(few, batch_size=5) as loader:
        while len(seen) < 20:
            batches = list(loader)
            assert batches
            seen += [number for batch in batches for number in batch.window.tolist()]
    assert all(sorted(seen[i : i + 2]) == [0, 1] for i in range(0, 20, 2))


def test_a_closed_loader_says_so_and_closes_twice(clips):
    loader = StreamingLoader(clips, batch_size=BATCH)
    loader.close()
    loader.close()
    with pytest.raises(UsageError, match="closed"):
        next(iter(loader))


def test_an_iteration_over_a_loader_that_was_closed_says_so(clips):
    loader = StreamingLoader(clips, batch_size=BATCH)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(UsageError, match="the loader is closed"):
        next(batches)
