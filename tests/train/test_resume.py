"""Killed anywhere and resumed on any number of ranks, a run takes every window exactly once per epoch."""

import os
import random
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from train import loop
from train.checkpoint import checkpoint_steps
from train.config import as_toml
from train.launch import World
from train.log import read_history

ROOT = Path(__file__).parents[2]
WINDOWS, STEPS, BATCH = 50, 200, 4


@pytest.fixture
def recipe(small_recipe):
    return small_recipe(
        data={"val_split": "", "test_split": ""},
        optim={"lr": 1e-4},
        train={"steps": STEPS, "batch_size": BATCH, "checkpoint_every": 4, "log_every": 1, "keep_last": 2},
    )


@pytest.fixture
def uninterrupted(recipe, tmp_path):
    """The history of one process that nobody disturbs."""
    loop.train(recipe, out=tmp_path / "alone", world=World())
    return read_history(tmp_path / "alone" / "log.jsonl").steps


@pytest.fixture
def start_torchrun(recipe, tmp_path):
    """Start real torchrun; what rank 0 shows comes line by line. What a failed test leaves running is killed."""
    file, started = tmp_path / "small.toml", []
    file.write_text(as_toml(recipe))

    def start(*, ranks, threads, restarts=0):
        options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        train = ["-m", "train", str(file), "--out", str(tmp_path / "run"), "--set", f"data.threads={threads}"]
        with open(tmp_path / f"said-{len(started)}.txt", "w") as said:
            torchrun = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *options, *train],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=said,
                bufsize=0,
                pipesize=4096,  # some 60 lines: a run that nobody reads waits, and cannot reach its end unseen
            )
        started.append(torchrun)
        return torchrun

    yield start
    for torchrun in started:
        if torchrun.poll() is None:
            kill_all(torchrun)
        torchrun.communicate()


def wait_for(torchrun, what, step=0):
    """Read what is shown until `what` reached a step ("start: step 8", "step 9/60"); which one it was."""
    for line in torchrun.stdout:
        shown = re.match(rf"{what} (\d+)", line.decode())
        if shown and int(shown[1]) >= step:
            return int(shown[1])
    raise AssertionError(f"it ended before {what} {step}")


def kill_all(torchrun):
    """What a lost machine looks like: the agent and all ranks at once."""
    victims = [*psutil.Process(torchrun.pid).children(recursive=True), psutil.Process(torchrun.pid)]
    for process in victims:
        process.kill()
    psutil.wait_procs(victims, timeout=30)
    torchrun.wait()


def kill_one_rank(torchrun, chosen):
    """What a rank out of memory looks like."""
    ranks = psutil.Process(torchrun.pid).children()
    ranks[chosen % len(ranks)].kill()


def assert_as_uninterrupted(steps, expected):
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["windows"] == theirs["windows"]
        assert ours["position"] == theirs["position"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    taken = [window for entry in steps for window in entry["windows"]]
    for epoch in range(len(taken) // WINDOWS):
        assert sorted(taken[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == list(range(WINDOWS))


@pytest.mark.parametrize("threads", [1, 2])
def test_global_batch_k_is_the_same_on_any_number_of_ranks_and_threads(recipe, uninterrupted, tmp_path, threads):
    for size in (1, 2, 3, 4):
        with ExitStack() as stack:
            changed = replace(recipe, data=replace(recipe.data, threads=threads))
            parts = [
                loop.open_part(changed, split="train", seed=0, world=World(rank=rank, size=size), stack=stack)
                for rank in range(size)
            ]
            streams = [loop.endless(part) for part in parts]
            for entry in uninterrupted:
                shares = [next(stream).window.tolist() for stream in streams]
                assert all(shares)
                assert [window for share in shares for window in share] == entry["windows"]


def test_killed_stopped_and_resumed_on_other_worlds_every_window_counts_once_per_epoch(
    start_torchrun, uninterrupted, tmp_path
):
    out, chance = tmp_path / "run", random.Random(os.urandom(8))

    lost = start_torchrun(ranks=3, threads=1)
    wait_for(lost, "step", chance.randrange(5, 15))
    kill_all(lost)

    # A rank dies; torchrun starts all again, and they go on by themselves.
    crashed = start_torchrun(ranks=2, threads=2, restarts=1)
    resumed = wait_for(crashed, "start: step")
    wait_for(crashed, "step", resumed + chance.randrange(5, 12))
    kill_one_rank(crashed, chance.randrange(2))
    again = wait_for(crashed, "start: step", resumed)
    wait_for(crashed, "step", again + 1)
    # A scheduler wants the machine back.
    for rank in psutil.Process(crashed.pid).children():
        rank.terminate()
    said = crashed.communicate(timeout=60)[0].decode()
    assert crashed.returncode == 0, said + (tmp_path / "said-1.txt").read_text()
    assert "the same command goes on" in said
    assert checkpoint_steps(out / "checkpoints")[0] == read_history(out / "log.jsonl").steps[-1]["step"] < STEPS

    last = start_torchrun(ranks=4, threads=1)
    last.communicate(timeout=120)
    assert last.returncode == 0

    assert_as_uninterrupted(read_history(out / "log.jsonl").steps, uninterrupted)
    starts = [line for line in (out / "log.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 4
