"""A loader that meets damage says which object and which run, in the consumer; nothing hangs, and nothing is skipped."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from fmristream.errors import CorruptDataError, FmriStreamError, ObjectMissingError, UsageError
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader
from tests.stream.worlds import epochs

BATCH = 5


def clips_of(url: str, **changes) -> StreamingDataset:
    return StreamingDataset(url, **{"window": 7, "split": "train", "seed": 3, "targets": ("sex",), **changes})


@pytest.fixture
def damaged_url(cohort_url, tmp_path) -> str:
    """A copy that a test may damage."""
    return shutil.copytree(cohort_url, tmp_path / "dataset").as_posix()


def objects_of(url: str, number: int) -> tuple[str, Path]:
    """The run of a window and the file that holds its frames."""
    clips = clips_of(url)
    run, _ = clips.locate(number)
    return run.name, Path(url) / clips.dataset.reader(run).frames_array.object / "c/0/0"


def flip_frame(url: str, number: int) -> tuple[str, Path]:
    """Flip one bit in the middle of a window's frames; returns its run and the file."""
    clips = clips_of(url)
    run, start = clips.locate(number)
    lengths = clips.dataset.reader(run).lengths
    name, path = objects_of(url, number)
    data = bytearray(path.read_bytes())
    data[int(lengths[: start + 3].sum()) + int(lengths[start + 3]) // 2] ^= 4
    path.write_bytes(data)
    return name, path


def number_in_batch(url: str, batch: int) -> int:
    """A window that comes in this batch of the first epoch."""
    return epochs(clips_of(url), 1, batch_size=BATCH)[batch]["window"][2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_flipped_bit_raises_when_its_batch_is_due_and_names_object_and_run(damaged_url, threads, prefetch):
    expected = epochs(clips_of(damaged_url), 1, batch_size=BATCH)
    run, path = flip_frame(damaged_url, number_in_batch(damaged_url, 4))
    loader = StreamingLoader(clips_of(damaged_url), batch_size=BATCH, threads=threads, prefetch_batches=prefetch)
    arrived = []
    with pytest.raises(CorruptDataError) as caught:
        arrived.extend(loader)
    assert run in str(caught.value)
    assert path.relative_to(damaged_url).as_posix() in str(caught.value)
    # The damaged run may have other windows that share the frame's chunk: none does here, stride is the window.
    assert all(torch.equal(batch.packed, e["packed"]) for batch, e in zip(arrived, expected, strict=False))
    assert len(arrived) == 4
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fmristream-loader")]


def test_after_an_error_nothing_is_skipped_the_same_batch_comes_again(damaged_url):
    expected = epochs(clips_of(damaged_url), 1, batch_size=BATCH)
    _, path = objects_of(damaged_url, number_in_batch(damaged_url, 4))
    whole = path.read_bytes()
    flip_frame(damaged_url, number_in_batch(damaged_url, 4))
    arrived = []
    with StreamingLoader(clips_of(damaged_url), batch_size=BATCH, threads=2) as loader:
        for _ in range(3):
            with pytest.raises(CorruptDataError):
                arrived.extend(loader)
            assert loader.state_dict()["consumed"] == 4 * BATCH
        path.write_bytes(whole)  # the object is restored from a copy, as the message says
        arrived.extend(loader)
    assert [batch.window.tolist() for batch in arrived] == [batch["window"] for batch in expected]
    assert all(torch.equal(batch.packed, e["packed"]) for batch, e in zip(arrived, expected, strict=True))


def test_what_cannot_be_planned_raises_when_its_batch_is_due_and_comes_again(cohort_url, monkeypatch):
    expected = epochs(clips_of(cohort_url), 1, batch_size=BATCH)
    clips, calls, found = clips_of(cohort_url), 0, []

    def rows(draws, plan=clips.rows):
        nonlocal calls
        calls += 1
        assert threading.current_thread() is not threading.main_thread()
        if calls == 4:
            raise OSError("no rows")
        return plan(draws)

    monkeypatch.setattr(clips, "rows", rows)
    with StreamingLoader(clips, batch_size=BATCH) as loader:
        with pytest.raises(OSError, match="no rows"):
            found.extend(loader)
        assert len(found) >= 1
        found.extend(loader)
    assert [batch.window.tolist() for batch in found] == [batch["window"] for batch in expected]


def test_a_missing_shard_raises_and_never_reads_as_zeros(damaged_url):
    _, path = objects_of(damaged_url, number_in_batch(damaged_url, 2))
    path.unlink()
    with StreamingLoader(clips_of(damaged_url), batch_size=BATCH, threads=2) as loader:
        with pytest.raises(ObjectMissingError, match="no such object"):
            list(loader)
        assert loader.state_dict()["consumed"] <= 2 * BATCH


def test_a_shard_cut_short_is_noticed(damaged_url):
    _, path = objects_of(damaged_url, number_in_batch(damaged_url, 0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with StreamingLoader(clips_of(damaged_url), batch_size=BATCH) as loader, pytest.raises(CorruptDataError):
        list(loader)


@pytest.mark.parametrize("name", ["moments", "reference"])
def test_damaged_vectors_of_a_run_are_noticed_where_they_are_used(damaged_url, name):
    _, path = objects_of(damaged_url, number_in_batch(damaged_url, 1))
    vector = next(file for file in (path.parents[3] / name / "c").rglob("*") if file.is_file())
    data = bytearray(vector.read_bytes())
    data[len(data) // 2] ^= 1
    vector.write_bytes(data)
    normalize = {"moments": "voxel-zscore", "reference": "global-zscore"}[name]
    clips = clips_of(damaged_url, normalize=normalize)
    with StreamingLoader(clips, batch_size=BATCH) as loader, pytest.raises(CorruptDataError, match=f"/{name}/"):
        list(loader)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_reads_the_damage_raises(damaged_url, rank):
    batch = epochs(clips_of(damaged_url), 1, batch_size=6)[3]
    flip_frame(damaged_url, batch["window"][4])  # the second rank's half
    with StreamingLoader(clips_of(damaged_url), batch_size=6, rank=rank, world_size=2) as loader:
        if rank == 0:
            assert len(list(loader)) == len(loader)
        else:
            with pytest.raises(FmriStreamError):
                list(loader)


def test_map_style_reading_notices_the_same(damaged_url):
    number = number_in_batch(damaged_url, 4)
    run, _ = flip_frame(damaged_url, number)
    with pytest.raises(CorruptDataError, match=run):
        clips_of(damaged_url)[number]


def test_an_error_in_the_consumer_leaves_the_loader_usable(cohort_url):
    expected = epochs(clips_of(cohort_url), 1, batch_size=BATCH)
    arrived = []

    def fail_at_the_second(loader: StreamingLoader) -> None:
        for batch in loader:
            arrived.append(batch.window.tolist())
            if len(arrived) == 2:
                raise ZeroDivisionError

    with StreamingLoader(clips_of(cohort_url), batch_size=BATCH, threads=2) as loader:
        with pytest.raises(ZeroDivisionError):
            fail_at_the_second(loader)
        arrived += [batch.window.tolist() for batch in loader]
    assert arrived == [batch["window"] for batch in expected]


def test_a_loader_that_has_begun_is_refused_after_a_fork_and_closes_there(cohort_url):
    with StreamingLoader(clips_of(cohort_url), batch_size=BATCH) as loader:
        first = next(iter(loader))
        child = os.fork()
        if not child:
            signal.alarm(30)  # what hangs is killed
            status = 1
            try:
                next(iter(loader))
            except UsageError as error:
                status = 0 if "after a fork" in str(error) else 2
                loader.close()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert next(iter(loader)).position == first.position + BATCH


def test_closing_ends_whoever_waits_for_a_plan(cohort_url):
    hold, said = threading.Event(), []
    loader = StreamingLoader(clips_of(cohort_url), batch_size=BATCH)
    loader._planner.submit(hold.wait, 60)

    def consume():
        with pytest.raises(UsageError, match="closed while a batch was waited for") as caught:
            next(iter(loader))
        said.append(caught.value)
        hold.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    while loader._planning is None:
        consumer.join(0.01)
    loader.close()
    consumer.join(60)
    assert said


def test_an_older_iteration_over_the_same_loader_is_refused(cohort_url):
    with StreamingLoader(clips_of(cohort_url, seed=None), batch_size=2) as loader:
        older, newer = iter(loader), iter(loader)
        next(older)
        next(newer)
        with pytest.raises(UsageError, match="another iteration"):
            next(older)


def test_a_loader_works_inside_inference_mode(cohort_url):
    clips = clips_of(cohort_url, seed=None, normalize="global-zscore")
    with torch.inference_mode(), StreamingLoader(clips, batch_size=2) as loader:
        inside = [batch.to("cpu").bold.clone() for batch in loader]
    with StreamingLoader(clips, batch_size=2) as loader:
        assert all(torch.equal(one, batch.to("cpu").bold) for one, batch in zip(inside, loader, strict=True))
