"""Who does the work makes no difference; workers that die, lie or are not there are reported, and nothing hangs."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fmristream.errors import EngineError, StorageError, UsageError
from fmristream.ingest.execute import Engine
from fmristream.ingest.options import ConvertOptions
from tests.ingest import engine_tasks
from tests.ingest.cohorts import contents, convert, is_committed, objects, six_runs, write_runs
from tests.ingest.engine_tasks import Item
from tests.ingest.test_masks import head

ROOT = Path(__file__).parents[2]


def items(count: int, folder: Path | str = "") -> list[Item]:
    return [Item(name=f"sub-{value}", value=value, folder=str(folder)) for value in range(count)]


def answers(engine: Engine, function, tasks) -> dict[int, int]:
    found = list(engine.run(function, tasks))
    assert len(found) == len(dict(found))
    return dict(found)


@contextmanager
def dask_process(*arguments: str, before: str = ""):
    """`dask scheduler` or `dask worker` as a user starts them."""
    code = f"import sys; {before or 'pass'}; from distributed.cli.dask_{arguments[0]} import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def scheduler(folder: Path):
    """A running scheduler without workers; gives its address."""
    file = folder / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    with dask_process("scheduler", *options) as process:
        deadline = time.monotonic() + 60
        while not (file.exists() and (found := re.search(r"tcp://[0-9.:]+", file.read_text()))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield found.group(), process


def worker(address: str, before: str = ""):
    return dask_process("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", before=before)


def test_in_this_process_tasks_are_done_in_order_and_frames_are_counted():
    counted = []

    def count(item, on_frame):
        on_frame(item.value)
        return item.value

    with Engine() as engine:
        assert engine.counts_frames
        assert list(engine.run(count, items(4), on_frame=counted.append)) == [(n, n) for n in range(4)]
    assert counted == [0, 1, 2, 3]


def test_processes_do_every_task_once_and_take_no_more_than_they_can_do_soon(tmp_path):
    notes = []
    with Engine(2, on_note=notes.append) as engine:
        assert not engine.counts_frames
        running = engine.run(engine_tasks.leave_a_trace, items(60, tmp_path))
        next(running)
        time.sleep(1.0)
        # One that was given out, and twice the workers at most: the rest waits for whoever takes the results.
        assert len(list(tmp_path.iterdir())) <= 5
        rest = dict(running)
    assert len(rest) == 59
    assert sorted(int(path.name.partition("-")[0]) for path in tmp_path.iterdir()) == list(range(60))
    assert len({path.name.split("-")[1] for path in tmp_path.iterdir()}) == 2
    assert len(notes) == 1
    assert re.fullmatch(r"2 processes; dashboard: http://127\.0\.0\.1:\d+/status", notes[0])


@pytest.mark.full
def test_a_worker_that_is_killed_once_costs_nothing_but_time(tmp_path):
    with Engine(2) as engine:
        assert answers(engine, engine_tasks.die_once, items(12, tmp_path)) == {n: n for n in range(12)}
    assert (tmp_path / "died").exists()


def test_a_run_that_kills_its_workers_again_and_again_is_named_and_stops_the_work(tmp_path):
    with Engine(2) as engine:
        with pytest.raises(EngineError, match=r"sub-3: 3 workers or more died while they had this run in work"):
            answers(engine, engine_tasks.die_always, items(12, tmp_path))
        assert len(list(tmp_path.glob("death-*"))) == 3
        assert answers(engine, engine_tasks.double, items(5)) == {n: 2 * n for n in range(5)}


@pytest.mark.full
def test_what_a_task_raises_arrives_as_it_is(tmp_path):
    source, target = six_runs(tmp_path / "in"), tmp_path / "out"
    target.mkdir()
    (target / "runs").write_text("in the way")
    with pytest.raises(StorageError, match="out/runs"):
        convert(source, str(target), workers=2)


def test_a_scheduler_that_runs_already_is_used_and_left_running(tmp_path):
    source = six_runs(tmp_path / "in")
    expected = convert(source, str(tmp_path / "alone")).content_digest
    with scheduler(tmp_path) as (address, process), worker(address):
        assert convert(source, str(tmp_path / "out"), scheduler=address).content_digest == expected
        assert contents(str(tmp_path / "out")) == contents(str(tmp_path / "alone"))
        assert convert(source, str(tmp_path / "again"), scheduler=address).content_digest == expected
        assert process.poll() is None


def test_what_a_scheduler_sees_of_a_run_tells_no_subject_and_no_path(tmp_path):
    from distributed import Client

    with scheduler(tmp_path) as (address, _), worker(address), Engine(scheduler=address) as engine:
        secret = Item(name="sub-secret", value=3, folder="/data/secret")
        running = engine.run(engine_tasks.sleep, [secret])
        with Client(address, set_as_default=False) as spy:
            import threading

            thread = threading.Thread(target=lambda: list(running))
            thread.start()
            seen = ""
            while "sleep-" not in seen:
                seen = str(
                    spy.run_on_scheduler(lambda dask_scheduler: [repr(t) for t in dask_scheduler.tasks.values()])
                )
            seen += str(spy.call_stack()) + str(spy.scheduler_info())
            thread.join()
    assert re.search(r"sleep-[0-9a-f]{16}", seen)
    assert "secret" not in seen.replace("/data/secret", "")
    assert "/data" not in seen


@pytest.mark.full
def test_a_scheduler_without_workers_is_waited_for_and_then_given_up(tmp_path):
    notes = []
    with (
        scheduler(tmp_path) as (address, _),
        Engine(scheduler=address, on_note=notes.append, patience_s=2.0) as engine,
        pytest.raises(EngineError, match="no worker was there for 2 s"),
    ):
        answers(engine, engine_tasks.double, items(3))
    assert notes[-1] == f"scheduler {address}: waiting for a worker"


def test_a_worker_without_our_package_is_reported(tmp_path):
    with (
        scheduler(tmp_path) as (address, _),
        worker(address, before="sys.modules['fmristream'] = None"),
        Engine(scheduler=address) as engine,
        pytest.raises(EngineError, match=r"a worker or the scheduler has fmristream missing \(here "),
    ):
        answers(engine, engine_tasks.double, items(3))


@pytest.mark.full
def test_a_worker_of_another_version_is_reported(tmp_path):
    other = "import fmristream._version as v; v.__version__ = '0.0.1'"
    with (
        scheduler(tmp_path) as (address, _),
        worker(address, before=other),
        Engine(scheduler=address) as engine,
        pytest.raises(EngineError, match=r"a worker or the scheduler has fmristream 0\.0\.1 \(here "),
    ):
        answers(engine, engine_tasks.double, items(3))


@pytest.mark.full
def test_a_scheduler_that_dies_is_reported(tmp_path):
    with (
        scheduler(tmp_path) as (address, process),
        worker(address),
        Engine(scheduler=address) as engine,
    ):
        running = engine.run(engine_tasks.sleep, [Item(name="a", value=0), Item(name="b", value=60)])
        assert next(running) == (0, 0)
        os.killpg(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="the connection to the scheduler was lost"):
            next(running)


@pytest.mark.full
def test_a_scheduler_that_is_not_there_is_reported():
    with pytest.raises(EngineError, match="cannot be reached"), Engine(scheduler="tcp://127.0.0.1:9"):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "host:8786"},
        {"scheduler": "tcp://h:1", "workers": 4},
        {"scheduler": "tcp://h:1", "cluster": "slurm"},
        {"cluster": "pbs"},
        {"cluster_options": "jobs.toml"},
        {"workers": 0},
        *({"shard": text} for text in ("0/4", "5/4", "1", "a/b", "-1/4", "1/0", "")),
    ],
    ids=str,
)
def test_engines_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError):
        ConvertOptions(**options)


def test_other_processes_cannot_write_into_memory():
    for options in ({"workers": 2}, {"scheduler": "tcp://127.0.0.1:1"}, {"shard": "1/2"}):
        with pytest.raises(UsageError, match="memory"):
            convert("synth://", "memory://never", **options)


@pytest.mark.full
def test_ctrl_c_ends_a_conversion_by_several_processes_at_once_and_quietly(tmp_path):
    command = [sys.executable, "-m", "tests.ingest.interrupted_engine", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)
    while not list(tmp_path.glob("*-*-*")):
        assert process.poll() is None
        time.sleep(0.05)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    said = process.communicate(timeout=60)[1]
    print(f"{time.monotonic() - started:.1f} s")
    assert said == "interrupted\n"


@pytest.mark.full
@pytest.mark.parametrize("workers", [2, 8])
def test_any_number_of_processes_gives_the_same_dataset_whatever_order_files_were_made_in(tmp_path, workers):
    runs = {f"sub-{number}_bold": head(number) for number in range(6)}
    source = write_runs(tmp_path / "in", runs)
    shuffled = write_runs(tmp_path / "shuffled", dict(random.Random(workers).sample(list(runs.items()), len(runs))))
    expected = convert(source, str(tmp_path / "alone"), mask="auto")
    report = convert(shuffled, str(tmp_path / "out"), mask="auto", workers=workers)
    assert report.content_digest == expected.content_digest
    assert contents(str(tmp_path / "out")) == contents(str(tmp_path / "alone"))
    assert not [key for key in objects(str(tmp_path / "out")) if key.startswith("pending/")]


@pytest.mark.full
def test_a_killed_driver_takes_its_workers_along_and_shows_nothing(tmp_path):
    source = "synth://?subjects=12&frames=400&shape=60x70x50"
    command = [sys.executable, "-m", "fmristream", "convert", source, str(tmp_path / "out"), "--workers", "2"]
    command += ["--split", "none", "--space", "MNI", "--mask", "none"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT)
    while not list(tmp_path.glob("out/runs/*")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # the driver alone: its workers have to notice
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert not is_committed(str(tmp_path / "out"))
