"""A bound on bytes under way that is smaller than what a batch needs slows a stream and never stops it."""

from pathlib import Path

import pytest
import torch

from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.stream.range_server import range_server

SELECTIONS = {
    "windows": {"window": 7},
    "dilated": {"window": 7, "step": 2},
    "whole runs, dilated": {"window": None, "step": 2},
    "views": {"window": 5, "step": 2, "views": "same-subject"},
    "overlapping": {"window": 10, "stride": 2, "locality": 8},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("limit", [1, 4000])
@pytest.mark.parametrize("name", SELECTIONS)
def test_every_batch_comes_whatever_the_bound(cohort_url, name, limit):
    chosen = {"split": "train", "seed": 3, **SELECTIONS[name]}

    def batches(url: str) -> list[torch.Tensor]:
        with StreamingLoader(StreamingDataset(url, **chosen), batch_size=8, prefetch_bytes=limit) as loader:
            return [batch.packed.clone() for batch, _ in zip(loader, range(4), strict=False)]

    with range_server(Path(cohort_url)) as server:
        found = batches(server.url)
    assert all(torch.equal(one, other) for one, other in zip(found, batches(cohort_url), strict=True))


def test_epochs_without_a_batch_of_their_own_cannot_be_gone_to(cohort_url):
    from fmristream.errors import UsageError

    clips = StreamingDataset(cohort_url, window=29, split="test", seed=1)
    with StreamingLoader(clips, batch_size=len(clips) + 1) as loader:
        with pytest.raises(UsageError, match="not every epoch"):
            loader.set_epoch(1)
        assert len(next(loader.forever())) == len(clips) + 1
