"""The benchmark of a URL counts every request and every byte, and tells apart what was needed."""

import json

import pytest

import fmristream
from fmristream.cli.main import main
from fmristream.errors import ObjectMissingError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.bench import WARM_UP_BATCHES, BenchOptions, CountingStore, Fetched, _told_apart, bench
from fmristream.storage import open_store
from tools.shaping_server import Shape, in_thread

WINDOW, BATCH, BATCHES = 6, 4, 3
OPTIONS = BenchOptions(window=WINDOW, batch_size=BATCH, batches=BATCHES, threads=2)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a dataset `d`: 6 runs of 41 frames, 36 windows."""
    folder = tmp_path_factory.mktemp("bench")
    source = "synth://?subjects=6&runs=1&shape=9x10x7&frames=41&seed=3"
    fmristream.convert(source, str(folder / "d"), options=ConvertOptions(split="exact"))
    return folder


@pytest.mark.parametrize("normalize", ["voxel-zscore", "none"])
def test_every_byte_that_was_fetched_for_frames_was_used(served, normalize):
    options = BenchOptions(window=WINDOW, batch_size=BATCH, batches=BATCHES, threads=2, normalize=normalize)
    report = bench(str(served / "d"), options)
    assert report.windows == (BATCHES + WARM_UP_BATCHES) * BATCH
    assert report.window_requests == report.windows
    assert report.window_bytes_fetched == report.window_bytes_used > 0
    assert (report.requests_per_window, report.fetched_over_used) == (1, 1)
    assert report.bytes_fetched > report.window_bytes_fetched + report.ahead_bytes  # tables and vectors
    assert report.requests > report.open_requests + report.windows
    assert 0 < report.waited_s <= report.seconds
    assert report.frames_per_s == pytest.approx(WINDOW * report.windows_per_s)


def test_what_is_counted_is_what_a_server_sees(served):
    with in_thread(served, Shape()) as (url, server):
        report = bench(f"{url}/d", OPTIONS)
        assert report.url == f"{url}/d"
        # All of it, but for what was under way when the measurement ended: its answers were for nobody.
        assert report.open_requests + report.window_requests <= report.requests <= server.counts.requests
        assert report.bytes_fetched <= server.counts.bytes
        assert server.counts.most_in_flight > 2  # it is the asynchronous path that was measured
        assert report.fetched_over_used == 1
        assert report.failed_requests == server.counts.not_found == 1  # the version after the newest


def test_a_pretended_step_is_not_waiting(served):
    options = BenchOptions(window=WINDOW, batch_size=BATCH, batches=BATCHES, step_s=0.05)
    report = bench(str(served / "d"), options)
    assert report.seconds >= BATCHES * 0.05
    assert report.waited_s <= report.seconds - BATCHES * 0.05


def test_the_command_prints_both_forms(served, capsys):
    words = ["bench", str(served / "d"), "--window", str(WINDOW), "--batch-size", str(BATCH), "--batches", str(BATCHES)]
    assert main([*words, "--split", "train", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["windows"] == (BATCHES + WARM_UP_BATCHES) * BATCH
    assert document["fetched_over_used"] == 1
    assert main([*words, "--threads", "1"]) == 0
    captured = capsys.readouterr()
    for word in ("windows", "frames", "waited", "first batch", "requests", "fetched"):
        assert f"  {word}" in captured.out
    assert captured.err == "streaming: 5 batches\n"


def test_words_that_make_no_sense_are_refused(served, capsys):
    assert main(["bench", str(served / "d"), "--window", "0"]) == 2
    assert main(["bench", str(served / "d"), "--step", "-1"]) == 2
    assert main(["bench", str(served / "d"), "--window", "42"]) == 2
    assert main(["bench", str(served / "d"), "--split", "nobody"]) == 2
    with pytest.raises(UsageError, match="expected 1 batch or more"):
        BenchOptions(batches=0)


def test_a_counting_store_passes_on_what_it_counts(tmp_path):
    store = CountingStore(open_store(str(tmp_path)))
    store.put_new("a", b"01234")
    assert (store.read("a"), store.read_range("a", 1, 3), store.size("a")) == (b"01234", b"12", 5)
    assert store.list("folder") == []
    assert store.read_range("a", 2, 2) == b""
    with pytest.raises(ObjectMissingError):
        store.read("b")
    assert (store.requests, store.failed, sum(one.stop - one.start for one in store.reads)) == (5, 1, 7)
    store.delete("a")
    with pytest.raises(ObjectMissingError):
        open_store(str(tmp_path)).read("a")


def test_what_is_fetched_twice_or_beside_is_not_called_used():
    def part(start, stop, key="r/residual/c/0/0"):
        return Fetched(key, start, stop)

    needed = [part(0, 10), part(20, 30), part(0, 10)]
    reads = [
        part(0, 10),
        part(18, 25),
        part(25, 30),
        part(0, 10),
        part(0, 10),
        part(40, 50),
        part(0, 9, "r/moments/c/0"),
    ]
    assert _told_apart(reads, needed) == (reads[:4], reads[4:6])
