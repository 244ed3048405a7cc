"""URLs: what is opened, what is refused, and that nothing secret is ever shown."""

import contextlib
import os

import boto3
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fmristream.errors import CorruptDataError, FmriStreamError, UsageError
from fmristream.storage import display_url, join_url, open_store
from fmristream.storage.sources import list_source, open_source, read_source_range, source_size
from fmristream.storage.store import checked_key
from fmristream.storage.urls import local_path, redacted, scheme_of

REFUSED = [
    "ssh://host/data",
    "sftp://host/data",
    "ftp://host/data",
    "smb://host/data",
    "github://org:repo@main/data",
    "git://path",
    "hdfs://host/data",
    "zip://inner::s3://bucket/a.zip",
    "pipe://cat /etc/passwd",
    "simplecache::s3://bucket/data",
    "filecache::https://host/data",
    "memory::ssh://host/data",
    "s3::ssh://host/data",
    "s3://bucket/a::ssh://host/b",
    "https://host/a::file:///etc/passwd",
    "memory://a::s3://bucket/b",
    "reference://::s3://bucket/refs.json",
    "dask://worker/data",
    "generic://x",
    "data://text/plain,hello",
]


@pytest.mark.parametrize("url", REFUSED)
def test_schemes_that_run_commands_or_hop_to_other_hosts_are_refused_everywhere(url):
    for use in (open_store, open_source, source_size, list_source, lambda u: read_source_range(u, 0, 1)):
        with pytest.raises(UsageError):
            use(url)


@pytest.mark.parametrize(
    "text", ["pipe:cat /etc/passwd", "simplecache::data", "pipe::/data", "a:b", "C:/data", "run::1"]
)
def test_what_has_no_slashes_after_its_colon_is_a_local_name_and_never_reaches_fsspec(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scheme_of(text) == "file"
    assert open_store(text).name == os.path.join(os.getcwd(), text)


@pytest.mark.parametrize("url", ["", " ", "\n"])
def test_an_empty_url_is_refused(url):
    with pytest.raises(UsageError):
        open_store(url)


@pytest.mark.parametrize(("url", "scheme"), [("s3://b/k", "s3"), ("S3://b/k", "s3"), ("memory://a", "memory"), ("/data", "file"),
                                             ("data", "file"), ("file:///data", "file"), ("https://h/x", "https")])  # fmt: skip
def test_the_scheme_of_a_url_is_found_in_any_case(url, scheme):
    assert scheme_of(url) == scheme


def test_a_scheme_in_capitals_opens_the_same_store(memory_url):
    open_store(memory_url).put_new("a", b"1")
    assert open_store(memory_url.replace("memory", "MEMORY")).read("a") == b"1"


def test_a_file_url_and_a_path_mean_the_same_folder(tmp_path):
    open_store(str(tmp_path)).put_new("a", b"1")
    assert open_store(f"file://{tmp_path}").read("a") == b"1"
    assert local_path("file:///a/b") == "/a/b"


SECRETS = ["s3://AKIAKEY:sEcReT@bucket/data", "https://user:sEcReT@host/data", "s3://sEcReT@bucket/data",
           "memory://user:sEcReT@host/data", "abfs://account:sEcReT@host/data", "gs://sEcReT@bucket/x"]  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "sEcReT" not in str(caught.value)
    assert "environment" in str(caught.value)


def test_an_azure_container_is_no_credential():
    assert scheme_of("abfs://container@account.dfs.core.windows.net/data") == "abfs"


@pytest.mark.parametrize(
    "url",
    [
        "https://host/data?X-Amz-Signature=sEcReT",
        "HTTP://host/?sEcReT",
        "az://box/data?sv=1&sig=sEcReT",
        "https://h/d#sEcReT",
    ],
)
def test_a_link_for_one_object_is_no_dataset_and_its_secret_is_not_repeated(url):
    with pytest.raises(UsageError, match="has a query") as caught:
        open_store(url)
    assert "sEcReT" not in str(caught.value)


@pytest.mark.parametrize("url", ["memory://a/b?token=sEcReT#sEcReT", "s3://b/k?sEcReT"])
def test_a_query_never_shows_in_a_name(url):
    assert "sEcReT" not in display_url(url)
    store = open_store(url)
    assert "sEcReT" not in store.name
    assert "sEcReT" not in repr(store)


def test_an_unreachable_store_fails_with_our_error_and_without_credentials(monkeypatch):
    from fmristream.storage.s3_client import S3Client

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:sEcReT@127.0.0.1:9/")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sEcReT")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3Client.clear_instance_cache()
    store = open_store("s3://bucket/data")
    for verb in (
        lambda: store.read("a"),
        lambda: store.put_new("a", b"1"),
        lambda: store.list("a"),
        lambda: store.size("a"),
    ):
        with pytest.raises(FmriStreamError) as caught:
            verb()
        assert "sEcReT" not in str(caught.value)
        assert "s3://bucket/data" in str(caught.value)
    S3Client.clear_instance_cache()


def test_missing_credentials_are_our_error(monkeypatch, tmp_path, s3_endpoint):
    from fmristream.storage.s3_client import S3Client

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    S3Client.clear_instance_cache()
    with pytest.raises(FmriStreamError, match=r"credentials.*AWS_NO_SIGN_REQUEST"):
        open_store("s3://bucket/data").read("a")
    S3Client.clear_instance_cache()


def test_public_buckets_need_no_credentials(monkeypatch, tmp_path, s3_url):
    from fmristream.storage.s3_client import S3Client

    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    with contextlib.closing(boto3.client("s3")) as client:
        client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"everybody's", ACL="public-read")
        client.put_object(Bucket=bucket, Key=f"{prefix}/b", Body=b"ours")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    S3Client.clear_instance_cache()
    store = open_store(s3_url)
    assert store.read("a") == b"everybody's"
    with pytest.raises(FmriStreamError, match="Forbidden"):
        store.read("b")
    S3Client.clear_instance_cache()


@pytest.mark.parametrize("url", ["s3://no-such-bucket-anywhere/data", "s3://Not_A_Bucket!/data"])
def test_a_bucket_that_is_not_there_is_our_error(s3_endpoint, url):
    store = open_store(url)
    for verb in (lambda: store.read("a"), lambda: store.put_new("a", b"1"), lambda: store.size("a")):
        with pytest.raises(FmriStreamError):
            verb()


def test_a_store_that_is_only_read_refuses_to_write():
    store = open_store("https://host.invalid/data")
    for verb in (lambda: store.put_new("a", b""), lambda: store.stream_new("a"), lambda: store.replace_hint("a", b"")):
        with pytest.raises(UsageError, match="local folders and s3://"):
            verb()


words = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="@/?#:\"'"), min_size=1, max_size=12)


@given(words, words, words, words)
def test_redaction_takes_user_password_and_query_out_of_any_sentence(user, password, host, query):
    user, password, query = f"<u{user}u>", f"<p{password}p>", f"<q{query}q>"
    text = f"cannot connect to 'https://{user}:{password}@{host}/x?{query}' (http://{user}@{host}?{query})"
    shown = redacted(text)
    assert user not in shown
    assert password not in shown
    assert query not in shown
    assert "cannot connect to" in shown


@given(st.text())
@example("http://[")
@example("see https://[::1/x?y#z")
@example("What? No: #1 (100%)")
def test_redaction_and_display_take_any_text(text):
    redacted(text)
    display_url(text)
    if "://" not in text:
        assert redacted(text) == text


def test_joining_keeps_one_slash():
    assert join_url("s3://b/", "/runs/", "a") == "s3://b/runs/a"
    assert join_url("/data", "runs") == "/data/runs"


@given(st.text(max_size=20))
@example("a/../b")
@example("a/b.c-d_e/0")
def test_a_key_that_is_accepted_stays_below_the_root(text):
    try:
        key = checked_key(text)
    except CorruptDataError:
        return
    assert key == text
    assert os.path.normpath(f"/root/{key}") == f"/root/{key}"
    assert key.isascii()
    assert key.isprintable()


def test_keys_that_the_format_uses_are_accepted():
    for key in (
        "dataset.json",
        "generations/12.json",
        "tables/ab12.parquet",
        "runs/a-b.zarr/residual/c/0/0",
        "stats/a-b_c",
        "index/00",
    ):
        assert checked_key(key) == key
