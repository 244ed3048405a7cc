"""The loader's batches as an iterable torch dataset, for what takes nothing else: DataLoader, torchdata, Accelerate, Trainer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from fmristream.errors import UsageError
from fmristream.stream.batch import Batch
from fmristream.stream.loader import StreamingLoader

_NO_WORKERS = (
    "a StreamingLoader reads with threads of its own process, and worker processes would each start the stream anew; use "
    "num_workers=0 here, or give the DataLoader the StreamingDataset itself, which is map-style"
)


class BatchStream(IterableDataset[Any]):
    """Whole batches in the loader's order; give it to a DataLoader with `batch_size=None, num_workers=0`.

    An iteration is an epoch, as the loader's is, and the next goes on with the next epoch: there is no `set_epoch`, which
    frameworks call with counts of their own, and after a resume with 0.

    Args:
        loader: where batches come from. Nothing else may iterate over it.
        convert: what becomes of each batch, such as a dict for a model that wants keywords; itself where not given.
    """

    def __init__(self, loader: StreamingLoader, *, convert: Callable[[Batch], Any] | None = None) -> None:
        super().__init__()
        self.loader = loader
        self._convert = convert

    def __reduce__(self) -> Any:
        raise UsageError(_NO_WORKERS)

    def __len__(self) -> int:
        """Batches of this epoch on every rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise UsageError(_NO_WORKERS)
        for batch in self.loader:
            yield batch if self._convert is None else self._convert(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last batch that was taken; what takes one ahead wants `state_after`."""
        return self.loader.state_dict()

    def state_after(self, batch: Batch) -> dict[str, Any]:
        """Where the stream is after this batch, whatever was taken since."""
        return {**self.loader.state_dict(), "consumed": batch.position + batch.global_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            ResumeError: the state belongs to another stream.
        """
        self.loader.load_state_dict(state)
