"""Who does the work: this process, or a dask cluster on this machine. The only importer of dask."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from fmristream.errors import MissingExtraError

if TYPE_CHECKING:
    from distributed import Client

Task = TypeVar("Task")
Result = TypeVar("Result")

FrameCallback = Callable[[int], None]


class TaskFunction(Protocol[Task, Result]):  # type: ignore[misc]
    """One task in, one result out; counts frames where somebody listens."""

    def __call__(self, task: Task, on_frame: FrameCallback | None = None) -> Result: ...


class Engine:
    """Runs independent tasks; a context manager because a cluster has to be closed.

    Args:
        workers: 1 does everything in this process, one task after the other; more starts a local dask cluster of that
            many single-threaded processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._client: Client | None = None

    def __enter__(self) -> Self:
        if self._workers > 1:
            self._client = _local_cluster(self._workers)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._client is not None:
            self._client.close()
            self._client.cluster.close()

    def run(
        self, function: Any, tasks: Sequence[Task], *, on_frame: FrameCallback | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (position, result) of every task as it finishes; the first error stops everything."""
        if self._client is None:
            for position, task in enumerate(tasks):
                yield position, function(task, on_frame)
            return
        from distributed import as_completed

        futures = {
            self._client.submit(function, task, pure=False, retries=0): position for position, task in enumerate(tasks)
        }
        for future in as_completed(list(futures)):
            yield futures[future], future.result()
            future.release()


def _local_cluster(workers: int) -> "Client":
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise MissingExtraError(f"--workers {workers} needs dask: pip install 'fmristream[dask]'") from error
    # One thread a worker: kernels and blosc use one each, and nibabel's parsing holds the GIL.
    cluster = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None)
    return Client(cluster)
