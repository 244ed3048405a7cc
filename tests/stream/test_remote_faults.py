"""What a network and a busy server do to a stream costs time, never a sample; what stays broken is an error with an end."""

import threading
import time
from pathlib import Path

import pytest
import torch

from fmristream.errors import (
    AccessError,
    CorruptDataError,
    FmriStreamError,
    ObjectMissingError,
    StorageError,
    UsageError,
)
from fmristream.storage.retry import RetryPolicy
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.stream.range_server import FAULTS, Fault, RangeServer, frames_only, range_server, sometimes

BATCH = 6
QUICK = RetryPolicy(attempts=10, attempt_s=0.5, deadline_s=8, first_pause_s=0.01, longest_pause_s=0.05)
STAYING = ("replaced", "401", "403")
PASSING: tuple[Fault, ...] = tuple(fault for fault in FAULTS if fault not in STAYING)


@pytest.fixture(scope="module")
def expected(cohort_url) -> list[torch.Tensor]:
    return batches_of(clips_of(cohort_url))


@pytest.fixture
def server(cohort_url):
    with range_server(Path(cohort_url)) as server:
        server.applies = frames_only
        yield server


def clips_of(url: str, **changes) -> StreamingDataset:
    return StreamingDataset(url, **{"window": 7, "split": "train", "seed": 2, **changes})


def batches_of(clips: StreamingDataset, **options) -> list[torch.Tensor]:
    with StreamingLoader(clips, **{"batch_size": BATCH, "threads": 2, "retry": QUICK, **options}) as loader:
        return [batch.packed.clone() for batch in loader]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_stream_over_http_is_the_local_one_and_fetches_only_what_it_uses(server: RangeServer, expected):
    clips = clips_of(server.url)
    with StreamingLoader(clips, batch_size=BATCH, threads=2) as loader:
        assert same([batch.packed.clone() for batch in loader], expected)
        counts = loader.counts
    assert counts.bytes_fetched <= 1.02 * counts.bytes_wanted
    assert server.sent_bytes <= 1.02 * counts.bytes_wanted
    # What is fetched ahead for the next epoch is asked for, too.
    windows = len(expected) * BATCH
    assert windows <= counts.requests <= windows + 64
    assert counts.retries == 0


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_no_bit(server: RangeServer, expected, fault):
    server.choose = lambda number: fault if number in (2, 9) else None
    assert same(batches_of(clips_of(server.url)), expected)


def heavy(rate: float) -> object:
    return pytest.param(rate, 10, marks=pytest.mark.full)


@pytest.mark.parametrize(("rate", "epochs"), [(0.05, 1), (0.2, 1), heavy(0.01), heavy(0.05), heavy(0.2)])
def test_busy_servers_are_asked_again_and_not_much_more_than_that(server: RangeServer, expected, rate, epochs):
    server.choose = sometimes(rate, "503", "503 retry-after", "429", "500", "429 retry-after")
    clips = clips_of(server.url)
    with StreamingLoader(clips, batch_size=BATCH, threads=2, retry=QUICK) as loader:
        assert same([batch.packed.clone() for batch in loader], expected)
        for _ in range(epochs - 1):
            assert len(list(loader)) == len(loader) or loader.epoch
        counts = loader.counts
    assert counts.requests + counts.retries <= 1.5 / (1 - rate) * counts.requests + 5


def test_bytes_in_flight_stay_below_their_bound(server: RangeServer, expected):
    server.latency_s = 0.01
    clips = clips_of(server.url)
    window = max(clips.reader.request(clips.runs[n], clips.clip(0)).bytes for n in range(len(clips.runs)))
    limit = 4 * window
    bound = limit + BATCH * window  # what the batch that is due needs is never kept waiting
    with StreamingLoader(clips, batch_size=BATCH, threads=2, prefetch_bytes=limit) as loader:
        assert same([batch.packed.clone() for batch in loader], expected)
        assert loader.counts.most_held_bytes <= bound
    assert 0 < server.most_held_bytes <= bound


@pytest.mark.parametrize("fault", ["503", "silent", "stall", "trickle", "reset", "cut", "whole", "shifted"])
def test_a_server_that_stays_broken_is_an_error_within_its_deadline(server: RangeServer, fault):
    policy = RetryPolicy(attempts=3, attempt_s=0.3, deadline_s=1.5, first_pause_s=0.01, slowest_bytes_per_s=2**20)
    clips = clips_of(server.url)
    clips.reader.request(clips.runs[0], clips.clip(0))
    server.choose = lambda number: fault
    begun = time.monotonic()
    with StreamingLoader(clips, batch_size=BATCH, retry=policy) as loader:
        with pytest.raises(StorageError) as caught:
            next(iter(loader))
        assert "/residual/c/0/0" in str(caught.value)
        assert "sub-" in str(caught.value)
        assert time.monotonic() - begun < 2 * policy.deadline_s + 2
        server.choose = lambda number: None
        assert next(iter(loader)).position == 0  # and is taken up again
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fmristream")]


def test_an_object_that_is_replaced_in_the_middle_is_an_error_and_never_mixed(server: RangeServer, expected):
    server.choose = lambda number: "replaced" if number > 20 else None
    arrived: list[torch.Tensor] = []
    with StreamingLoader(clips_of(server.url), batch_size=BATCH, retry=QUICK) as loader:
        batches = (batch.packed for batch in loader)
        # Of an object that is first read after it was replaced, the checksums of its frames tell.
        with pytest.raises(CorruptDataError, match=r"replaced while it was read|checksum differs"):
            arrived.extend(batches)
    assert all(torch.equal(one, other) for one, other in zip(arrived, expected, strict=False))


@pytest.mark.parametrize("status", ["401", "403"])
def test_credentials_that_expire_in_mid_epoch_are_said_at_once_and_no_sample_is_wrong(
    server: RangeServer, expected, status
):
    clips = clips_of(server.url)
    server.choose = lambda number: status if number > 20 else None
    arrived: list[torch.Tensor] = []
    with StreamingLoader(clips, batch_size=BATCH, threads=2) as loader:  # with the pauses that a user has
        begun = time.monotonic()
        with pytest.raises(AccessError, match=f"answers {status}.*expired") as caught:
            arrived.extend(batch.packed.clone() for batch in loader)
        assert time.monotonic() - begun < 10
        assert "/residual/c/0/0" in str(caught.value)
        assert "sub-" in str(caught.value)
        assert isinstance(caught.value, PermissionError)
        assert loader.counts.retries == 0
        assert arrived
        assert all(torch.equal(one, other) for one, other in zip(arrived, expected, strict=False))
        server.choose = lambda number: None  # renewed
        rest = [batch.packed.clone() for batch in loader]
        assert same(arrived + rest, expected)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fmristream")]


@pytest.mark.parametrize("part", ["/moments/", "index/"])
def test_where_vectors_and_indexes_are_refused_the_run_is_named_too(server: RangeServer, part):
    clips = clips_of(server.url)
    server.applies = lambda path: part in f"/{path}"
    server.choose = lambda number: "403"
    with StreamingLoader(clips, batch_size=BATCH) as loader, pytest.raises(AccessError) as caught:
        next(iter(loader))
    assert part in str(caught.value)
    assert "sub-" in str(caught.value)


@pytest.mark.parametrize("secret", ["?X-Amz-Signature=sEcReT&X-Amz-Expires=60", "?token=sEcReT", "#sEcReT"])
def test_a_link_with_a_query_is_refused_before_anything_is_asked_and_not_repeated(server: RangeServer, secret):
    server.applies = lambda path: True
    for url in (f"{server.url}/{secret}", f"{server.url}{secret}"):
        with pytest.raises(UsageError, match=r"netrc.*s3://") as caught:
            StreamingDataset(url, window=7)
        assert "sEcReT" not in str(caught.value)
    assert not server.asked


def test_what_is_gone_is_said_at_once(server: RangeServer, cohort_url, tmp_path):
    import shutil

    root = Path(shutil.copytree(cohort_url, tmp_path / "copy"))
    server.root = root
    clips = clips_of(server.url)
    for shard in root.glob("runs/*/residual/c/0/0"):
        shard.unlink()
    begun = time.monotonic()
    with StreamingLoader(clips, batch_size=BATCH) as loader, pytest.raises(ObjectMissingError, match="no such object"):
        next(iter(loader))
    assert time.monotonic() - begun < 5


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_everything_at_once_is_bit_identical_or_a_typed_error(server: RangeServer, expected, seed):
    server.applies = lambda path: path.startswith("runs/")
    server.choose = sometimes(0.1, *PASSING, seed=seed)
    try:
        found = batches_of(clips_of(server.url))
    except FmriStreamError as error:
        named = server.url.removeprefix("http://") in str(error)
        assert named, str(error)  # noqa: PT017 - either is right
    else:
        assert same(found, expected)


def test_a_loader_that_is_closed_while_a_batch_is_waited_for_says_so(server: RangeServer):
    server.latency_s = 1.0
    loader = StreamingLoader(clips_of(server.url), batch_size=BATCH)
    closing = threading.Timer(0.3, loader.close)
    closing.start()
    begun = time.monotonic()
    with pytest.raises(FmriStreamError, match="closed"):
        list(loader)
    closing.join()
    assert time.monotonic() - begun < 30
