"""What a network and a busy server do to requests costs time, never a sample, a commit, or a secret."""

import pickle
import secrets

import numpy as np
import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import CorruptDataError, FmriStreamError, FormatError, ObjectExistsError, StorageError
from fmristream.ingest.options import ConvertOptions
from fmristream.storage import open_store
from fmristream.storage.s3_client import BODY_ATTEMPTS, CALL_ATTEMPTS, S3Client
from tests.conftest import BUCKET
from tests.ingest.cohorts import bold, contents, stored, write_runs
from tests.storage.faulty_proxy import Proxy, Request, once, proxy_to, sometimes

MIB = 2**20
DATA = np.random.default_rng(0).bytes(300_000)
RUNS = {"sub-1_bold": bold(shape=(3, 4, 3, 3)), "sub-2_bold": bold("f4", seed=1, shape=(3, 4, 3, 2))}
OPTIONS = ConvertOptions(mask="none", split="none", space="MNI")
CONFLICT = b"<Error><Code>ConditionalRequestConflict</Code><Message>Another one is under way.</Message></Error>"


@pytest.fixture
def proxy(s3_endpoint, monkeypatch):
    """Stands between this test and the server; between attempts nobody waits."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    with proxy_to(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3Client.clear_instance_cache()
        yield proxy
        S3Client.clear_instance_cache()


@pytest.fixture
def two_attempts(monkeypatch):
    """As whoever is in a hurry sets for all AWS clients."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


def stream(store, key: str, data: bytes) -> None:
    with store.stream_new(key) as new:
        new.write(data)
        new.commit()


def one_get_each(proxy: Proxy, fault: str, number: int) -> None:
    proxy.forget()
    proxy.choose = lambda request: fault if request.number == number else None


def heavy(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        *(("range", fault) for fault in ("503", "short")),
        *(heavy("range", fault) for fault in ("503 retry-after", "reset", "lost", "slow", "flip")),
        *(("whole", fault) for fault in ("reset", "flip")),
        *(heavy("whole", fault) for fault in ("503", "503 retry-after", "lost", "short", "slow")),
    ],
)
def test_a_read_that_fails_once_is_read_again(proxy, s3_url, fault, verb):
    store = open_store(s3_url)
    store.put_new("a", DATA)
    proxy.forget()
    proxy.choose = once(fault, "GET")
    got = store.read_range("a", 10, 200_000) if verb == "range" else store.read("a")
    wanted = DATA[10:200_000] if verb == "range" else DATA
    if (fault, verb) == ("flip", "range"):  # servers keep checksums of whole objects; dataset readers have their own
        assert len(got) == len(wanted)
    else:
        assert got == wanted
    assert proxy.counts == {"GET": 1 if fault == "slow" or (fault, verb) == ("flip", "range") else 2}


def test_a_body_that_falls_silent_is_read_again(proxy, s3_url, monkeypatch):
    monkeypatch.setattr(S3Client, "read_timeout", 1)
    proxy.stall_s = 30
    store = open_store(s3_url)
    store.put_new("a", DATA)
    proxy.choose = once("stall", "GET")
    assert store.read("a") == DATA


@pytest.mark.parametrize("fault", [heavy("503"), heavy("503 retry-after"), heavy("reset"), "lost"])
@pytest.mark.parametrize(("size", "verb"), [(10, "PUT"), (9 * MIB, "PUT part"), (9 * MIB, "POST complete")])
def test_a_write_that_fails_once_is_done_once_and_known_as_our_own(proxy, s3_url, fault, size, verb):
    store, data = open_store(s3_url), bytes(size)
    proxy.choose = once(fault, verb)
    stream(store, "a", data)
    assert store.read("a") == data
    assert store.unfinished() == ()
    with pytest.raises(ObjectExistsError):
        store.put_new("a", b"another writer's")


def test_an_upload_whose_begin_was_answered_by_nobody_is_found_by_gc(proxy, s3_url):
    store = open_store(s3_url)
    proxy.choose = once("lost", "POST begin upload")
    stream(store, "runs/a", bytes(9 * MIB))
    orphan, *others = store.unfinished()
    assert (orphan.key, others) == ("runs/a", [])
    store.discard_unfinished(orphan)
    store.discard_unfinished(orphan)
    assert store.unfinished() == ()
    assert store.size("runs/a") == 9 * MIB


def test_a_commit_whose_answer_is_lost_is_ours(proxy, s3_url, tmp_path):
    source = write_runs(tmp_path / "in", RUNS, gzipped=False)
    lost = []

    def choose(request: Request):
        if request.verb == "PUT" and request.path.endswith("/generations/1.json") and not lost:
            lost.append(request)
            return "lost"
        return None

    proxy.choose = choose
    report = fmristream.convert(source, s3_url, options=OPTIONS)
    assert lost
    assert not report.already_there
    assert fmristream.open(s3_url).generation.number == 1


def test_a_put_that_meets_another_one_under_way_is_tried_again(proxy, s3_url):
    store = open_store(s3_url)
    proxy.choose = once((409, CONFLICT), "PUT")
    store.put_new("a", b"1")
    assert store.read("a") == b"1"
    assert proxy.counts["PUT"] == 2


def test_a_put_that_meets_a_finished_one_under_way_is_too_late(proxy, s3_url):
    store = open_store(s3_url)
    store.put_new("a", b"1")
    proxy.choose = once((409, CONFLICT), "PUT")
    with pytest.raises(ObjectExistsError):
        store.put_new("a", b"2")
    assert store.read("a") == b"1"


def test_an_upload_that_is_refused_for_another_one_shows_nothing_and_leaves_nothing(proxy, s3_url):
    store = open_store(s3_url)
    proxy.choose = once((409, CONFLICT), "POST complete")
    with pytest.raises(StorageError, match=r"runs/a: .*run the command again"):
        stream(store, "runs/a", bytes(9 * MIB))
    assert store.list("runs") == []
    assert store.unfinished() == ()


@pytest.mark.parametrize("verb", ["PUT part", "POST complete"])
def test_an_upload_that_was_removed_meanwhile_is_an_error_that_says_so(proxy, s3_url, verb):
    store = open_store(s3_url)
    proxy.choose = once((404, b"<Error><Code>NoSuchUpload</Code><Message>No such upload.</Message></Error>"), verb)
    with pytest.raises(StorageError, match=r"runs/a: its upload was removed meanwhile.*run the command again"):
        stream(store, "runs/a", bytes(9 * MIB))
    assert store.list("runs") == []


@pytest.mark.parametrize("fault", ["503", heavy("503 retry-after"), heavy("reset")])
def test_a_server_that_never_answers_well_is_one_error_that_names_the_object(proxy, s3_url, two_attempts, fault):
    store = open_store(s3_url)
    proxy.choose = lambda request: fault
    for verb in (lambda: store.read("x/y"), lambda: store.put_new("x/y", b"1"), lambda: store.list("x/y"),
                 lambda: store.size("x/y"), lambda: store.read_range("x/y", 0, 5), lambda: store.delete("x/y")):  # fmt: skip
        proxy.forget()
        with pytest.raises(StorageError, match="x/y"):
            verb()
        assert 2 <= len(proxy.asked) <= 4  # a reset connection is tried once more below all counting


def test_a_server_that_accepts_and_never_answers_is_given_up(proxy, s3_url, two_attempts, monkeypatch):
    monkeypatch.setattr(S3Client, "read_timeout", 0.3)
    proxy.stall_s = 2.0
    store = open_store(s3_url)
    proxy.choose = lambda request: "silent"
    for verb in (lambda: store.read_range("x/y", 0, 5), lambda: store.put_new("x/y", b"1")):
        proxy.forget()
        with pytest.raises(StorageError, match="x/y"):
            verb()
        assert 2 <= len(proxy.asked) <= 4


def test_an_answer_that_is_not_of_s3_is_asked_for_again(proxy, s3_url):
    store = open_store(s3_url)
    store.put_new("runs/a", b"1")
    proxy.choose = once((200, b"<please> log in"), "LIST")
    assert store.list("runs") == ["runs/a"]
    proxy.choose = lambda request: (200, b"<please> log in")
    with pytest.raises(StorageError, match=f"{s3_url}/runs"):
        store.list("runs")


def test_a_body_that_never_comes_whole_is_an_error_that_names_the_object(proxy, s3_url):
    store = open_store(s3_url)
    store.put_new("a", DATA)
    proxy.forget()
    proxy.choose = lambda request: "short"
    with pytest.raises(StorageError, match=f"{s3_url}/a"):
        store.read("a")
    assert proxy.counts == {"GET": BODY_ATTEMPTS}


def test_a_conversion_with_every_twentieth_request_failing_is_the_same_and_costs_little_more(proxy, s3_url, tmp_path):
    source = write_runs(tmp_path / "in", RUNS, gzipped=False)
    expected = fmristream.convert(source, f"{s3_url}-quiet", options=OPTIONS).content_digest
    needed = len(proxy.asked)
    proxy.forget()
    proxy.choose = sometimes(0.05, "503", "503 retry-after", "reset", "lost", "short", seed=3)
    report = fmristream.convert(source, s3_url, options=OPTIONS)
    assert needed < len(proxy.asked) <= 1.6 * needed
    assert report.content_digest == expected
    proxy.choose = lambda request: None
    assert contents(s3_url) == contents(f"{s3_url}-quiet")


@pytest.mark.full
def test_a_flipped_bit_in_any_answer_is_found_or_changes_nothing(proxy, s3_url, tmp_path):
    fmristream.convert(write_runs(tmp_path / "in", RUNS, gzipped=False), s3_url, options=OPTIONS)
    proxy.forget()
    expected = contents(s3_url)
    number_of_requests, found = len(proxy.asked), 0
    for number in range(1, number_of_requests + 1):
        one_get_each(proxy, "flip", number)
        try:
            assert contents(s3_url) == expected
            found += len(proxy.asked) > number_of_requests  # and the answer was asked for again
        except (CorruptDataError, FormatError):
            found += 1
    assert found > number_of_requests // 2


SECRETS = ("sEcReT-key", "sEcReT-token", "AKIAsEcReT")


def test_no_secret_shows_in_errors_tracebacks_tasks_or_objects(
    proxy, s3_url, tmp_path, monkeypatch, capsys, two_attempts
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAsEcReT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sEcReT-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sEcReT-token")
    source = write_runs(tmp_path / "in", RUNS, gzipped=False)
    fmristream.convert(source, s3_url, options=OPTIONS)
    store = open_store(s3_url)
    shown = [repr(store), repr(vars(store)["_url"]), repr(pickle.dumps(store)), *map(repr, stored(s3_url).values())]
    for fault in (
        "503",
        "reset",
        (403, b"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIAsEcReT</AWSAccessKeyId></Error>"),
    ):
        proxy.choose = lambda request, fault=fault: fault
        for command in (["info", s3_url], ["convert", source, f"{s3_url}-2"], ["gc", s3_url]):
            assert main([*command, "--debug"]) != 0
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    shown += [printed.out, printed.err]
    assert not [text for text in shown for secret in SECRETS if secret in text]


def test_a_profile_that_is_not_there_is_our_error(monkeypatch, s3_endpoint):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    S3Client.clear_instance_cache()
    with pytest.raises(FmriStreamError, match="nobody"):
        open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}").read("a")


def test_attempts_are_those_of_the_options_unless_the_environment_says_otherwise(proxy, s3_url):
    store = open_store(s3_url)
    proxy.choose = lambda request: "503"
    with pytest.raises(StorageError):
        store.size("a")
    assert len(proxy.asked) == CALL_ATTEMPTS
