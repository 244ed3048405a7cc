"""ClipsDataModule in Lightning's own loop: our batches in our order, and a checkpoint in mid-epoch resumed exactly."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmristream
from fmristream.stream.augment import Compose, Intensity

pytest.importorskip("lightning", reason="needs the package lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning"),  # Lightning's own, about everything that it would do differently
]


@pytest.fixture(scope="module")
def lightning():
    import lightning.pytorch

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lightning.pytorch


@pytest.fixture
def module(cohort_url):
    from fmristream.stream.lightning import ClipsDataModule

    made = []

    def make(**more):
        train = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3)
        val = fmristream.StreamingDataset(cohort_url, window=7, split="val")
        made.append(ClipsDataModule(train=train, val=val, batch_size=5, eval_batch_size=3, **more))
        return made[-1]

    yield make
    for one in made:
        one.teardown("fit")


@pytest.fixture
def listener(lightning):
    class Listener(lightning.LightningModule):
        """Learns one number, and notes what it was shown."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.trained, self.validated, self.means = [], [], []

        def training_step(self, batch, number):
            assert batch.placed is not None
            self.trained.append(batch.window.tolist())
            self.means.append(batch.bold.mean().item())
            return (self.weight - batch.bold.mean()) ** 2

        def validation_step(self, batch, number):
            self.validated.append((batch.window.tolist(), batch.valid.tolist()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Listener


def trainer(lightning, folder, **more):
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **{"enable_checkpointing": False, "num_sanity_val_steps": 1} | more,
    )  # fmt: skip


def expected_of(url: str) -> list[list[int]]:
    clips = fmristream.StreamingDataset(url, window=7, split="train", seed=3)
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        return [batch.window.tolist() for _ in range(2) for batch in loader]


def test_lightning_trains_and_validates_on_our_batches(lightning, module, listener, cohort_url, tmp_path):
    seen = listener()
    trainer(lightning, tmp_path, max_epochs=2).fit(seen, module())
    assert seen.trained == expected_of(cohort_url)
    clips = fmristream.StreamingDataset(cohort_url, window=7, split="val")
    with fmristream.StreamingLoader(clips, batch_size=3) as loader:
        once = [(batch.window.tolist(), batch.valid.tolist()) for batch in loader]
    assert seen.validated == once[:1] + once + once  # the sanity check begins, and every pass is whole


@pytest.mark.parametrize(
    "steps", [pytest.param(4, marks=pytest.mark.full), 10, pytest.param(13, marks=pytest.mark.full)]
)
def test_a_checkpoint_is_resumed_exactly(lightning, module, listener, cohort_url, tmp_path, steps):
    """In mid-epoch, at the end of the first one (10 batches), and after a stop that Lightning counts as an epoch's end."""
    expected = expected_of(cohort_url)
    begun, resumed, again = listener(), listener(), listener()
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    first = trainer(lightning, tmp_path, max_steps=steps, enable_checkpointing=True, callbacks=[saver])
    first.fit(begun, module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    for seen, path in ((resumed, f"step={steps}.ckpt"), (again, "stopped.ckpt")):
        trainer(lightning, tmp_path, max_epochs=3).fit(seen, module(), ckpt_path=tmp_path / path)
        found = begun.trained + seen.trained
        assert len(found) >= len(expected)
        assert found[: len(expected)] == expected


def test_training_batches_are_augmented_and_others_are_not(lightning, module, listener, tmp_path):
    plain, varied = listener(), listener()
    for seen, augment in ((plain, None), (varied, Compose((Intensity(scale=0.0, shift=5.0),)))):
        trainer(lightning, tmp_path, max_steps=3).fit(seen, module(augment=augment))
    assert plain.trained == varied.trained
    assert all(abs(one - other) > 1e-3 for one, other in zip(plain.means, varied.means, strict=True))


RANK = """
import json, os, sys
import lightning, torch
import fmristream
from fmristream.stream.lightning import ClipsDataModule

url, out = sys.argv[1:]

class Listener(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, number):
        self.seen.append((batch.position, batch.window.tolist()))
        return (self.weight - batch.bold.mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

clips = fmristream.StreamingDataset(url, window=7, split="train", seed=3)
model = Listener()
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
    enable_checkpointing=False, enable_model_summary=False, default_root_dir=out,
)
trainer.fit(model, ClipsDataModule(train=clips, batch_size=5))
with open(f"{out}/{trainer.global_rank}.json", "w") as file:
    json.dump(model.seen, file)
"""


@pytest.mark.full
def test_two_processes_share_the_loaders_own_batches(cohort_url, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), cohort_url, str(tmp_path)],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [position for position, _ in one] == [position for position, _ in other]
    assert [mine + theirs for (_, mine), (_, theirs) in zip(one, other, strict=True)] == expected_of(cohort_url)
