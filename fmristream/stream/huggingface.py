"""Hugging Face's Accelerate and Trainer over our batches, which are dealt already: nothing may deal or reorder them again."""

from typing import TYPE_CHECKING, Any

from fmristream.errors import MissingExtraError
from fmristream.stream.torch_dataset import BatchStream

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerate_loader(stream: BatchStream, accelerator: "Accelerator") -> Any:
    """A loader that `accelerator.prepare` takes as it is, and that `Trainer.get_train_dataloader` may return.

    Prepared by Accelerate itself, an iterable dataset is dealt anew, in the belief that every process iterates over the same
    samples. This is the class that Accelerate makes for one process, which
    deals nothing; it moves batches to the accelerator's device and tells gradient accumulation where an epoch ends. It
    takes one batch ahead: save `stream.state_after(batch)`, not `stream.state_dict()`.

    Args:
        stream: over a StreamingLoader with the accelerator's rank and number of processes.
        accelerator: whose device batches go to.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    try:
        from accelerate.data_loader import DataLoaderShard
    except ImportError as error:
        raise MissingExtraError("accelerate_loader needs the package accelerate: pip install accelerate") from error
    loader = DataLoaderShard(stream, device=accelerator.device, batch_size=None, num_workers=0)
    loader._is_accelerate_prepared = True
    return loader
