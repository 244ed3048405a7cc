"""Training goes on while a checkpoint is written; what goes wrong with it is told, and a kill leaves the one before."""

import os
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fmristream.errors import StorageError
from train.checkpoint import checkpoint_steps, load_checkpoint, newest_whole
from train.checkpoint_async import Job, Saver, together
from train.checkpoint_writing import Keep, new_token, take
from train.launch import World

from .checkpoint_places import assert_same, checkpoint_at

ROOT = Path(__file__).parents[2]


def snapshot(step, *, model=None, is_best=False):
    made = checkpoint_at(step)
    sections = {"model": model or made.model, "optimizer": made.optimizer, "rng": made.rng}
    return take(sections, made.state, step=step, token=new_token(), is_best=is_best)


class Slow:
    """A disk whose writing waits until it is told to go on."""

    def __init__(self, shelf):
        self._shelf = shelf
        self.go_on, self.is_writing = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._shelf, name)

    def write(self, *arguments, **named):
        self.is_writing.set()
        assert self.go_on.wait(60)
        self._shelf.write(*arguments, **named)


@pytest.fixture
def saver(tmp_path):
    with Saver(tmp_path / "checkpoints", World(), keep=Keep(last=2, best=1)) as saver:
        yield saver


def test_what_is_written_is_what_the_run_was_when_it_was_saved(saver, tmp_path):
    weights = {"weight": torch.ones(40), "count": torch.tensor(3)}
    saver.shelf = slow = Slow(saver.shelf)
    saver.start(snapshot(3, model=weights))
    assert slow.is_writing.wait(60)
    assert checkpoint_steps(tmp_path / "checkpoints") == []
    for tensor in weights.values():  # the steps that are taken meanwhile
        tensor.zero_()
    slow.go_on.set()
    saver.settle()
    found = load_checkpoint(tmp_path / "checkpoints" / "step-3")
    assert torch.equal(found.model["weight"], torch.ones(40))
    assert found.model["count"] == 3


def test_leaving_waits_for_what_is_being_written(tmp_path):
    with Saver(tmp_path / "checkpoints", World(), keep=Keep(last=1)) as saver:
        saver.start(snapshot(1))
    assert_same(newest_whole(tmp_path / "checkpoints")[0], checkpoint_at(1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_leaving_by_an_error_waits_too(tmp_path):
    with Saver(tmp_path / "c", World(), keep=Keep(last=1)) as saver:
        saver.start(snapshot(1))
        saver.__exit__(ValueError, ValueError("first"), None)
        assert checkpoint_steps(tmp_path / "c") == [1]
    assert_same(newest_whole(tmp_path / "c")[0], checkpoint_at(1))


def test_a_failure_is_known_at_once_and_raised_once(saver, tmp_path):
    saver.start(snapshot(1))
    saver.settle()
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        saver.start(snapshot(2))
        assert saver._job.wait(60)
        assert saver.has_failed
        with pytest.raises(StorageError, match=r"step 2 could not be written.*File too large.*the one before"):
            saver.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    saver.settle()
    assert_same(newest_whole(tmp_path / "checkpoints")[0], checkpoint_at(1))


def test_the_same_step_is_written_once_and_can_be_called_the_best_later(saver, tmp_path):
    for step in (1, 2, 3):
        saver.start(snapshot(step))
        saver.settle()
        if step == 1:
            saver.mark_best()
    assert checkpoint_steps(tmp_path / "checkpoints") == [3, 2, 1]
    assert load_checkpoint(tmp_path / "checkpoints" / "step-1").is_best
    assert not load_checkpoint(tmp_path / "checkpoints" / "step-3").is_best


def test_a_job_hands_on_what_it_gives_and_what_goes_wrong():
    assert together(lambda: 5, World(), what="counting") == 5
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 // 0, World(), what="counting")
    hold = threading.Event()
    job = Job(lambda: hold.wait(60), name="checkpoint-test")
    assert not job.wait(0)
    assert not job.has_failed
    hold.set()
    assert job.wait(60)
    assert job.result


def kill_rounds(place, *, ranks, rounds, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.checkpoint_kills", place, str(ranks), str(rounds), str(chance())],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == str(rounds)


def chance():
    return random.Random(os.urandom(8)).randrange(2**31)


@pytest.mark.parametrize(
    ("ranks", "rounds"),
    [(1, 2), pytest.param(1, 30, marks=pytest.mark.full), pytest.param(2, 30, marks=pytest.mark.full)],
)
@pytest.mark.timeout(1800)
def test_killed_while_writing_the_one_before_is_whole_on_a_disk(tmp_path, ranks, rounds):
    kill_rounds(str(tmp_path / "checkpoints"), ranks=ranks, rounds=rounds)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_while_writing_the_one_before_is_whole_in_a_bucket(s3_url, ranks):
    kill_rounds(f"{s3_url}/checkpoints", ranks=ranks, rounds=30)
