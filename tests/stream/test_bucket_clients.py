"""Whichever client fetches from a bucket, batches are the same, and what an object was is held to."""

import importlib.util
import threading
import time
from functools import partial

import pytest
import torch

import fmristream
from fmristream.errors import AccessError, CorruptDataError, MissingExtraError, ObjectMissingError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.storage import open_store
from fmristream.storage.async_reads import S3Reads, wait_for
from fmristream.storage.obstore_reads import CLIENT_VARIABLE, ObstoreReads
from fmristream.storage.retry import RetryPolicy
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.storage.faulty_proxy import Request, proxy_to, sometimes
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


REFUSALS = ((403, "AccessDenied"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (401, "Unauthorized"))


@pytest.mark.parametrize("client", CLIENTS)
def test_a_token_that_expires_in_mid_epoch_is_said_at_once(client, url, cohort_url, s3_endpoint, monkeypatch):
    from fmristream.storage.s3_client import S3Client

    expected = batches(cohort_url)
    with proxy_to(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv(CLIENT_VARIABLE, client)
        S3Client.clear_instance_cache()
        for status, code in REFUSALS:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>It is over.</Message></Error>".encode()
            asked: list[str] = []
            proxy.choose = partial(refused_after, 12, asked, (status, body))
            clips = StreamingDataset(url, window=7, split="train", seed=2)
            arrived: list[torch.Tensor] = []
            with StreamingLoader(clips, batch_size=6) as loader:
                begun = time.monotonic()
                with pytest.raises(AccessError) as caught:
                    arrived.extend(batch.packed.clone() for batch in loader)
                assert time.monotonic() - begun < 10
            assert len(asked) <= 12 + 48  # those that were under way: nobody tries again
            assert "/residual/c/0/0" in str(caught.value)
            assert "sub-" in str(caught.value)
            assert "secret" not in str(caught.value)
            assert all(torch.equal(one, other) for one, other in zip(arrived, expected, strict=False))
        S3Client.clear_instance_cache()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fmristream")]


def refused_after(
    count: int, asked: list[str], answer: tuple[int, bytes], request: Request
) -> tuple[int, bytes] | None:
    """Frames come some times, and then no more."""
    if "/residual/c/" not in request.path:
        return None
    asked.append(request.path)
    return answer if len(asked) > count else None


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
