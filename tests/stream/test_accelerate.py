"""Accelerate at two processes: global batches are the loader's own, and gradient accumulation knows where an epoch ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fmristream

pytest.importorskip("accelerate", reason="needs the package accelerate")

RANK = """
import json, os, sys
import torch
from accelerate import Accelerator
import fmristream
from fmristream.stream.huggingface import accelerate_loader
from fmristream.stream.torch_dataset import BatchStream

url, out = sys.argv[1:]
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
clips = fmristream.StreamingDataset(url, window=7, split="train", seed=3)
rank, size = accelerator.process_index, accelerator.num_processes
with fmristream.StreamingLoader(clips, batch_size=5, rank=rank, world_size=size) as loader:
    stream = BatchStream(loader)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, batches = accelerator.prepare(model, optimizer, accelerate_loader(stream, accelerator))
    seen, steps, states = [], [], []
    for epoch in range(2):
        for batch in batches:
            with accelerator.accumulate(model):
                loss = (model(batch.bold.mean().view(1, 1)) ** 2).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            steps.append(bool(accelerator.sync_gradients))
            seen.append((batch.position, batch.window.tolist()))
            states.append(stream.state_after(batch)["consumed"])
with open(f"{out}/{rank}.json", "w") as file:
    json.dump({"seen": seen, "steps": steps, "states": states, "size": size}, file)
accelerator.end_training()
"""


@pytest.mark.full
def test_global_batches_are_the_loaders_own(cohort_url, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, cohort_url, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["size"] for rank in ranks] == [2, 2]
    found = [
        (one[0], one[1] + other[1])
        for one, other in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)
        if one[0] == other[0]
    ]
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3)
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        lengths = []
        expected = []
        for _ in range(2):
            epoch = [(batch.position, batch.window.tolist()) for batch in loader]
            lengths.append(len(epoch))
            expected += epoch
    assert found == expected
    # Every fourth batch of an epoch steps, and its last one.
    steps = [(n + 1) % 4 == 0 or n + 1 == length for length in lengths for n in range(length)]
    assert ranks[0]["steps"] == ranks[1]["steps"] == steps
    assert ranks[0]["states"] == [position + 5 for position, _ in expected]
