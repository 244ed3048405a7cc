"""Sources behind web servers: with and without ranges, honest and not, and nothing secret in any message."""

from collections.abc import Iterator

import numpy as np
import pytest

from fmristream.errors import FmriStreamError, ObjectMissingError, SourceError, StorageError, UsageError
from fmristream.storage import http_sources
from fmristream.storage.sources import is_folder, list_source, open_source, read_source_range, source_size
from tests.storage.archives import zip_bytes
from tests.storage.web_server import Web, web_server

DATA = np.random.default_rng(1).bytes(9 * 2**20 + 17)
SECRET = "X-Amz-Signature=0123456789abcdef"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(http_sources, "_FIRST_PAUSE_S", 0.001)
    with web_server() as web:
        web.files["/run.nii.gz"] = DATA
        yield web


def whole(url: str) -> bytes:
    with open_source(url) as file:
        return b"".join(iter(lambda: file.read(2 * 2**20), b""))


def read_on(file) -> None:
    while file.read(2**20):
        pass


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("tells_length", [True, False], ids=["length", "no length"])
def test_a_file_is_read_whole_and_in_part_whatever_the_server_can(web: Web, ranges: bool, tells_length: bool) -> None:
    web.ranges, web.tells_length = ranges, tells_length
    url = f"{web.url}/run.nii.gz"
    assert source_size(url) == len(DATA)
    assert whole(url) == DATA
    for start, stop in [(0, 2), (len(DATA) - 8, len(DATA)), (5, 5), (1000, 2_000_000), (len(DATA) - 3, len(DATA) + 9)]:
        assert read_source_range(url, start, stop) == DATA[start:stop]
    assert not is_folder(url)


def test_reading_a_header_fetches_little_of_the_file(web: Web) -> None:
    with open_source(f"{web.url}/run.nii.gz") as file:
        file.read(352)
    assert web.sent_bytes < 100_000


def test_a_busy_server_is_asked_again(web: Web) -> None:
    web.failures = [503, 429, 500]
    assert source_size(f"{web.url}/run.nii.gz") == len(DATA)
    web.failures = [503]
    assert whole(f"{web.url}/run.nii.gz") == DATA


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_body_shorter_than_announced_is_an_error(web: Web, ranges: bool) -> None:
    web.ranges = ranges
    web.short_by = 1000
    with pytest.raises(StorageError, match=r"run\.nii\.gz"):
        whole(f"{web.url}/run.nii.gz")


def test_a_file_that_changes_under_the_reader_is_found_out(web: Web) -> None:
    url = f"{web.url}/run.nii.gz"
    web.headers = {"ETag": '"one"'}
    with open_source(url) as file:
        file.read(10)
        web.headers = {"ETag": '"two"'}
        with pytest.raises(SourceError, match="being changed"):
            read_on(file)
    web.headers = {}
    with open_source(url) as file:
        file.read(10)
        web.files["/run.nii.gz"] = DATA + b"more"
        with pytest.raises(SourceError, match="being changed"):
            read_on(file)


def test_bytes_are_those_of_the_file_even_where_the_server_calls_gzip_an_encoding(web: Web) -> None:
    web.headers = {"Content-Encoding": "gzip"}
    assert whole(f"{web.url}/run.nii.gz") == DATA


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, ObjectMissingError), (410, ObjectMissingError), (401, StorageError), (403, StorageError)],
)
def test_a_refusal_is_said_once_and_without_the_secret(web: Web, status: int, error: type[Exception]) -> None:
    web.failures = [status] * 10
    with pytest.raises(error) as caught:
        open_source(f"{web.url}/run.nii.gz?{SECRET}")
    assert len(web.requests) == 1
    assert SECRET not in str(caught.value)


def test_no_failure_of_any_kind_shows_the_query(web: Web) -> None:
    url = f"{web.url}/run.nii.gz?{SECRET}"
    web.files[f"/run.nii.gz?{SECRET}"] = DATA
    messages = []

    def collect(use) -> None:
        with pytest.raises(FmriStreamError) as caught:
            use(url)
        messages.extend(str(link) for link in chain(caught.value) if isinstance(link, FmriStreamError))

    for status in (500, 503, 403, 301):
        web.failures = [status] * 5
        collect(source_size)
        web.failures = []
    web.short_by = 9
    collect(whole)
    web.short_by = 0
    collect(list_source)
    collect(lambda u: open_source(u.replace("run.nii.gz", "a.zip") + "!/x.nii"))
    assert len(messages) >= 7
    assert not any("Amz" in message for message in messages)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def test_a_web_server_is_no_folder(web: Web) -> None:
    assert not is_folder(f"{web.url}/")
    with pytest.raises(UsageError, match="table of URLs"):
        list_source(web.url)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_members_of_an_archive_behind_a_query_are_read(web: Web, ranges: bool) -> None:
    web.ranges = ranges
    web.files["/a.zip?sig=1"] = zip_bytes({"x/a.nii": DATA[:400_000], "b.nii": b"b" * 400_000})
    assert list_source(f"{web.url}/a.zip?sig=1!") == ["b.nii", "x/a.nii"]
    assert whole(f"{web.url}/a.zip?sig=1!/x/a.nii") == DATA[:400_000]
