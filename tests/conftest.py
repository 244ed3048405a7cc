"""Fixtures that several packages' tests share: an S3 server in this process, and one dataset root per back end."""

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Two shared cores: a slow example says nothing about the code.
settings.register_profile("fmristream", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fmristream")

BUCKET = "fmristream-tests"


@contextmanager
def one_request_at_a_time(host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a moto server; S3 checks `If-None-Match` and writes in one step, moto does so only under a lock."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        with lock:
            return application(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server(host, 0, serve, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="moto")
    thread.start()
    try:
        yield f"http://{host}:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server with one empty bucket; the AWS variables of this process lead to it."""
    import boto3

    from fmristream.storage.s3_client import S3Client

    with one_request_at_a_time() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        S3Client.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield endpoint
        S3Client.clear_instance_cache()


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """A prefix in the bucket that nobody has used."""
    return f"s3://{BUCKET}/{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def rgw_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server, where one is installed."""
    from tests.storage import rgw

    if reason := rgw.missing():
        pytest.skip(reason)
    with rgw.gateway(tmp_path_factory.mktemp("rgw")) as endpoint:
        yield endpoint


@pytest.fixture
def rgw_url(rgw_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An unused prefix on the real server; the AWS variables of this process lead to it while the test runs."""
    from tests.storage import rgw

    with rgw.bucket(rgw_endpoint, BUCKET, monkeypatch):
        yield f"s3://{BUCKET}/{secrets.token_hex(6)}"


@pytest.fixture
def memory_url() -> str:
    """A memory:// root that nobody has used."""
    return f"memory://{secrets.token_hex(6)}/dataset"


@pytest.fixture(params=["local", "memory", "s3"])
def dataset_url(request: pytest.FixtureRequest, tmp_path) -> str:
    """An empty dataset root, once per back end that can be written."""
    if request.param == "local":
        return str(tmp_path / "dataset")
    return str(request.getfixturevalue(f"{request.param}_url"))
