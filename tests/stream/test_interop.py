"""Other people's loops over our stream: the same batches in the same order, resumed exactly, or a refusal in words."""

import multiprocessing
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import fmristream
from fmristream.errors import UsageError
from fmristream.stream.torch_dataset import BatchStream
from tests.storage.web_server import web_server


def loader_of(url: str, **more) -> fmristream.StreamingLoader:
    clips = fmristream.StreamingDataset(url, window=7, split="train", seed=3, targets=("sex",))
    return fmristream.StreamingLoader(clips, **{"batch_size": 5} | more)


def windows(batches) -> list[list[int]]:
    return [batch.window.tolist() for batch in batches]


def two_epochs(url: str) -> list[list[int]]:
    with loader_of(url) as loader:
        return [batch for _ in range(2) for batch in windows(loader)]


def test_a_dataloader_hands_on_whole_batches(cohort_url):
    with loader_of(cohort_url) as loader:
        batches = DataLoader(BatchStream(loader), batch_size=None)
        assert len(batches) == len(loader)
        assert [batch for _ in range(2) for batch in windows(batches)] == two_epochs(cohort_url)


def test_a_batch_may_become_what_a_model_takes(cohort_url):
    with loader_of(cohort_url) as loader:
        stream = BatchStream(loader, convert=lambda batch: {"x": batch.bold, "labels": batch.targets["sex"]})
        batch = next(iter(DataLoader(stream, batch_size=None)))
    assert batch["x"].shape == (5, 1, 9, 10, 7, 7)
    assert batch["labels"].shape == (5,)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize(
    "start", ["fork", *(pytest.param(start, marks=pytest.mark.full) for start in ("spawn", "forkserver"))]
)
def test_worker_processes_are_refused_in_words(cohort_url, start):
    with loader_of(cohort_url) as loader:
        batches = DataLoader(BatchStream(loader), batch_size=None, num_workers=2, multiprocessing_context=start)
        with pytest.raises(UsageError, match="num_workers=0"):
            next(iter(batches))


@pytest.fixture
def web_url(cohort_url):
    """The cohort behind a web server."""
    with web_server() as web:
        root = Path(cohort_url)
        web.files = {f"/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
        yield web.url


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_remote_dataset_is_not_read_in_a_forked_process(web_url):
    clips = fmristream.StreamingDataset(web_url, window=7, split="val")
    assert len(clips[0]["bold"]) == 1
    batches = DataLoader(clips, batch_size=2, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UsageError, match=r"(?s)do not survive a fork.*forkserver"):
        next(iter(batches))


@pytest.mark.full
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_remote_dataset_is_read_in_processes_of_its_own(web_url, start):
    clips = fmristream.StreamingDataset(web_url, window=7, split="val")
    expected = clips[0]["bold"]  # this process has read already
    context = multiprocessing.get_context(start)
    batch = next(iter(DataLoader(clips, batch_size=2, num_workers=1, multiprocessing_context=context)))
    assert torch.equal(batch["bold"][0], torch.from_numpy(expected))


def test_pinning_reaches_every_tensor_that_goes_to_a_device(cohort_url):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: without one torch pins nothing")
    with loader_of(cohort_url) as loader:
        batch = next(iter(DataLoader(BatchStream(loader), batch_size=None, pin_memory=True)))
    assert batch.packed.is_pinned()


def test_a_stream_is_not_pickled_into_silence(cohort_url):
    with loader_of(cohort_url) as loader, pytest.raises(UsageError, match="num_workers=0"):
        pickle.dumps(BatchStream(loader))


@pytest.mark.parametrize("taken", [0, 3, 11, 14])
def test_torchdata_resumes_exactly(cohort_url, taken):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    expected = two_epochs(cohort_url)
    with loader_of(cohort_url) as loader:
        batches = torchdata.StatefulDataLoader(BatchStream(loader), batch_size=None)
        begun = windows(islice((batch for _ in range(2) for batch in batches), taken))
        state = batches.state_dict()
    with loader_of(cohort_url, threads=2) as loader:
        batches = torchdata.StatefulDataLoader(BatchStream(loader), batch_size=None)
        batches.load_state_dict(state)
        rest = []
        while len(begun) + len(rest) < len(expected):
            rest += windows(batches)
    assert begun + rest == expected


def test_a_batch_taken_ahead_does_not_move_the_state_of_the_one_in_hand(cohort_url):
    expected = two_epochs(cohort_url)
    with loader_of(cohort_url) as loader:
        stream = BatchStream(loader)
        batches = list(islice(stream, 4))
        state = stream.state_after(batches[2])
    with loader_of(cohort_url) as loader:
        stream = BatchStream(loader)
        stream.load_state_dict(state)
        assert windows(stream) == expected[3 : len(loader)]
