"""What four ranks wrote in parts, three ranks and one read to the bit; a part that is lost is named on every rank."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmristream.errors import CorruptDataError
from train.checkpoint import load_checkpoint, newest_whole
from train.checkpoint_sharded import joined, require_whole
from train.optim import optimizer_tensors, restore_optimizer

from . import checkpoint_ranks

RANKS = Path(__file__).with_name("checkpoint_ranks.py")
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "TORCH_CPP_LOG_LEVEL": "FATAL"}


def start_ranks(size, duty, out, **environment):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    return subprocess.Popen(
        [sys.executable, str(RANKS), duty, str(out)],
        env=os.environ | QUIET | {"RANKS": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ran(size, duty, out):
    """What each rank found."""
    process = start_ranks(size, duty, out)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return [json.loads((out / f"{duty}-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of 4 ranks, copies that are damaged or not seen by all, and what 3 ranks read of them."""
    out = tmp_path_factory.mktemp("sharded")
    wrote = ran(4, "write", out)
    shutil.copytree(out / "checkpoints", out / "damaged")
    (out / "damaged" / "step-6" / "optimizer-00002-of-00004.safetensors").unlink()
    shutil.copytree(out / "checkpoints", out / "seen-by-0")
    shutil.copytree(out / "checkpoints", out / "seen-by-1")
    return out, wrote, ran(3, "read", out)


def test_every_rank_writes_its_own_part_as_safetensors_and_nothing_is_pickled(written):
    out, _, _ = written
    names = {path.name for path in (out / "checkpoints" / "step-6").iterdir()}
    parts = {f"{section}-{rank:05d}-of-00004.safetensors" for section in ("model", "optimizer") for rank in range(3)}
    assert names == parts | {"rng.safetensors", "state.json", "layout.json", "manifest.json"}  # rank 3 has no row of 5
    rows = [
        len(load_file(out / "checkpoints" / "step-6" / f"model-{rank:05d}-of-00004.safetensors")["0.weight"])
        for rank in range(3)
    ]
    assert rows == [2, 2, 1]


def test_one_process_reads_what_four_wrote_as_torch_puts_it_together(written):
    out, _, _ = written
    for step in (3, 6):
        reference = load_file(out / f"reference-{step}.safetensors")
        found = load_checkpoint(out / "checkpoints" / f"step-{step}")
        now = dict(found.model) | {f"o/{name}": tensor for name, tensor in found.optimizer.items()}
        assert set(now) == set(reference)
        assert all(torch.equal(now[name], reference[name]) for name in reference)
        assert (found.state["made_by"], found.step) == (4, step)
        assert found.rng["cpu"].shape[0] == 4
        model = checkpoint_ranks.network()
        model.load_state_dict(dict(found.model))
        optimizer = checkpoint_ranks.optimizer_of(model)
        restore_optimizer(model, optimizer, dict(found.optimizer))
        assert torch.equal(optimizer_tensors(model, optimizer)["exp_avg/0.weight"], reference["o/exp_avg/0.weight"])


def test_three_ranks_read_what_four_wrote_to_the_bit_before_and_after_they_cut_the_network(written):
    _, _, read = written
    for found in read:
        assert found["checkpoints"]["step"] == 6
        assert found["checkpoints"]["same"] == {"weights, then cut": True, "cut, then weights": True}
        assert found["checkpoints"]["reports"] == []


def test_a_rank_file_that_is_lost_is_named_and_every_rank_takes_the_checkpoint_before(written):
    _, _, read = written
    for rank, found in enumerate(read):
        assert found["damaged"]["step"] == 3
        assert all(found["damaged"]["same"].values())
        if rank == 0:
            (report,) = found["damaged"]["reports"]
            assert (report["event"], report["checkpoint"]) == ("damaged", "step-6")
            assert "optimizer-00002-of-00004.safetensors" in report["reason"]


def test_a_rank_that_does_not_see_what_rank_0_sees_stops_all(written):
    _, _, read = written
    assert all("step-6" in found["differ"] for found in read)
    assert all("rank 2:" in found["differ"] for found in read[:2])


def test_a_full_disk_of_one_rank_is_told_on_all_and_leaves_the_checkpoints_before(written):
    out, wrote, _ = written
    for found in wrote:
        assert "the checkpoint of step 9 could not be written: rank 2:" in found["failed"]
        assert "File too large" in found["failed"]
    found, damaged = newest_whole(out / "checkpoints")
    assert (found.step, damaged) == (6, [])
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-3", "step-6"]


def part(offsets, shape, file="a"):
    return {"file": file, "offsets": offsets, "shape": shape}


@pytest.mark.parametrize(
    "parts",
    [
        [part([0, 0], [2, 3])],  # a row is missing
        [part([0, 0], [2, 3]), part([1, 0], [2, 3])],  # one is there twice, and one is missing
        [part([0, 0], [3, 3]), part([2, 0], [1, 3])],
        [part([0, 0], [3, 3]), part([3, 0], [0, 3]), part([3, 0], [1, 3])],  # reaches out
        [part([0], [3])],
    ],
)
def test_parts_that_are_not_the_whole_of_a_tensor_are_refused(parts):
    share = {"weight": {"dtype": "float32", "shape": [3, 3], "parts": parts}}
    with pytest.raises(CorruptDataError, match="weight are not the whole"):
        joined([share], where="here")
    require_whole({"weight": {**share["weight"], "parts": [part([0, 0], [2, 3]), part([2, 0], [1, 3])]}}, where="here")
