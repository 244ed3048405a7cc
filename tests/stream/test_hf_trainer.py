"""Hugging Face's Trainer over our stream, by the recipe of the documents; runs where transformers is installed."""

import pytest
import torch

import fmristream
from fmristream.stream.huggingface import accelerate_loader
from fmristream.stream.torch_dataset import BatchStream

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
pytestmark = pytest.mark.filterwarnings("ignore::Warning")


class Listener(torch.nn.Module):
    """Learns one number, and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, bold, labels, window):
        self.seen.append(window.tolist())
        return {"loss": ((self.weight - bold.mean()) ** 2 + 0 * labels.sum())}


def test_trainer_takes_our_batches_in_our_order(cohort_url, tmp_path):
    def keywords(batch):
        return {"bold": batch.bold, "labels": batch.targets["age"], "window": batch.window}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return accelerate_loader(stream, self.accelerator)

    clips = fmristream.StreamingDataset(cohort_url, window=7, split="train", seed=3, targets=("age",))
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        expected = [batch.window.tolist() for _ in range(2) for batch in loader]
    with fmristream.StreamingLoader(clips, batch_size=5) as loader:
        stream = BatchStream(loader, convert=keywords)
        model = Listener()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=stream).train()
    assert model.seen == expected
