"""Synchronised batch normalisation makes several ranks with unequal shares compute what one process computes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from train.launch import World
from train.models.cnn_rnn_norm import FrameBatchNorm, make_norm

RANKS = Path(__file__).with_name("sync_norm_ranks.py")
ROOT = Path(__file__).parents[3]


def run_two_ranks(out):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(out)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def duties():
    spec = importlib.util.spec_from_file_location("sync_norm_ranks", RANKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["sync_batch", "sync_batch in chunks", "group"])
def test_two_ranks_give_the_outputs_gradients_and_statistics_of_one_process(ranks, duties, variant):
    model = duties.network(duties.VARIANTS[variant][1])
    expected = duties.step(model, model, slice(0, 5), World(rank=0, size=1, device=torch.device("cpu")))
    assert bool(expected["statistics"]) is (variant != "group")
    for name in ("outputs", "evaluated"):
        found = torch.tensor([*ranks[0][variant][name], *ranks[1][variant][name]])
        torch.testing.assert_close(found, torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)
    for rank in ranks:
        for name in ("gradient", "statistics"):
            found, by_one = torch.tensor(rank[variant][name]), torch.tensor(expected[name])
            torch.testing.assert_close(found, by_one, rtol=1e-4, atol=2e-5)


def test_alone_and_in_evaluation_it_is_torchs_own():
    torch.manual_seed(0)
    ours, torchs = FrameBatchNorm(3, is_synchronised=True), nn.BatchNorm3d(3)
    for _ in range(2):
        x = torch.randn(4, 3, 2, 5, 3)
        assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.eval()(x), torchs.eval()(x))
    assert list(ours.state_dict()) == list(torchs.state_dict())


@pytest.mark.parametrize(
    ("kind", "found"), [("group", nn.GroupNorm), ("batch", FrameBatchNorm), ("sync_batch", FrameBatchNorm)]
)
def test_a_norm_is_made_by_its_name(kind, found):
    assert type(make_norm(kind, 8, groups=2)) is found
