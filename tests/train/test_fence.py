"""Two attempts at one run: the newer one goes on, the older one ends and leaves nothing that counts."""

import json
from contextlib import ExitStack, suppress
from dataclasses import replace

import psutil
import pytest

from fmristream.errors import ConflictError, ResumeError, StorageError
from tests.train.agents import Run
from train import checkpoint_writing, fence, loop
from train.checkpoint import checkpoint_steps, newest_whole
from train.checkpoint_manifest import read_manifest
from train.checkpoint_shelf import open_shelf
from train.checkpoint_writing import Keep, new_token, take, write
from train.config import as_toml
from train.fence import SUPERSEDED, SupersededError, attempts_at, counts, take_over
from train.launch import World
from train.log import newest_attempt, read_history

from .checkpoint_places import checkpoint_at, save_whole


@pytest.fixture
def shelf(dataset_url):
    return open_shelf(f"{dataset_url}/checkpoints")


def save(shelf, step, by, *, last=5):
    made = checkpoint_at(step)
    sections = {name: getattr(made, name) for name in ("model", "optimizer", "rng")}
    write(shelf, take(sections, made.state, step=step, token=new_token()), keep=Keep(last=last), fence=by)


def slip_through(shelf, step, by, monkeypatch):
    """What is left where an attempt had looked before the newer one began, and was held up then."""
    with monkeypatch.context() as patch:
        patch.setattr(by, "check", lambda: None)
        patch.setattr(checkpoint_writing, "prune", lambda *given, **options: None)
        save(shelf, step, by)


def begin(shelf, step, newer_than=()):
    return take_over(shelf, step=step, newer_than=newer_than)


def test_the_newer_attempt_writes_and_the_older_one_touches_nothing(shelf):
    old = begin(shelf, 0)
    save(shelf, 4, old)
    new = begin(shelf, 4)
    shelf.write(8, "feedbeef", name="model.safetensors", data=b"of the newer one")
    with pytest.raises(SupersededError, match=r"took over at step 4.*was it started twice"):
        save(shelf, 8, old)
    assert shelf.unfinished(8, "feedbeef").read(shelf.place("feedbeef", "model.safetensors")) == b"of the newer one"
    save(shelf, 8, new)
    assert shelf.steps() == [8, 4]
    assert read_manifest(shelf.folder("step-8")).attempt == new.attempt.id > old.attempt.id


def test_a_checkpoint_that_slips_through_after_the_newer_one_began_is_passed_over_and_removed(shelf, monkeypatch):
    old = begin(shelf, 0)
    save(shelf, 4, old)
    new = begin(shelf, 4)
    slip_through(shelf, 12, old, monkeypatch)
    assert shelf.steps() == [12, 4]
    found, damaged = newest_whole(shelf.where)
    assert (found.step, damaged) == (4, [])
    third = begin(shelf, 4)
    save(shelf, 8, third)
    assert newest_whole(shelf.where)[0].step == 8
    save(shelf, 14, third, last=2)
    assert shelf.steps() == [14, 8]
    assert not counts(step=12, attempt=old.attempt.id, attempts=attempts_at(shelf))
    assert new.attempt.id < third.attempt.id


def test_where_only_a_superseded_attempts_checkpoint_is_left_nothing_begins_anew(shelf, monkeypatch):
    old = begin(shelf, 0)
    save(shelf, 4, old)
    begin(shelf, 4)
    slip_through(shelf, 12, old, monkeypatch)
    shelf.remove(4)
    with pytest.raises(ResumeError, match=r"holds step-12 of a superseded attempt only"):
        newest_whole(shelf.where)


def test_checkpoints_of_before_there_were_attempts_are_gone_on_from(shelf):
    save_whole(shelf.where, checkpoint_at(100))
    save(shelf, 104, begin(shelf, 100))
    found, damaged = newest_whole(shelf.where)
    assert (found.step, damaged) == (104, [])
    save(shelf, 108, begin(shelf, 104), last=5)
    assert shelf.steps() == [108, 104, 100]


def test_a_lost_reply_is_no_other_attempt(memory_url, monkeypatch):
    shelf = open_shelf(f"{memory_url}/checkpoints")
    first = begin(shelf, 0)
    put = shelf._store.put_new

    def put_and_lose(key, data):
        put(key, data)
        raise StorageError("memory://bucket: no answer")

    with monkeypatch.context() as patch:
        patch.setattr(shelf._store, "put_new", put_and_lose)
        with pytest.raises(StorageError, match="no answer"):
            begin(shelf, 0)
    again = begin(shelf, 0)  # as a restart does
    again.check()
    save(shelf, 4, again)
    with pytest.raises(SupersededError):
        first.check()


def test_of_two_that_begin_in_the_same_moment_one_goes_on(tmp_path, monkeypatch):
    shelf = open_shelf(tmp_path / "checkpoints")
    monkeypatch.setattr(fence, "attempts_at", lambda place: [])  # neither sees the other
    both = [begin(shelf, 0), begin(shelf, 0)]
    monkeypatch.undo()
    refused = 0
    for one in both:
        try:
            one.check()
        except SupersededError:
            refused += 1
    assert {one.attempt.id[:8] for one in both} == {"00000001"}
    assert refused == 1


def test_numbers_go_on_where_notes_were_removed_and_the_log_remembers(tmp_path):
    shelf = open_shelf(tmp_path / "checkpoints")
    assert begin(shelf, 0, newer_than=["00000041-ffffffff", ""]).attempt.id.startswith("00000042-")


def test_an_agent_whose_run_was_taken_by_another_job_does_not_take_it_back(tmp_path, monkeypatch):
    shelf = open_shelf(tmp_path / "checkpoints")

    def start(job, launcher):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setattr(fence, "launcher_id", lambda: launcher)
        return begin(shelf, 0)

    start("a", "aaaaaaaa")
    start("a", "aaaaaaaa")  # elastic restarts
    start("a", "aaaaaaa2")  # rank 0 is on another machine
    start("a", "aaaaaaaa")
    start("b", "bbbbbbbb")
    with pytest.raises(SupersededError, match="left to that one"):
        start("a", "aaaaaaaa")
    start("b", "bbbbbbbb")
    start("a", "aaaaaaa3")  # somebody gave the command again


def line(event, step, by=""):
    return json.dumps({"event": event, **({"attempt": by} if by else {}), "step": step, "by": by}) + "\n"


def test_lines_of_a_superseded_attempt_after_a_newer_start_count_nothing(tmp_path):
    old, new, path = "00000001-ffffffff", "00000002-00000000", tmp_path / "log.jsonl"
    path.write_text(
        line("start", 0) + line("step", 1) + line("start", 1, old) + line("step", 2, old) + line("step", 3, old)
        + line("start", 2, new) + line("step", 4, old) + line("step", 3, new) + line("eval", 4, old)
        + line("start", 3, old) + line("step", 4, new) + line("eval", 4, new) + line("step", 5, old)
    )  # fmt: skip
    history = read_history(path)
    assert [(entry["step"], entry["by"]) for entry in history.steps] == [(1, ""), (2, old), (3, new), (4, new)]
    assert [entry["by"] for entry in history.evals] == [new]
    assert newest_attempt(path) == new


@pytest.fixture
def recipe(small_recipe):
    return small_recipe(
        data={"val_split": "", "test_split": ""},
        optim={"lr": 1e-4},
        train={"steps": 24, "batch_size": 12, "checkpoint_every": 4, "log_every": 50, "keep_last": 2},
    )


def test_an_attempt_that_is_refused_disturbs_nobody_and_one_that_trains_ends_the_other(recipe, tmp_path):
    out = tmp_path / "run"
    short = replace(recipe, train=replace(recipe.train, steps=4))
    assert loop.train(short, out=out, world=World()) is not None
    with ExitStack() as stack:
        slow = loop.start(recipe, out=out, world=World(), stack=stack)
        other = replace(recipe, model=replace(recipe.model, options={**recipe.model.options, "embed_dim": 12}))
        with pytest.raises(ResumeError):
            loop.train(other, out=out, world=World())
        slow.saver.require_current()
        assert loop.train(recipe, out=out, world=World()) is not None  # somebody else, to the end
        before = sorted(path for path in (out / "checkpoints").rglob("*"))
        with pytest.raises(SupersededError):
            loop.fit(slow, slow.world.stop)
        slow.saver._job = None
    assert sorted(path for path in (out / "checkpoints").rglob("*")) == before
    assert [entry["step"] for entry in read_history(out / "log.jsonl").steps] == list(range(1, 25))


def test_an_attempt_that_is_alive_while_another_starts_is_told_of(recipe, tmp_path, monkeypatch):
    out, made = tmp_path / "run", loop.spread

    def spread(*given):
        save_whole(str(out / "checkpoints"), checkpoint_at(3))
        return made(*given)

    monkeypatch.setattr(loop, "spread", spread)
    with pytest.raises(ConflictError, match="so it is alive"):
        loop.train(recipe, out=out, world=World())


@pytest.mark.parametrize("first_kind", ["torchrun", pytest.param("ours", marks=pytest.mark.full)])
def test_of_two_worlds_in_one_folder_one_survives_and_the_history_is_exact(recipe, tmp_path, first_kind):
    recipe = replace(recipe, train=replace(recipe.train, steps=60))
    loop.train(recipe, out=tmp_path / "alone", world=World())
    out, path = tmp_path / "run", tmp_path / "recipe.toml"
    path.write_text(as_toml(recipe))
    second_kind = {"torchrun": "ours", "ours": "torchrun"}[first_kind]
    first = Run(path, out, nodes="1", kind=first_kind, nproc=2, restarts=2)
    second = Run(path, out, nodes="1", kind=second_kind, nproc=2, restarts=2)
    try:
        first.start(1)
        first.wait_for(lambda: first.steps_of_attempt(1) >= 5)
        ranks = first.ranks(first.agents)
        for rank in ranks:  # a machine that is thought dead, until the other world trains
            rank.suspend()
        second.start(1)
        second.wait_for(lambda: second.steps_of_attempt(2) >= 2)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()
        assert second.finish() == [0], second.said()
        (ended,) = first.finish()
    finally:
        first.kill()
        second.kill()
    said = first.said()
    assert ended == (SUPERSEDED if first_kind == "ours" else 1), said
    assert "took over" in said
    ours, theirs = (read_history(folder / "log.jsonl").steps for folder in (out, tmp_path / "alone"))
    assert [entry["step"] for entry in ours] == list(range(1, 61))
    assert [entry["windows"] for entry in ours] == [entry["windows"] for entry in theirs]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=1e-5)
    assert checkpoint_steps(out / "checkpoints")[0] == 60
    assert first.attempts() == 2
