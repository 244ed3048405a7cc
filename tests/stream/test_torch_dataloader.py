"""The dataset inside torch's own DataLoader: with and without worker processes, however they are started."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from fmristream.stream.clips import StreamingDataset

GRID = (8, 8, 8)


@pytest.fixture(scope="module")
def clips(cohort_url) -> StreamingDataset:
    return StreamingDataset(cohort_url, window=7, split="val", targets=("sex", "age"), grid=GRID)


def check(loader: DataLoader, clips: StreamingDataset) -> None:
    """Every window arrives once, in order, equal to what the dataset gives here."""
    seen = []
    for batch in loader:
        assert batch["bold"].shape[1:] == (1, *GRID, 7)
        assert batch["targets"]["sex"].dtype == torch.float32
        for row, number in enumerate(batch["window"].tolist()):
            item = clips[number]
            assert torch.equal(batch["bold"][row], torch.from_numpy(item["bold"]))
            assert (batch["subject"][row], int(batch["start"][row])) == (item["subject"], item["start"])
            seen.append(number)
    assert seen == list(range(len(clips)))


def test_it_loads_in_the_process_itself(clips):
    check(DataLoader(clips, batch_size=3), clips)


@pytest.mark.parametrize("start", ["spawn", pytest.param("forkserver", marks=pytest.mark.full)])
def test_it_loads_in_two_fresh_processes(clips, start):
    context = multiprocessing.get_context(start)
    check(DataLoader(clips, batch_size=3, num_workers=2, multiprocessing_context=context), clips)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_it_loads_in_forked_processes_after_this_one_has_read(clips):
    assert len(clips[0]["bold"]) == 1
    check(DataLoader(clips, batch_size=3, num_workers=2, multiprocessing_context="fork"), clips)


def test_a_shuffling_dataloader_gets_every_window(clips):
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(clips, batch_size=4, shuffle=True, generator=generator)
    assert sorted(number for batch in loader for number in batch["window"].tolist()) == list(range(len(clips)))
