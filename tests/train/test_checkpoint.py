"""A checkpoint is whole or not there; a damaged one is named and the one before it taken."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmristream.errors import CorruptDataError
from train.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    gather_rng,
    load_checkpoint,
    newest_whole,
    restore_rng,
    save_checkpoint,
)
from train.launch import World

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]


def checkpoint_at(step):
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        model={"weight": torch.randn(40, 30, generator=generator).T, "count": torch.tensor(step)},
        optimizer={
            "step/weight": torch.tensor(float(step)),
            "exp_avg/weight": torch.randn(30, 40, generator=generator),
        },
        rng={"cpu": torch.randint(0, 256, (2, 64), dtype=torch.uint8, generator=generator)},
        state={"loader": {"position": 8 * step, "selection": "ab12"}, "world_size": 2},
    )


def assert_same(found, expected):
    assert found is not None
    assert found.step == expected.step
    for name in ("model", "optimizer", "rng"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor)
    assert found.state["loader"] == expected.state["loader"]


@pytest.fixture
def root(tmp_path):
    for step in (100, 200):
        save_checkpoint(tmp_path / "checkpoints", checkpoint_at(step), keep_last=5)
    return tmp_path / "checkpoints"


def test_what_is_saved_is_loaded_bit_for_bit(root):
    assert_same(load_checkpoint(root / "step-100"), checkpoint_at(100))
    found, damaged = newest_whole(root)
    assert_same(found, checkpoint_at(200))
    assert damaged == []


def test_the_folder_has_the_documented_layout_and_no_pickle(root):
    assert sorted(path.name for path in (root / "step-200").iterdir()) == sorted(FILES)
    state = json.loads((root / "step-200" / "state.json").read_text())
    assert (state["step"], state["loader"]["position"]) == (200, 1600)
    listed = json.loads((root / "step-200" / "manifest.json").read_text())["files"]
    assert set(listed) == set(FILES) - {"manifest.json"}


def test_without_a_checkpoint_there_is_none_and_nothing_is_wrong(tmp_path):
    assert newest_whole(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-5").write_text("a file")
    assert newest_whole(tmp_path) == (None, [])


def test_steps_are_ordered_as_numbers_and_only_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, checkpoint_at(step), keep_last=2)
    assert checkpoint_steps(tmp_path) == [100, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]


def damage(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(root, name, how):
    damage(root / "step-200" / name, how, random.Random(f"{name} {how}"))
    found, damaged = newest_whole(root)
    assert_same(found, checkpoint_at(100))
    assert [fault.folder.name for fault in damaged] == ["step-200"]
    assert name in damaged[0].reason


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FILES), st.randoms(use_true_random=False))
def test_no_flipped_bit_anywhere_loads_as_something_else(tmp_path_factory, name, rng):
    folder = Path(save_checkpoint(tmp_path_factory.mktemp("flip"), checkpoint_at(7), keep_last=1))
    damage(folder / name, "flipped", rng)
    found, damaged = newest_whole(folder.parent)
    if found:  # white space in the manifest
        assert_same(found, checkpoint_at(7))
    else:
        assert str(folder) in damaged[0].reason


def test_a_file_of_another_checkpoint_does_not_pass(root):
    (root / "step-200" / "model.safetensors").write_bytes((root / "step-100" / "model.safetensors").read_bytes())
    with pytest.raises(CorruptDataError, match="sha256"):
        load_checkpoint(root / "step-200")


def test_when_all_are_damaged_there_is_none_and_all_are_named(root):
    for step in (100, 200):
        (root / f"step-{step}" / "manifest.json").write_text("[]")
    found, damaged = newest_whole(root)
    assert found is None
    assert [fault.folder.name for fault in damaged] == ["step-200", "step-100"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(root):
    (root / "step-200" / "state.json").write_text("{}")
    save_checkpoint(root, checkpoint_at(200), keep_last=5)
    found, damaged = newest_whole(root)
    assert_same(found, checkpoint_at(200))
    assert damaged == []
    assert sorted(path.name for path in root.iterdir()) == ["step-100", "step-200"]


KILL_AT_EVERY_TOUCH = """
import os, signal, sys
from pathlib import Path
import torch
from train.checkpoint import Checkpoint, newest_whole, save_checkpoint

def tensors(step):
    return {"weight": torch.full((500,), float(step))}

def killed(root, step, at_event):
    child = os.fork()
    if child == 0:
        left = at_event
        def count(event, arguments):
            nonlocal left
            if event.startswith(("open", "os.", "shutil.")) and event != "os.kill":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        values, status = tensors(step), 1
        try:
            save_checkpoint(root, Checkpoint(step=step, model=values, optimizer=values, rng=values, state={}), keep_last=2)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)

root, newest, kills = Path(sys.argv[1]), -1, 0
for step in range(1000):
    was_killed = killed(root, step, kills)
    found, damaged = newest_whole(root)
    assert damaged == [], damaged
    assert (found.step if found else -1) in ((newest, step) if was_killed else (step,)), (step, newest)
    if found:
        newest = found.step
        assert torch.equal(found.model["weight"], tensors(newest)["weight"])
    if not was_killed:
        break
    kills += 1
print(kills, sorted(path.name for path in root.iterdir()))
"""


def test_killed_at_any_touch_of_the_disk_a_save_leaves_the_old_or_the_new_one_whole(tmp_path):
    # In a process of its own: forks of this one would inherit locks of torch's threads.
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_TOUCH, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    kills, names = done.stdout.split(maxsplit=1)
    assert int(kills) > 10
    assert ".unfinished" not in names


def test_random_state_from_a_file_is_restored_on_every_rank(tmp_path):
    # The rows of a loaded file lie at any multiple of 8 bytes, on which torch's own function crashes.
    torch.manual_seed(3)
    rng = {"cpu": torch.stack([torch.get_rng_state()] * 4), "pad": torch.zeros(8, dtype=torch.uint8)}
    expected = torch.rand(3)
    folder = save_checkpoint(tmp_path, replace(checkpoint_at(1), rng=rng), keep_last=1)
    for rank in range(4):
        torch.manual_seed(rank)
        restore_rng(load_checkpoint(folder).rng, World(rank=rank, size=4))
        assert torch.equal(torch.rand(3), expected)


def test_random_state_goes_on_where_it_was_and_a_new_rank_keeps_its_own():
    torch.manual_seed(11)
    states = gather_rng(World())
    expected = torch.rand(4)
    restore_rng(states, World())
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(12)
    own = torch.rand(4)
    torch.manual_seed(12)
    restore_rng(states, World(rank=1, size=2))
    assert torch.equal(torch.rand(4), own)
