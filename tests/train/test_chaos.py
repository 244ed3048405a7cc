"""Machines and ranks are lost and join while a run trains; its history is that of a run that nobody disturbed."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import BUCKET, one_request_at_a_time
from tests.train.agents import Run
from train import loop
from train.checkpoint import checkpoint_steps
from train.config import as_toml
from train.launch import World
from train.report import read_history

WINDOWS = 50
# (machines lost or joined, ranks afterwards): 4 -> 2 -> 4 -> 3 -> 4 -> 2 -> 1 -> 2, and a rank that dies and comes back
EIGHT_ROUNDS = [(-2, 2), (2, 4), (-1, 3), (1, 4), (-2, 2), (-1, 1), (1, 2), (0, 2)]


@pytest.fixture
def make_recipe(small_recipe):
    """A short run without validation, as a value; its global batches of 12 can be dealt to 4 ranks and to 3."""

    def make(steps):
        return small_recipe(
            data={"val_split": "", "test_split": ""},
            optim={"lr": 1e-4},
            train={"steps": steps, "batch_size": 12, "checkpoint_every": 4, "log_every": 50, "keep_last": 2},
        )

    return make


@pytest.fixture
def start_run(tmp_path):
    """Write the recipe and prepare a run of it; all that it started ends with the test."""
    runs = []

    def start(recipe, name, **options):
        path = tmp_path / f"{name}.toml"
        path.write_text(as_toml(recipe))
        runs.append(Run(path, tmp_path / name, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def history(out: Path):
    return read_history(out / "log.jsonl").steps


def assert_every_window_once_per_epoch(steps):
    taken = [window for entry in steps for window in entry["windows"]]
    for epoch in range(len(taken) // WINDOWS):
        assert sorted(taken[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == list(range(WINDOWS))


def assert_undisturbed(steps, expected):
    assert [entry["step"] for entry in steps] == [entry["step"] for entry in expected]
    assert [entry["windows"] for entry in steps] == [entry["windows"] for entry in expected]
    assert [entry["position"] for entry in steps] == [entry["position"] for entry in expected]
    assert_every_window_once_per_epoch(steps)
    for ours, theirs in zip(steps[:200], expected, strict=False):  # beyond that rounding may have grown
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if ours["step"] <= 50 else 1e-5), ours["step"]


def disturb(run, rounds, chance):
    """Lose and join machines at random steps; how many seconds passed until ranks trained again, of each round."""
    attempt, took = run.attempts(), []
    for change, size in rounds:
        wanted = chance.randrange(1, 8)
        run.wait_for(lambda attempt=attempt, wanted=wanted: run.steps_of_attempt(attempt) >= wanted)
        before = time.monotonic()
        if change > 0:
            run.join(change)
            before = time.monotonic()
        elif change < 0:
            run.lose(-change, choose=chance.sample)
        else:
            chance.choice(run.ranks(run.agents)).kill()
        run.wait_for(lambda attempt=attempt: run.attempts() > attempt)
        attempt = run.wait_for_world(size)
        took.append(time.monotonic() - before)
        print(f"{change:+d} after {wanted} steps: {size} ranks train again after {took[-1]:.1f} s")
    return took


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["torchrun", "ours"])
def test_eight_rounds_of_machines_lost_and_joined_leave_the_history_of_one_process(
    make_recipe, start_run, tmp_path, kind
):
    recipe = make_recipe(300)
    loop.train(recipe, out=tmp_path / "alone", world=World())
    seed = int.from_bytes(os.urandom(4))
    print(f"{kind}, seed {seed}")
    run = start_run(recipe, "run", nodes="1:4", kind=kind, restarts=20)
    run.begin(4)
    took = disturb(run, EIGHT_ROUNDS, random.Random(seed))
    assert run.finish() == [0, 0], run.said()[-6000:]
    assert_undisturbed(history(run.out), history(tmp_path / "alone"))
    assert max(took) <= 60, took  # 30 s on a machine that has cores for all of them (docs/multinode.md)


@pytest.mark.full
@pytest.mark.parametrize("size", [3, 4])
def test_ranks_that_die_and_start_again_leave_the_same_losses_to_the_bit(make_recipe, start_run, tmp_path, size):
    recipe = make_recipe(60)
    undisturbed = start_run(recipe, "undisturbed", nodes="1", kind="torchrun", nproc=size)
    undisturbed.begin(1)
    assert undisturbed.finish() == [0], undisturbed.said()
    run = start_run(recipe, "run", nodes="1", kind="torchrun", nproc=size)
    run.begin(1)
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    disturb(run, [(0, size)] * 3, random.Random(seed))
    assert run.finish() == [0], run.said()
    ours, theirs = history(run.out), history(undisturbed.out)
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in theirs]
    assert [entry["windows"] for entry in ours] == [entry["windows"] for entry in theirs]
    assert_every_window_once_per_epoch(ours)


def test_a_rank_that_dies_is_named_and_the_steps_done_again_are_the_same_to_the_bit(make_recipe, start_run, tmp_path):
    recipe = make_recipe(30)
    loop.train(recipe, out=tmp_path / "alone", world=World())
    run = start_run(recipe, "run", nodes="1", kind="ours", nproc=2)
    run.begin(1)
    run.wait_for(lambda: run.steps_of_attempt(1) >= 7)  # the checkpoint is that of step 4 or later
    run.ranks(run.agents)[1].kill()
    assert run.finish() == [0], run.said()
    assert "was ended by SIGKILL; all start again from the last checkpoint (restart 1 of 3)" in run.said()
    assert_undisturbed(history(run.out), history(tmp_path / "alone"))
    first, second = attempts(run)
    again = {entry["step"]: (entry["loss"], entry["windows"]) for entry in second}
    assert second[0]["step"] % 4 == 1
    assert all(again[entry["step"]] == (entry["loss"], entry["windows"]) for entry in first if entry["step"] in again)
    assert len(first) >= 7


def attempts(run):
    """The steps of every attempt."""
    found = []
    for entry in run.events():
        if entry["event"] == "start":
            found.append([])
        elif entry["event"] == "step":
            found[-1].append(entry)
    return found


def test_when_one_of_two_machines_is_lost_the_other_goes_on(make_recipe, start_run, tmp_path):
    recipe = make_recipe(60)
    loop.train(recipe, out=tmp_path / "alone", world=World())
    run = start_run(recipe, "run", nodes="1:2", kind="ours")
    run.begin(2)
    took = disturb(run, [(-1, 1)], random.Random(1))
    assert run.finish() == [0], run.said()
    assert "rank 1 died or hangs" in run.said() or "rank 0 died or hangs" in run.said()
    assert len(took) == 1
    assert_undisturbed(history(run.out), history(tmp_path / "alone"))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["torchrun", "ours"])
def test_a_machine_that_is_asked_to_leave_costs_no_step_and_the_others_go_on(make_recipe, start_run, tmp_path, kind):
    recipe = make_recipe(60)
    loop.train(recipe, out=tmp_path / "alone", world=World())
    run = start_run(recipe, "run", nodes="1:2", kind=kind)
    run.begin(2)
    run.wait_for(lambda: run.steps_of_attempt(2) >= 3)
    leaving = run.agents.pop()
    leaving.send_signal(signal.SIGUSR1)
    assert leaving.wait(timeout=60) == (0 if kind == "ours" else 1)  # torchrun calls every signal a failure
    run.wait_for_world(1)
    assert run.finish() == [0], run.said()
    assert [entry["step"] for attempt in attempts(run) for entry in attempt] == list(range(1, 61))
    assert_undisturbed(history(run.out), history(tmp_path / "alone"))


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_end_goes_on_with_the_next_step(make_recipe, start_run, tmp_path, number):
    recipe = make_recipe(40)
    first, second = (start_run(recipe, "run", nodes="1", kind="ours", nproc=2) for _ in range(2))
    first.begin(1)
    first.wait_for(lambda: first.steps_of_attempt(1) >= 3)
    first.agents[0].send_signal(number)
    assert first.finish() == [0], first.said()
    assert "the same command goes on" in first.said()
    second.begin(1)
    assert second.finish() == [0], second.said()
    assert [entry["step"] for attempt in attempts(second) for entry in attempt] == list(range(1, 41))


@pytest.mark.full
def test_ranks_end_with_their_agent_after_a_checkpoint(make_recipe, start_run):
    run = start_run(make_recipe(400), "run", nodes="1", kind="torchrun", nproc=2)
    run.begin(1)
    ranks, agent = run.ranks(run.agents), run.agents.pop()
    agent.kill()
    agent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert run.events()[-1] == {"event": "stop", "step": checkpoint_steps(run.out / "checkpoints")[0]}


@pytest.mark.full
def test_a_rank_that_hangs_is_named_ended_and_started_again(make_recipe, start_run, tmp_path):
    recipe = make_recipe(40)
    recipe = replace(recipe, train=replace(recipe.train, timeout_s=10.0))
    loop.train(recipe, out=tmp_path / "alone", world=World())
    run = start_run(recipe, "run", nodes="1", kind="ours", nproc=3)
    run.begin(1)
    ranks = sorted(run.ranks(run.agents), key=lambda process: process.create_time())
    number = ranks[1].environ()["RANK"]
    ranks[1].suspend()
    run.wait_for(lambda: "hangs" in run.said(), timeout_s=40)
    assert f"rank {number} died or hangs" in run.said(), run.said()
    assert run.finish() == [0], run.said()
    assert_undisturbed(history(run.out), history(tmp_path / "alone"))


@pytest.mark.full
def test_a_run_ends_with_the_machine_where_all_meet_and_goes_on_when_it_is_started_again(
    make_recipe, start_run, tmp_path
):
    recipe = make_recipe(60)
    loop.train(recipe, out=tmp_path / "alone", world=World())
    run = start_run(recipe, "run", nodes="1:2", kind="ours")
    run.begin(2)
    host = run.agents.pop(0)
    for process in [*run.ranks([host]), host]:
        process.kill()
    host.wait()
    assert run.finish(timeout_s=100) == [1], run.said()
    assert "where the machines meet, was lost, which ends the run; start the same command" in run.said()
    again = start_run(recipe, "run", nodes="1:2", kind="ours")
    again.begin(1)
    assert again.finish() == [0], again.said()
    assert_undisturbed(history(run.out), history(tmp_path / "alone"))


@pytest.mark.full
def test_a_bucket_lost_in_the_middle_is_said_and_the_last_checkpoint_goes_on(
    make_recipe, start_run, tmp_path, monkeypatch, cohort
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    recipe = make_recipe(60)
    recipe = replace(recipe, data=replace(recipe.data, url=f"s3://{BUCKET}/lost"))
    lost, found = (start_run(recipe, "run", nodes="1", kind="ours", nproc=2, restarts=0) for _ in range(2))
    with one_request_at_a_time() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        upload(Path(cohort), endpoint)
        lost.begin(1)
        lost.wait_for(lambda: lost.steps_of_attempt(1) >= 6)
    assert lost.finish() == [1], lost.said()
    print(lost.said())
    assert "train [rank " in lost.said()
    assert checkpoint_steps(lost.out / "checkpoints")[0] >= 4
    with one_request_at_a_time() as endpoint:  # moto keeps what it held
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        found.begin(1)
        assert found.finish() == [0], found.said()
    assert_every_window_once_per_epoch(history(found.out))


def upload(folder, endpoint):
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"lost/{path.relative_to(folder)}", Body=path.read_bytes())
    client.close()
