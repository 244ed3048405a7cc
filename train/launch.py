"""Which process is this, of how many, on which device; and the few words that the processes exchange."""

import gc
import json
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fmristream.errors import FmriStreamError, UsageError

_ARRIVALS = "fmristream/arrivals"


class LaunchError(FmriStreamError):
    """The processes of a run did not find each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among those of the run. With one process every exchange is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks in rank order, on every rank; ranks may differ in how many they have (CPU tensors)."""
        if self.size == 1:
            return rows
        counts = self._gather_equal(torch.tensor([len(rows)]))
        longest = int(max(count.item() for count in counts))
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self._gather_equal(padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def stack(self, row: torch.Tensor) -> torch.Tensor:
        """One row of the same shape from every rank, as (rank, ...) on every rank (CPU tensors)."""
        return row[None] if self.size == 1 else torch.stack(self._gather_equal(row))

    def from_main(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.size == 1:
            return number
        shared = torch.tensor([number])
        dist.broadcast(shared, src=0)
        return int(shared.item())

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        if self.size > 1:
            self._gather_equal(torch.zeros(1))  # through gloo on any machine, and bounded by the group's timeout

    def _gather_equal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts


@contextmanager
def join_world(*, timeout_s: float) -> Iterator[World]:
    """Join the run that the environment describes (torchrun's RANK, WORLD_SIZE, ...), or be the only process.

    A rank that dies or hangs makes the others' next exchange raise within `timeout_s`.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    world = World(rank=rank, size=size, device=device)
    if size == 1:
        yield world
        return
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=_attempt_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout
    )
    try:
        yield world
        world.wait_for_all()  # only after success: a dead peer never comes
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the network, and the network holds the group
        if device.type == "cpu":  # NCCL might wait for a dead peer
            _leave_group()
        raise
    _leave_group()


@contextmanager
def main_first(world: World, *, timeout_s: float) -> Iterator[None]:
    """Rank 0 does what is in the block, for as long as `timeout_s`; then the others do it, and find what it left.

    Rank 0's death ends the others' wait at once.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world.size > 1 else None
    if group is not None and not world.is_main:
        dist.barrier(group)
    yield
    if group is not None:
        if world.is_main:
            dist.barrier(group)
        dist.destroy_process_group(group)


def local_device_count() -> int:
    """How many processes `python -m train` starts by itself."""
    return torch.cuda.device_count() or 1


def run_on_this_machine(arguments: Sequence[str], *, processes: int) -> int:
    """Start `train` with these arguments in several processes here, as torchrun does; the exit status of the run."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # nothing leaves this machine, whatever its name resolves to
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "train", *arguments)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # the process itself has said why
    except SignalException as stop:
        return 0 if stop.sigval == signal.SIGTERM else 128 + int(stop.sigval)
    return 0


@dataclass(kw_only=True)
class StopRequest:
    """Whether somebody asked this process, or another rank, to end."""

    is_asked: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM (a scheduler's preemption, torchrun's end) asks for a checkpoint and an orderly end.

    Who was asked, or knows from another rank, is ending: a SIGTERM that comes later still must not turn that into a failure.
    """
    stop = StopRequest()

    def ask(number: int, frame: Any) -> None:
        stop.is_asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stop.is_asked else before)


def _leave_group() -> None:
    """End the group's threads before the interpreter ends: one that drops a tensor after that aborts the process."""
    gc.collect()  # a DDP network is part of a cycle, and as long as it lives the threads do
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
            f"start at most that many processes"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _attempt_store(rank: int, size: int, timeout: timedelta) -> Store:
    """The key-value store of this attempt alone.

    torchrun hands every attempt the same server (same MASTER_PORT), where the addresses of the last attempt's dead
    processes still stand; gloo reads them and fails. TORCHELASTIC_RESTART_COUNT can't name the attempt: nodes count
    their own failures only. So rank 0 makes up a name and answers every process that asks for it, dead ones too, until
    all ranks have confirmed.
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = TCPStore(
        address,
        port,
        size,
        is_master=rank == 0 and not hosted,
        timeout=timeout,
        multi_tenant=True,
        wait_for_workers=False,
    )
    try:
        attempt = _name_attempt(server, size) if rank == 0 else _learn_attempt(server, rank)
    except dist.DistStoreError as error:
        raise LaunchError(
            f"rank {rank} of {size}: the other ranks did not come to {address}:{port} within {timeout.total_seconds():g} s; "
            f"see their output, or raise train.timeout_s"
        ) from error
    return PrefixStore(f"fmristream/{attempt}", server)


def _name_attempt(store: Store, size: int) -> str:
    attempt = uuid.uuid4().hex
    confirmed: set[int] = set()
    while len(confirmed) < size - 1:
        arrival = json.loads(store.queue_pop(_ARRIVALS))
        if arrival["attempt"] is None:
            store.set(f"fmristream/welcome/{arrival['process']}", attempt)
        elif arrival["attempt"] == attempt:
            confirmed.add(arrival["rank"])
    return attempt


def _learn_attempt(store: Store, rank: int) -> str:
    arrival = {"rank": rank, "process": uuid.uuid4().hex, "attempt": None}
    store.queue_push(_ARRIVALS, json.dumps(arrival))
    attempt = store.get(f"fmristream/welcome/{arrival['process']}").decode()
    store.queue_push(_ARRIVALS, json.dumps(arrival | {"attempt": attempt}))
    return attempt
