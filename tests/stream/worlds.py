"""Several ranks played in one process, and their batches put together again."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch

from fmristream.stream.batch import Batch
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader


def loaders(stack: ExitStack, clips: StreamingDataset, *, world: int, batch_size: int, threads: int = 1):
    """One loader per rank, closed with the stack."""
    return [
        stack.enter_context(StreamingLoader(clips, batch_size=batch_size, rank=rank, world_size=world, threads=threads))
        for rank in range(world)
    ]


def in_step(ranks: list[StreamingLoader]) -> Iterator[list[Batch]]:
    """What all ranks get, batch by batch, for the rest of the epoch; no rank may have more batches than another."""
    yield from (list(batches) for batches in zip(*ranks, strict=True))


def whole(batches: list[Batch]) -> dict:
    """The global batch that the ranks' shares make up."""
    assert len({(batch.position, batch.global_size) for batch in batches}) == 1
    return {
        "position": batches[0].position,
        "window": torch.cat([batch.window for batch in batches]).tolist(),
        "valid": torch.cat([batch.valid for batch in batches]).tolist(),
        "start": torch.cat([batch.start for batch in batches]).tolist(),
        "subject": [label for batch in batches for label in batch.subject],
        "run": [name for batch in batches for name in batch.run],
        "fill": torch.cat([batch.fill for batch in batches]),
        "packed": torch.cat([batch.packed for batch in batches]).clone(),
        "sex": torch.cat([batch.targets["sex"] for batch in batches]),
    }


def same(one: dict, other: dict) -> bool:
    """Equal in everything, tensors to the last bit."""
    if one.keys() != other.keys():
        return False
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def epochs(clips: StreamingDataset, count: int, *, world: int = 1, batch_size: int, threads: int = 1) -> list[dict]:
    """All global batches of the first epochs."""
    with ExitStack() as stack:
        ranks = loaders(stack, clips, world=world, batch_size=batch_size, threads=threads)
        return [whole(batches) for _ in range(count) for batches in in_step(ranks)]
