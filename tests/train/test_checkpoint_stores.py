"""On a disk, in memory and in a bucket: whole or not there, named where it is damaged, and what stays of many."""

import json
import random
import resource
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from fmristream.errors import CorruptDataError, StorageError, UsageError
from fmristream.storage import open_store
from fmristream.storage.remote import ReplacingStore
from train.checkpoint import checkpoint_steps, find_checkpoint, load_checkpoint, newest_whole
from train.checkpoint_shelf import LocalShelf, ObjectShelf, open_shelf
from train.checkpoint_writing import Keep, mark_best, new_token, take, write
from train.sections import TrainConfig

from .checkpoint_places import Files, all_names, assert_same, checkpoint_at, save_sharded, save_whole

SAVE = {"whole": save_whole, "sharded": save_sharded}
FAULTS = ("flipped", "truncated", "missing", "longer")
# Of each fault; the rest of 30 runs in `make test-full`.
ROUNDS = [*range(3), *(pytest.param(n, marks=pytest.mark.full) for n in range(3, 30))]


def matrix():
    """(place, whole or sharded, fault, round): 30 of each on a disk and in memory, 5 on a server, which takes seconds each."""
    for kind, count in (("tmp_path", 30), ("memory_url", 30), ("s3_url", 5)):
        for saved in SAVE:
            for fault in FAULTS:
                for round_ in range(count):
                    is_few = round_ < 2 if kind != "s3_url" else (saved, fault, round_) == ("whole", "flipped", 0)
                    yield pytest.param(kind, saved, fault, round_, marks=[] if is_few else pytest.mark.full)


@pytest.fixture
def place(dataset_url):
    return f"{dataset_url}/checkpoints"


@pytest.fixture(params=list(SAVE))
def save(request):
    return SAVE[request.param]


def test_what_is_saved_is_loaded_bit_for_bit(place, save):
    for step in (100, 200):
        save(place, checkpoint_at(step))
    assert_same(load_checkpoint(f"{place}/step-100"), checkpoint_at(100))
    found, damaged = newest_whole(place)
    assert_same(found, checkpoint_at(200))
    assert damaged == []


@pytest.mark.parametrize(("kind", "saved", "how", "round_"), list(matrix()))
def test_a_damaged_checkpoint_is_named_with_its_file_and_the_one_before_it_taken(request, kind, saved, how, round_):
    rng, save = random.Random(f"{how} {round_} {saved}"), SAVE[saved]
    place = f"{request.getfixturevalue(kind)}/checkpoints"
    for step in (100, 200):
        save(place, checkpoint_at(step))
    files = Files(place, 200)
    name = rng.choice(files.names())
    files.damage(name, how, rng)
    found, damaged = newest_whole(place)
    if not damaged:  # white space in the manifest
        assert (how, name) == ("flipped", "manifest.json")
        assert_same(found, checkpoint_at(200))
        return
    assert_same(found, checkpoint_at(100))
    assert [fault.folder.name for fault in damaged] == ["step-200"]
    assert name in damaged[0].reason
    # Reached again, it is replaced, and nothing of the damaged one is left.
    save(place, checkpoint_at(200))
    again, damaged = newest_whole(place)
    assert_same(again, checkpoint_at(200))
    assert damaged == []
    if name != "manifest.json":
        assert len(files.names()) == len(Files(place, 100).names())


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path, save, round_):
    place = str(tmp_path / "checkpoints")
    save(place, checkpoint_at(100), keep_last=1)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-100").iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (random.Random(round_).randrange(largest), hard))
    try:
        with pytest.raises(StorageError, match=r"step 200 could not be written.*File too large"):
            save(place, checkpoint_at(200), keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    found, damaged = newest_whole(place)
    assert_same(found, checkpoint_at(100))
    assert damaged == []
    assert all(name.startswith("step-100/") for name in all_names(place))  # its room is free again
    save(place, checkpoint_at(200), keep_last=1)
    assert_same(newest_whole(place)[0], checkpoint_at(200))


class FailsOnce:
    """A store whose k-th call fails, done or not done."""

    def __init__(self, inner, at, *, is_done):
        self._inner, self._left, self._is_done = inner, at, is_done
        self.calls = 0

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if name == "name" or not callable(found):
            return found

        def call(*arguments):
            self.calls += 1
            if self.calls - 1 == self._left:
                if self._is_done:
                    found(*arguments)
                raise StorageError("memory://bucket: no answer")
            return found(*arguments)

        return call


@pytest.mark.parametrize("is_done", [False, True])
def test_a_store_that_fails_at_any_call_leaves_a_whole_checkpoint_and_the_next_one_cleans_up(memory_url, is_done):
    reached = False
    for k in range(200):
        url = f"{memory_url}-{k}"
        save_whole(f"{url}/checkpoints", checkpoint_at(100))
        store = FailsOnce(open_store(url), k, is_done=is_done)
        shelf = ObjectShelf(store, "checkpoints")
        snapshot = snapshot_at(200)
        with suppress(StorageError):
            write(shelf, snapshot, keep=Keep(last=1))
        found, _ = newest_whole(f"{url}/checkpoints")
        assert_same(found, checkpoint_at(found.step))
        assert found.step in (100, 200)
        save_whole(f"{url}/checkpoints", checkpoint_at(300), keep_last=1)
        assert {name.partition("/")[0] for name in all_names(f"{url}/checkpoints")} == {"step-300"}
        assert len(all_names(f"{url}/checkpoints")) == 5
        if store.calls <= k:
            reached = True
            break
    assert reached
    assert k > 15


def snapshot_at(step):
    made = checkpoint_at(step)
    sections = {name: getattr(made, name) for name in ("model", "optimizer", "rng")}
    return take(sections, made.state, step=step, token=new_token())


def test_a_bucket_that_is_lost_is_an_error_and_not_an_empty_one(s3_endpoint):
    with pytest.raises(StorageError, match="no-such-bucket"):
        save_whole("s3://no-such-bucket/run/checkpoints", checkpoint_at(1))
    with pytest.raises(StorageError, match="no-such-bucket"):
        newest_whole("s3://no-such-bucket/run/checkpoints")


class Lying:
    """A disk that says it has written, and has something else."""

    def __init__(self, shelf, victim):
        self._shelf, self._victim = shelf, victim

    def __getattr__(self, name):
        return getattr(self._shelf, name)

    def write(self, step, token, *, name, data):
        if name == self._victim:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._shelf.write(step, token, name=name, data=data)


@pytest.mark.parametrize("victim", ["model.safetensors", "rng.safetensors", "state.json"])
def test_what_reads_back_as_something_else_never_becomes_visible(place, victim):
    save_whole(place, checkpoint_at(100))
    with pytest.raises(StorageError, match=f"{victim}: its sha256 .* right after it was written"):
        write(Lying(open_shelf(place), victim), snapshot_at(200), keep=Keep(last=1))
    assert checkpoint_steps(place) == [100]
    assert_same(newest_whole(place)[0], checkpoint_at(100))


def test_the_newest_and_the_best_are_kept(place):
    for step in (8, 9, 10, 100, 101):
        save_whole(place, checkpoint_at(step, is_best=step in (8, 9)), keep_last=2, keep_best=1)
    assert checkpoint_steps(place) == [101, 100, 9]
    assert load_checkpoint(f"{place}/step-9").is_best
    shelf = open_shelf(place)
    mark_best(shelf, 101, keep=Keep(last=2, best=1))
    assert checkpoint_steps(place) == [101, 100]
    found, _ = find_checkpoint(f"{place}/best")
    assert found.step == 101
    assert_same(found.whole(), checkpoint_at(101))


def test_the_last_one_stays_where_newer_ones_are_damaged(place):
    for step in (100, 200):
        save_whole(place, checkpoint_at(step))
    Files(place, 200).damage("manifest.json", "truncated", random.Random(1))
    save_whole(place, checkpoint_at(150), keep_last=1)
    found, damaged = newest_whole(place)
    assert_same(found, checkpoint_at(150))
    assert [fault.folder.name for fault in damaged] == ["step-200"]


def test_what_a_killed_writer_left_in_a_bucket_is_named_and_then_removed(s3_url):
    place = f"{s3_url}/checkpoints"
    save_whole(place, checkpoint_at(100))
    shelf = open_shelf(place)
    shelf.write(200, "deadbeef", name="model.safetensors", data=b"half")
    upload = open_store(s3_url).stream_new("checkpoints/step-200/deadbeef/optimizer.safetensors")
    upload.write(bytes(9 * 2**20))  # its first part is there, and nobody will say that it is complete
    assert len(open_store(s3_url).unfinished()) == 1
    found, damaged = newest_whole(place)
    assert_same(found, checkpoint_at(100))
    assert "manifest.json: is not there" in damaged[0].reason
    save_whole(place, checkpoint_at(300))
    assert checkpoint_steps(place) == [300, 100]
    assert open_store(s3_url).unfinished() == ()


def test_two_places_side_by_side_leave_each_other_alone(memory_url):
    save_whole(f"{memory_url}/checkpoints", checkpoint_at(1))
    save_whole(f"{memory_url}/checkpoints-2", checkpoint_at(2), keep_last=1)
    assert checkpoint_steps(f"{memory_url}/checkpoints") == [1]


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    place = tmp_path / "checkpoints"
    save_whole(place, checkpoint_at(1))
    manifest = json.loads((place / "step-1" / "manifest.json").read_bytes())
    from train import checkpoint_manifest

    del manifest["sha256"]
    manifest["files"]["model.safetensors"]["at"] = "../../secret"
    (place / "step-1" / "manifest.json").write_text(json.dumps(checkpoint_manifest._signed(manifest)))
    with pytest.raises(CorruptDataError, match="outside"):
        load_checkpoint(place / "step-1")


def test_any_scheme_that_fsspec_writes_keeps_checkpoints(memory_url):
    shelf = ObjectShelf(ReplacingStore(memory_url), "checkpoints")  # what gs:// and az:// are written by
    for step in (1, 2, 3):
        write(shelf, snapshot_at(step), keep=Keep(last=2))
    assert shelf.steps() == [3, 2]
    assert_same(newest_whole(f"{memory_url}/checkpoints")[0], checkpoint_at(3))


def test_secrets_in_urls_are_refused_without_being_shown():
    for url in ("s3://user:hunter2@bucket/run", "https://user:hunter2@host/run"):
        with pytest.raises(UsageError) as caught:
            replace(TrainConfig(), checkpoints=url)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match="takes no checkpoints"):
        replace(TrainConfig(), checkpoints="https://host/run?token=hunter2")
    with pytest.raises(UsageError, match="folder of a bucket"):
        open_shelf("s3://bucket")
    assert isinstance(open_shelf("file:///tmp/run"), LocalShelf)


def test_bfloat16_and_empty_tensors_survive(place):
    made = replace(
        checkpoint_at(1),
        model={"half": torch.arange(6, dtype=torch.bfloat16), "none": torch.zeros(0, 3), "flag": torch.tensor(True)},
        optimizer={},
    )
    save_whole(place, made)
    assert_same(newest_whole(place)[0], made)
