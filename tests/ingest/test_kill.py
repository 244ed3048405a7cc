"""SIGKILL at any moment of a conversion: the dataset opens at its last commit or not at all, and the rest is done later."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions
from fmristream.storage import Store, open_store
from fmristream.synth import Cohort
from tests.ingest.cohorts import contents, is_committed, write_runs
from tests.ingest.converters import Attempt, Converters

OPTIONS = {"mask": "auto", "split": "none", "space": "MNI"}
RUNS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Heads in air, so that masks are computed before anything is stored."""
    cohort = Cohort(subjects=RUNS, shape=(30, 36, 28), frames=60, voxel_size_mm=6.5, masked=False)
    runs = {
        f"sub-{subject}_bold": np.asfortranarray(np.stack([f.copy() for f in cohort.run_frames(subject, 0)], axis=-1))
        for subject in range(RUNS)
    }
    return write_runs(tmp_path_factory.mktemp("source"), runs)


def state(url: str, expected: dict[str, bytes]) -> str:
    """`none` or `whole`; whatever can be opened must be all there."""
    if not is_committed(url):
        return "none"
    assert contents(url) == expected
    return "whole"


@dataclass(frozen=True, slots=True)
class Seen:
    """How many objects of each kind a target holds."""

    records: int
    run_objects: int
    tables: int
    generations: int

    @classmethod
    def of(cls, store: Store) -> "Seen":
        return cls(finished_runs(store), *(len(store.list(folder)) for folder in ("runs", "tables", "generations")))


def finished_runs(store: Store) -> int:
    """How many records there are of converted runs; those of masks are of an earlier stage."""
    return sum(not key.startswith("pending/masks/") for key in store.list("pending"))


def stage_of(before: Seen, after: Seen) -> str:
    """How far a killed attempt had come, by what it added."""
    if after.generations:
        return "after the commit"
    if after.tables > before.tables:
        return "at the commit"
    return "while writing" if after.run_objects > before.run_objects else "while planning"


def moment(draw: random.Random, store: Store, attempt: Attempt, duration_s: float) -> Callable[[], bool]:
    """When to kill: at a time, after so many more runs, or at the commit; each with or without some time more."""
    before = Seen.of(store)
    at_s = draw.uniform(0, duration_s * (RUNS + 1 - before.records) / (RUNS + 1))
    records = min(before.records + draw.randrange(1, 4), RUNS)
    reached: dict[str, Callable[[], bool]] = {
        "time": lambda: time.monotonic() - attempt.started >= at_s,
        "records": lambda: finished_runs(store) >= records,
        "tables": lambda: len(store.list("tables")) > before.tables,
        "generation": lambda: bool(store.list("generations")),
        "cleaning": lambda: bool(store.list("generations")) and finished_runs(store) < RUNS,
    }
    kinds = ["time"] * 4 + ["tables", "generation", "cleaning"] + ["records"] * 3 * (before.records < RUNS)
    kind = draw.choice(kinds)
    later_s = draw.choice([0.0, 0.0, 0.003, 0.01, 0.03])
    since: list[float] = []

    def is_time() -> bool:
        if not since and reached[kind]():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= later_s

    return is_time


def kill_again_and_again(source: str, base_url: str, *, kills: int, seed: int) -> Counter[str]:
    """Kill that often, into the same target until it is whole, then into the next; returns what was met."""
    draw, met = random.Random(seed), Counter[str]()
    with Converters(source, **OPTIONS) as converters:
        attempt = converters.start(f"{base_url}-whole")
        converters.wait(attempt)
        duration_s = time.monotonic() - attempt.started
        digest, expected = attempt.report["digest"], contents(f"{base_url}-whole")
        url = f"{base_url}-0"
        while met["kills"] < kills or open_store(url).list("pending"):
            store = open_store(url)
            before = Seen.of(store)
            attempt = converters.start(url)
            if met["kills"] < kills:
                converters.wait(attempt, until=moment(draw, store, attempt, duration_s))
                converters.kill(attempt)
            else:
                converters.wait(attempt)
            if attempt.was_killed:
                met["kills"] += 1
                met[stage_of(before, Seen.of(store))] += 1
            else:
                assert attempt.report["digest"] == digest
                assert attempt.report["resumed"] == before.records
                met["resumed"] += before.records
            if state(url, expected) == "whole":
                attempt = converters.start(url)  # whoever does it again finds it done
                converters.wait(attempt)
                assert attempt.report["there"]
                assert attempt.report["digest"] == digest == fmristream.open(url).content_digest
                assert not store.list("pending")
                met["datasets"] += 1
                url = f"{base_url}-{met['datasets']}"
    print(f"{duration_s:.1f} s undisturbed, {dict(met)}")  # shown with -s, and where the test fails
    return met


@pytest.mark.parametrize(("kills", "seed"), [(20, 1), pytest.param(60, 2, marks=pytest.mark.full)])
def test_a_killed_conversion_shows_nothing_or_everything_and_goes_on(source, tmp_path, kills, seed):
    met = kill_again_and_again(source, str(tmp_path / "out"), kills=kills, seed=seed)
    assert met["kills"] == kills
    # Where a random moment falls depends on the machine's load; that early and late ones occur at all does not.
    assert len(set(met) & {"while planning", "while writing", "at the commit", "after the commit"}) >= 2


def test_what_was_finished_before_the_kill_is_not_done_again(source, tmp_path):
    with Converters(source, **OPTIONS) as converters:
        for number in range(10):  # a slow look may come when all is done: then the next target
            url = f"{tmp_path}/out-{number}"
            store = open_store(url)
            attempt = converters.start(url)
            converters.wait(attempt, until=lambda store=store: Seen.of(store).records >= 2)
            converters.kill(attempt)
            finished = Seen.of(store).records
            if attempt.was_killed and 2 <= finished < RUNS:
                again = converters.start(url)
                converters.wait(again)
                assert again.report["resumed"] == finished
                return
    raise AssertionError("no conversion could be killed between its second and its last run")


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("server", "seed"), [("s3_url", 3), ("rgw_url", 5)])
def test_a_killed_conversion_into_a_bucket_shows_nothing_or_everything_and_goes_on(request, source, server, seed):
    met = kill_again_and_again(source, request.getfixturevalue(server), kills=60, seed=seed)
    assert met["kills"] == 60


@pytest.mark.full
def test_the_command_with_two_workers_may_be_killed_with_all_its_processes(source, tmp_path):
    url, draw = str(tmp_path / "out"), random.Random(4)
    whole = fmristream.convert(source, f"{url}-whole", options=ConvertOptions(**OPTIONS))
    command = [sys.executable, "-m", "fmristream", "convert", source, url, "--workers", "2"]
    command += ["--mask", OPTIONS["mask"], "--split", OPTIONS["split"], "--space", OPTIONS["space"]]
    killed = 0
    while not is_committed(url):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=draw.uniform(4, 9) + 2 * killed)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed
    assert fmristream.convert(source, url, options=ConvertOptions(**OPTIONS)).already_there
    assert contents(url) == contents(f"{url}-whole")
    assert fmristream.open(url).content_digest == whole.content_digest
