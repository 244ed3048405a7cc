"""What is peculiar to S3: uploads in parts, listings that clients remember, names that are taken on the server."""

import gc

import boto3
import pytest

from fmristream.errors import ObjectExistsError
from fmristream.storage import Store, open_store
from fmristream.storage.filesystem import PART_BYTES
from tests.conftest import BUCKET

MIB = 2**20


@pytest.fixture
def client(s3_endpoint):
    client = boto3.session.Session().client("s3")
    yield client
    client.close()


def unfinished_uploads(client, url: str) -> list[str]:
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    found = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(prefix)]


def stream(store: Store, size: int, *, commit: bool) -> None:
    with store.stream_new("a") as new:
        new.write(bytes(size))
        if commit:
            new.commit()


@pytest.mark.parametrize("size", [0, 10, 9 * MIB, 17 * MIB])
@pytest.mark.parametrize("taken", [False, True])
def test_a_discarded_upload_leaves_no_parts_on_the_server(client, s3_url, size, taken):
    store = open_store(s3_url)
    if taken:
        store.put_new("a", b"first")
        with pytest.raises(ObjectExistsError):
            stream(store, size, commit=True)
    else:
        stream(store, size, commit=False)
    gc.collect()
    assert unfinished_uploads(client, s3_url) == []


def test_nothing_is_kept_of_an_object_that_is_done(s3_url):
    store = open_store(s3_url)
    before = len(store._fs.transaction.files)
    for commit in (True, False):
        stream(store, 10, commit=commit)
    assert len(store._fs.transaction.files) == before


def test_a_large_object_is_uploaded_in_parts_of_eight_mib(client, s3_url):
    assert PART_BYTES == 8 * MIB
    store = open_store(s3_url)
    with store.stream_new("a") as new:
        for _ in range(20):
            new.write(bytes(MIB))
        assert unfinished_uploads(client, s3_url)
        new.commit()
    assert unfinished_uploads(client, s3_url) == []
    head = client.head_object(Bucket=BUCKET, Key=f"{s3_url.removeprefix(f's3://{BUCKET}/')}/a")
    assert head["ETag"].strip('"').endswith("-3")


def test_what_another_client_wrote_or_removed_is_seen_at_once(client, s3_url):
    store = open_store(s3_url)
    prefix = s3_url.removeprefix(f"s3://{BUCKET}/")
    store.put_new("runs/a", b"1")
    assert store.list("runs") == ["runs/a"]
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/runs/b", Body=b"two")
    assert store.size("runs/b") == 3
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/runs/a", Body=b"longer")
    assert store.size("runs/a") == 6
    assert store.list("runs") == ["runs/a", "runs/b"]
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/runs/c", Body=b"three")
    store.delete("runs/c")
    assert store.list("runs") == ["runs/a", "runs/b"]
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/runs/b")
    with pytest.raises(FileNotFoundError):
        store.size("runs/b")
