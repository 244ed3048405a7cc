"""Who does the work: this process, a dask cluster on this machine, one that runs already, or Slurm jobs.

The only importer of dask and dask-jobqueue. Whoever does it, results are the same values; only their order differs.
"""

import getpass
import logging
import pydoc
import secrets
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from fmristream._version import __version__
from fmristream.errors import EngineError, MissingExtraError
from fmristream.ingest.cluster_options import SlurmJobs, read_slurm_jobs
from fmristream.ingest.options import ConvertOptions

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")

FrameCallback = Callable[[int], None]
NoteCallback = Callable[[str], None]

# How often a run is given to another worker after the one that had it died.
RETRIES = 2
# Runs handed out ahead of the workers: none waits for the driver, and the driver holds a handful, not 100,000.
_AHEAD = 2
_TICK_S = 1.0
_TEND_EVERY_S = 2.0
_RESUBMIT_EVERY_S = 30.0
_CONNECT_S = 20.0

_CONFIG: Mapping[str, Any] = {
    "distributed.scheduler.allowed-failures": RETRIES,
    # A worker holds the run that it works at and no other, so that no other is blamed for its death.
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.worker.profile.enabled": False,
}


class Task(Protocol):
    """Anything that can be sent to another process, and has a name for messages to whoever started the conversion."""

    @property
    def name(self) -> str: ...


class Engine:
    """Runs independent tasks; a context manager because a cluster has to be closed.

    Args:
        workers: 1 does everything in this process, one task after the other; more starts a local dask cluster of that
            many single-threaded processes. With `jobs`, the number of Slurm jobs.
        scheduler: address of a dask scheduler to use instead; its cluster is left running.
        jobs: submit Slurm jobs instead.
        on_note: told what people should know: where the dashboard is, that workers are waited for.
        patience_s: how long to go on without a single worker.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        scheduler: str | None = None,
        jobs: SlurmJobs | None = None,
        on_note: NoteCallback | None = None,
        patience_s: float = 600.0,
    ) -> None:
        self._workers = workers
        self._scheduler = scheduler
        self._jobs = jobs
        self._tell = on_note or (lambda note: None)
        self._patience_s = patience_s
        self._crew: _Crew | None = None

    @property
    def counts_frames(self) -> bool:
        """Whether `on_frame` is called as frames are done; other processes tell of whole runs only."""
        return self._crew is None

    def __enter__(self) -> Self:
        opened = None
        if self._scheduler is not None:
            opened = _connect(self._scheduler)
        elif self._jobs is not None:
            opened = _submit_jobs(self._jobs, self._workers)
        elif self._workers > 1:
            opened = _start_processes(self._workers)
        if opened is not None:
            self._crew = _Crew(opened, tell=self._tell, patience_s=self._patience_s)
            self._tell(f"{opened.name}; dashboard: {opened.client.dashboard_link}")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._crew is not None:
            self._crew.close()

    def run(
        self, function: Callable[..., Any], tasks: Sequence[Task], *, on_frame: FrameCallback | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (position, result) of every task as it finishes; the first error stops everything.

        Args:
            function: of the task and of `on_frame`; importable by its name.
            tasks: what to do.
            on_frame: counts frames, where this process does the work.

        Raises:
            EngineError: workers died over one task again and again, or the cluster is gone.
        """
        if self._crew is None:
            for position, task in enumerate(tasks):
                yield position, function(task, on_frame)
        else:
            yield from self._crew.run(function, tasks)


def open_engine(options: ConvertOptions, on_note: NoteCallback | None = None) -> Engine:
    """The engine that a conversion asks for."""
    jobs = None
    if options.cluster == "slurm":
        jobs = SlurmJobs() if options.cluster_options is None else read_slurm_jobs(options.cluster_options)
    return Engine(options.workers, scheduler=options.scheduler, jobs=jobs, on_note=on_note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A client, and the cluster behind it where it is ours to close."""

    name: str
    client: "Client"
    cluster: Any = None
    wanted: int = 0  # workers that we started or asked for
    has_jobs: bool = False


class _Crew:
    """A dask cluster at work: hands out a few tasks more than there are workers, and watches that there are workers."""

    def __init__(self, opened: _Opened, *, tell: NoteCallback, patience_s: float) -> None:
        self._opened = opened
        self._client = opened.client
        self._tell = tell
        self._patience_s = patience_s
        self._last_seen = self._last_resubmit = self._last_tended = time.monotonic()
        self._is_waiting = False
        self._is_checked = False

    def run(self, function: Callable[..., Any], tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        finished: SimpleQueue[Future] = SimpleQueue()
        in_work: dict[str, tuple[int, Future]] = {}
        position = 0
        if tasks:
            self._check_workers()
        try:
            while position < len(tasks) or in_work:
                while position < len(tasks) and len(in_work) < self._window():
                    future = self._submit(function, tasks[position])
                    in_work[future.key] = position, future
                    future.add_done_callback(finished.put)
                    position += 1
                future = self._next(finished)
                done, _ = in_work.pop(future.key)
                yield done, self._result(future, tasks[done])
        finally:
            self._forget([future for _, future in in_work.values()])

    def close(self) -> None:
        """Let go of a scheduler that was there before; end what was started here."""
        with _quiet():
            self._client.close(timeout=2)
            if self._opened.cluster is not None:
                self._opened.cluster.close(timeout=10)

    def _check_workers(self) -> None:
        """Wait for a first worker, and see that those that are there can do the work.

        Asked with nothing but the standard library: a worker that cannot unpickle a task closes without a word.
        """
        if self._is_checked:
            return
        while not self._workers_now():
            with suppress(TimeoutError):
                self._client.wait_for_workers(1, timeout=_TICK_S)
            self._tend()
        try:
            found = self._client.run(pydoc.locate, "fmristream._version.__version__", on_error="return")
        except OSError as error:
            raise self._gone() from error
        for version in found.values():
            _require_same(
                {"fmristream": __version__},
                {"fmristream": version if isinstance(version, str) else "missing"},
                self._opened.name,
            )
        self._is_checked = True

    def _submit(self, function: Callable[..., Any], task: Task) -> "Future":
        # The key is what dashboards and logs show: no subject, no path.
        key = f"{function.__name__}-{secrets.token_hex(8)}"
        try:
            return self._client.submit(_perform, _versions(), function, _Sealed(task), key=key, pure=False, retries=0)
        except (OSError, RuntimeError) as error:  # the client was closed, because the scheduler has gone
            raise self._gone() from error

    def _window(self) -> int:
        return _AHEAD * max(self._workers_now(), self._opened.wanted, 1)

    def _workers_now(self) -> int:
        # Told by the scheduler every other second and kept: asking costs nothing.
        return int(self._client.scheduler_info(n_workers=0).get("n_workers", 0))

    def _next(self, finished: "SimpleQueue[Future]") -> "Future":
        while True:
            if time.monotonic() - self._last_tended > _TEND_EVERY_S:
                self._tend()
            with suppress(Empty):
                return finished.get(timeout=_TICK_S)

    def _tend(self) -> None:
        """See that somebody is at work."""
        self._last_tended = time.monotonic()
        if self._client.status not in ("running", "connecting"):
            raise self._gone()
        now, workers = time.monotonic(), self._workers_now()
        if self._opened.has_jobs and workers < self._opened.wanted and now - self._last_resubmit > _RESUBMIT_EVERY_S:
            self._last_resubmit = now
            if workers == 0 and self._last_seen < now - _RESUBMIT_EVERY_S:
                self._require_jobs()
            self._opened.cluster.scale(jobs=self._opened.wanted)  # submits anew what has come and gone
        if workers or (self._opened.has_jobs and not self._is_waiting):
            self._last_seen = now
        if not workers and not self._is_waiting:
            self._tell(f"{self._opened.name}: waiting for a worker")
        self._is_waiting = not workers
        # Jobs may wait in a queue for days; that they are in it is looked after above.
        if not self._opened.has_jobs and now - self._last_seen > self._patience_s:
            raise EngineError(
                f"{self._opened.name}: no worker was there for {self._patience_s:.0f} s; start workers and run the same "
                "command again, finished runs are kept"
            )

    def _require_jobs(self) -> None:
        ours = {str(job.job_id) for job in self._opened.cluster.workers.values() if job.job_id}
        queued = _queued_jobs()
        if not ours and time.monotonic() - self._last_seen < self._patience_s:
            return  # the next ones are being submitted
        if queued is not None and not ours & queued:
            raise EngineError(
                f"{self._opened.name}: not one of {len(ours)} jobs is waiting or running any more and none reached this "
                "process; their slurm-*.out files (log_directory) say why"
            )

    def _result(self, future: "Future", task: Task) -> Any:
        from concurrent.futures import CancelledError

        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        try:
            return future.result()
        except KilledWorker as error:
            raise EngineError(
                f"{task.name}: {RETRIES + 1} workers or more died while they had this run in work; killed for lack of "
                "memory, perhaps: give them more, or use fewer, and run the same command again, finished runs are kept"
            ) from error
        except (CancelledError, FutureCancelledError) as error:
            raise self._gone() from error

    def _gone(self) -> EngineError:
        return EngineError(
            f"{self._opened.name}: the connection to the scheduler was lost; run the same command again, finished runs "
            "are kept"
        )

    def _forget(self, futures: "list[Future]") -> None:
        if futures and self._client.status == "running":
            with suppress(OSError, TimeoutError):  # the scheduler may be the reason why we are here
                self._client.cancel(futures, force=True)


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A task as workers' logs and dashboards may show it."""

    task: Task

    def __repr__(self) -> str:
        return "a run"


def _perform(versions: Mapping[str, str], function: Callable[..., Any], sealed: _Sealed) -> Any:
    """On a worker: do a task, if the worker is what the driver is."""
    _require_same(versions, _versions(), "dask")
    return function(sealed.task, None)


def _versions() -> dict[str, str]:
    return {"fmristream": __version__, "Python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def _require_same(here: Mapping[str, str], there: Mapping[str, str], who: str) -> None:
    differing = [name for name, version in here.items() if there.get(name) != version]
    if differing:
        found = ", ".join(f"{name} {there.get(name, 'missing')} (here {here[name]})" for name in differing)
        raise EngineError(f"{who}: a worker or the scheduler has {found}; install the same versions on both sides")


def _start_processes(workers: int) -> _Opened:
    distributed = _import("distributed", f"--workers {workers}")
    # One thread a worker: kernels and blosc use one each, and nibabel's parsing holds the GIL. Encrypted, with keys that
    # nobody else has: whoever reaches a scheduler of dask can make its workers run anything, as the user who started it.
    with _quiet(), _configured():
        cluster = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            security=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
        client = distributed.Client(cluster, set_as_default=False)
    return _Opened(name=f"{workers} processes", client=client, cluster=cluster, wanted=workers)


def _connect(address: str) -> _Opened:
    distributed = _import("distributed", "--scheduler")
    try:
        with _quiet():
            client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"--scheduler {address}: cannot be reached: {error}; start one with `dask scheduler` and workers with "
            "`dask worker ADDRESS --nthreads 1`"
        ) from error
    try:
        _check_versions(client, address)
    except BaseException:
        client.close()
        raise
    return _Opened(name=f"scheduler {address}", client=client)


def _submit_jobs(jobs: SlurmJobs, count: int) -> _Opened:
    distributed = _import("distributed", "--cluster slurm")
    jobqueue = _import("dask_jobqueue", "--cluster slurm")
    optional = {
        "account": jobs.account,
        "interface": jobs.interface,
        "local_directory": jobs.local_directory,
        "log_directory": jobs.log_directory,
        "python": jobs.python,
        "queue": jobs.queue,
        "shared_temp_directory": jobs.shared_temp_directory,
    }
    with _quiet(), _configured():
        cluster = jobqueue.SLURMCluster(
            cores=1,  # of dask: one run at a time; of Slurm: job_cpu
            processes=1,
            job_cpu=jobs.cores,
            memory=jobs.memory,
            walltime=jobs.walltime,
            job_name="fmristream",
            job_extra_directives=list(jobs.job_extra_directives),
            job_script_prologue=list(jobs.job_script_prologue),
            worker_extra_args=["--lifetime", f"{jobs.lifetime_s}s"],
            security=True,
            silence_logs=logging.CRITICAL,
            **{name: value for name, value in optional.items() if value},
        )
        try:
            _require_accepted(cluster.job_script())
            cluster.scale(jobs=count)
            client = distributed.Client(cluster, set_as_default=False)
        except BaseException:
            cluster.close()
            raise
    return _Opened(name=f"{count} Slurm jobs", client=client, cluster=cluster, wanted=count, has_jobs=True)


def _import(package: str, feature: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{feature} needs {package.replace('_', '-')}: pip install 'fmristream[dask]'"
        ) from error


def _configured() -> Any:
    import dask

    return dask.config.set(dict(_CONFIG))


class _quiet(warnings.catch_warnings):
    """What dask warns about on the way is checked by us, or of no use to who converts."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def _check_versions(client: "Client", address: str) -> None:
    found = client.get_versions()
    for who in (found["scheduler"], *found["workers"].values()):
        _require_same(_dask_versions(found["client"]), _dask_versions(who), f"--scheduler {address}")


def _dask_versions(found: Any) -> dict[str, str]:
    packages = found["packages"]
    python = ".".join(str(packages["python"]).split(".")[:2])
    return {"Python": python, "dask": packages["dask"], "distributed": packages["distributed"]}


def _require_accepted(script: str) -> None:
    """Ask Slurm before a job is submitted: what dask-jobqueue is told then goes into a log, and nobody hears of it."""
    try:
        answer = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"--cluster slurm: Slurm does not answer: {error}; run this where sbatch works") from error
    if answer.returncode != 0:
        said = "; ".join(line.removeprefix("sbatch: ") for line in answer.stderr.splitlines())
        raise EngineError(f"--cluster slurm: Slurm refuses such a job: {said}; see --cluster-options")


def _queued_jobs() -> set[str] | None:
    """Numbers of this user's jobs that wait or run; None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%A"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())
    except (OSError, subprocess.SubprocessError):
        return None
