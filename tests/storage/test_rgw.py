"""The whole path on a real S3 server: bucket to bucket, updates, windows by ranges, removal; quiet, and with busy answers.

Conditional puts are Ceph's own here. Its releases before 18 ignore `If-None-Match` at the end of multipart uploads, so
that of several uploads under one name each may win; streamed objects have random names.
"""

import secrets
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import boto3
import numpy as np
import pytest

import fmristream
from fmristream.errors import ObjectExistsError, StorageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.verify import verify
from fmristream.storage import open_store
from fmristream.storage.s3_client import S3Client
from tests.conftest import BUCKET
from tests.ingest.cohorts import bold, contents, stored
from tests.ingest.nifti_files import gzip_members, nifti_bytes
from tests.storage.faulty_proxy import proxy_to, sometimes

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

MIB = 2**20
OPTIONS = {"mask": "none", "split": "none", "space": "MNI"}
LARGE = (60, 70, 60, 200)  # 100 MB of voxels, stored in 8 parts or so


@pytest.fixture
def client(rgw_url):
    client = boto3.session.Session().client("s3")
    yield client
    client.close()


@pytest.fixture
def proxy(rgw_endpoint, rgw_url, monkeypatch):
    """Between this test and the server, which checks signatures: headers go through as they come."""
    with proxy_to(rgw_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3Client.clear_instance_cache()
        yield proxy


def put_runs(client, folder: str, runs: dict[str, np.ndarray]) -> str:
    for name, stored_values in runs.items():
        data = gzip_members(nifti_bytes(stored_values), level=1)
        client.put_object(Bucket=BUCKET, Key=f"{folder}/{name}.nii.gz", Body=data)
    return f"s3://{BUCKET}/{folder}"


def stream(store, key: str, data: bytes, before_commit=lambda: None) -> None:
    with store.stream_new(key) as new:
        new.write(data)
        before_commit()
        new.commit()


def convert(source: str, url: str, **options):
    return fmristream.convert(source, url, options=ConvertOptions(**{**OPTIONS, **options}))


@pytest.mark.parametrize("verb", ["put_new", "stream_new"])
def test_of_racing_writers_exactly_one_gets_a_name(rgw_url, verb):
    stores = [open_store(rgw_url) for _ in range(2)]
    outcomes: Counter[tuple[int, int]] = Counter()
    for attempt in range(30):
        gate = threading.Barrier(2)

        def write(number: int, attempt: int = attempt, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            try:
                if verb == "put_new":
                    stores[number].put_new(f"race/{attempt}", b"%d" % number)
                else:
                    stream(stores[number], f"race/{attempt}", b"%d" % number)
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(write, range(2)))
        assert stores[0].read(f"race/{attempt}") == b"%d" % won.index(True)
        outcomes[won.count(True), won.count(False)] += 1
    assert outcomes == {(1, 1): 30}


def test_a_name_that_is_taken_is_not_given_to_a_large_object(rgw_url):
    store = open_store(rgw_url)
    store.put_new("runs/a", b"first")
    with pytest.raises(ObjectExistsError):
        stream(store, "runs/a", bytes(9 * MIB))
    assert store.read("runs/a") == b"first"
    assert store.unfinished() == ()


def test_an_upload_that_gc_removed_fails_and_says_why(rgw_url):
    store = open_store(rgw_url)
    with pytest.raises(StorageError, match="its upload was removed meanwhile"):
        stream(store, "runs/a", bytes(9 * MIB), before_commit=lambda: store.discard_unfinished(*store.unfinished()))
    assert store.list("runs") == []


def test_listings_of_many_pages_are_whole(client, rgw_url):
    prefix = rgw_url.removeprefix(f"s3://{BUCKET}/")
    names = [f"runs/{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(client.put_object, Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"1") for name in names
        ]:
            done.result()
    assert open_store(rgw_url).list("runs") == names


def test_bucket_to_bucket_with_every_twentieth_answer_a_503(client, proxy, rgw_url):
    runs = {f"sub-{n}_bold": bold(seed=n, shape=(20, 20, 20, 40)) for n in range(4)} | {"sub-9_bold": bold(shape=LARGE)}
    source = put_runs(client, f"in-{secrets.token_hex(4)}", runs)
    quiet = convert(source, f"{rgw_url}-quiet").content_digest
    needed, verbs = len(proxy.asked), proxy.counts
    assert verbs["PUT part"] >= 2
    proxy.forget()
    proxy.choose = sometimes(0.05, "503", "503 retry-after", seed=1)
    assert convert(source, rgw_url).content_digest == quiet
    print(f"{len(proxy.asked)} requests, {needed} needed: {dict(verbs)}")
    assert needed < len(proxy.asked) <= 1.6 * needed
    found = verify(rgw_url, deep=True, against=source, space="MNI")
    assert found.is_sound
    dataset = fmristream.open(rgw_url)
    for run in dataset.runs:
        expected = np.moveaxis(runs[run.name], -1, 0).reshape(run.frames, -1)
        assert np.array_equal(dataset.reader(run).read_stored(7, 27), expected[7:27])


def test_updates_removal_and_withdrawal_in_a_bucket(client, rgw_url):
    folder = f"in-{secrets.token_hex(4)}"
    runs = {f"sub-{n}_bold": bold(seed=n, shape=(3, 4, 3, 5)) for n in range(3)}
    source = put_runs(client, folder, runs)
    convert(source, rgw_url)
    put_runs(client, folder, {"sub-7_bold": bold(seed=7, shape=(3, 4, 3, 5))})
    assert convert(source, rgw_url, update="new").added == 1
    assert verify(rgw_url, deep=True, against=source, space="MNI").is_sound
    store = open_store(rgw_url)
    store.put_new("runs/nobody-names.zarr/zarr.json", b"{}")
    left = store.stream_new("runs/nobody-completes.zarr/c/0/0")
    left.write(bytes(9 * MIB))
    report = fmristream.gc(rgw_url)
    assert (report.objects, report.uploads) == (1, 1)
    assert store.unfinished() == ()
    fmristream.withdraw(rgw_url, ["0"])
    fmristream.gc(rgw_url, purge=True)
    assert contents(rgw_url).keys() == {"sub-1_bold", "sub-2_bold", "sub-7_bold"}
    assert verify(rgw_url, deep=True).is_sound
    assert not [key for key, data in stored(rgw_url).items() if b"sub-0" in data]


def test_a_wrong_secret_is_one_error_without_it(rgw_url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sEcReT-but-wrong")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    S3Client.clear_instance_cache()
    store = open_store(rgw_url)
    for verb in (lambda: store.read("a"), lambda: store.put_new("a", b"1"), lambda: store.list("a")):
        with pytest.raises(StorageError) as caught:
            verb()
        assert "sEcReT" not in str(caught.value)
