"""Whichever client fetches from a bucket, batches are the same, and what an object was is held to."""

import importlib.util

import pytest
import torch

import fmristream
from fmristream.errors import CorruptDataError, MissingExtraError, ObjectMissingError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.storage import open_store
from fmristream.storage.async_reads import S3Reads, wait_for
from fmristream.storage.obstore_reads import CLIENT_VARIABLE, ObstoreReads
from fmristream.storage.retry import RetryPolicy
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.storage.faulty_proxy import proxy_to, sometimes
from tests.stream.conftest import COHORT

HAS_OBSTORE = importlib.util.find_spec("obstore") is not None
CLIENTS = ["fsspec", pytest.param("obstore", marks=pytest.mark.skipif(not HAS_OBSTORE, reason="not installed"))]


def batches(url: str) -> list[torch.Tensor]:
    clips = StreamingDataset(url, window=7, split="train", seed=2)
    policy = RetryPolicy(first_pause_s=0.01, longest_pause_s=0.05)
    with StreamingLoader(clips, batch_size=6, threads=2, retry=policy) as loader:
        return [batch.packed.clone() for batch in loader]


@pytest.fixture
def url(s3_url) -> str:
    fmristream.convert(COHORT, s3_url, options=ConvertOptions(split="exact"))
    return s3_url


@pytest.mark.parametrize("client", CLIENTS)
def test_batches_from_a_bucket_are_the_local_ones(client, url, cohort_url, monkeypatch):
    monkeypatch.setenv(CLIENT_VARIABLE, client)
    assert isinstance(open_store(url).async_reads(), {"fsspec": S3Reads, "obstore": ObstoreReads}[client])
    assert all(torch.equal(one, other) for one, other in zip(batches(url), batches(cohort_url), strict=True))


@pytest.mark.parametrize("client", CLIENTS)
def test_an_object_that_is_replaced_or_gone_is_an_error(client, s3_url, monkeypatch):
    monkeypatch.setenv(CLIENT_VARIABLE, client)
    store = open_store(s3_url)
    store.put_new("a", bytes(1000))
    reads = store.async_reads()
    assert wait_for(reads.loop, reads.read("a", 10, 20)) == bytes(10)
    store.replace_hint("a", b"x" * 1000)
    with pytest.raises(CorruptDataError, match="replaced while it was read"):
        wait_for(reads.loop, reads.read("a", 10, 20))
    with pytest.raises((ObjectMissingError, FileNotFoundError)):
        wait_for(reads.loop, reads.read("b", 10, 20))


@pytest.mark.full
@pytest.mark.parametrize("client", CLIENTS)
def test_a_busy_bucket_changes_no_bit(client, url, cohort_url, s3_endpoint, monkeypatch):
    from fmristream.storage.s3_client import S3Client

    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    with proxy_to(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv(CLIENT_VARIABLE, client)
        S3Client.clear_instance_cache()
        choose = sometimes(0.1, "503", "reset", "short")
        proxy.choose = lambda request: choose(request) if "/residual/c/" in request.path else None
        found = batches(url)
        S3Client.clear_instance_cache()
    assert all(torch.equal(one, other) for one, other in zip(found, batches(cohort_url), strict=True))


def test_another_client_is_refused(s3_url, monkeypatch):
    monkeypatch.setenv(CLIENT_VARIABLE, "curl")
    with pytest.raises(UsageError, match="obstore or fsspec"):
        open_store(s3_url).async_reads()


@pytest.mark.skipif(HAS_OBSTORE, reason="it is installed")
def test_a_client_that_is_not_installed_is_said(s3_url, monkeypatch):
    monkeypatch.setenv(CLIENT_VARIABLE, "obstore")
    with pytest.raises(MissingExtraError, match="pip install"):
        open_store(s3_url).async_reads()
