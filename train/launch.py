"""Which process is this, of how many, on which device; and the few words that the processes exchange."""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fmristream.errors import FmriStreamError, UsageError

_ARRIVALS = "fmristream/arrivals"
_ASSEMBLE_S = 300.0  # ranks of many machines import torch from one file system, some of them minutes later than others
# Gloo names its source file in what it raises, except where a connection was closed after a timeout elsewhere.
_GLOO_WORDS = ("/gloo/", "timeout caused pair closure")
# How long a rank that lost others looks who else is still there: a closed connection is seen by all within a moment, but those
# who wait for a hanging rank began to wait at different times.
_FAREWELL_S, _FAREWELL_AFTER_TIMEOUT_S = 1.0, 5.0
# After the ranks of one machine were told to end, the other machines' agents see within a second that it wants to meet anew.
_OWN_SIGNAL_S = 5.0
# What ends a run in order. Not what a terminal's end sends: SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class LaunchError(FmriStreamError):
    """The processes of a run did not find each other."""


class AskedToStop(Exception):
    """Work that begins anew another time was left, on all ranks, because one of them was asked to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among those of the run. With one process every exchange is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: "StopRequest" = field(default_factory=lambda: StopRequest())

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

    def heed_stop(self) -> None:
        """Between two pieces of work that all ranks do together: leave it on all ranks, if one of them is to end.

        Raises:
            AskedToStop: it is.
        """
        if self.stack(torch.tensor([self.stop.is_asked])).any():
            self.stop.is_asked = True  # wherever the signal came
            raise AskedToStop

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        if self.size > 1:
            self._gather_equal(torch.zeros(1))  # through gloo on any machine, and bounded by the group's timeout

    def _gather_equal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts


@contextmanager
def join_world(*, timeout_s: float, assemble_s: float = _ASSEMBLE_S) -> Iterator[World]:
    """Join the run that the environment describes (torchrun's RANK, WORLD_SIZE, ...), or be the only process.

    A rank that dies makes the others' next exchange raise at once, one that hangs within `timeout_s`; at the start they wait
    for each other for `assemble_s`.

    Raises:
        LaunchError: other ranks did not come, or were lost; the message says which where that can be known.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    world = World(rank=rank, size=size, device=device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    if size > 1:
        with _joined(world, timeout_s=timeout_s, assemble_s=max(timeout_s, assemble_s)):
            yield world
    else:
        yield world
    _wait_for_own_signal(world)


@contextmanager
def _joined(world: World, *, timeout_s: float, assemble_s: float) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if interface := _interface_of(source_address(os.environ["MASTER_ADDR"])):
        # gloo would take the interface that this machine's name leads to, which others may not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store = _attempt_store(world.rank, world.size, timedelta(seconds=assemble_s))
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout_s)
        )
        yield
        world.wait_for_all()  # only after success: a dead peer never comes
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the network, and the network holds the group
        if dist.is_initialized() and world.device.type == "cpu":  # NCCL might wait for a dead peer
            _leave_group()
        if _is_loss(error):
            raise LaunchError(_farewell(world, store, error)) from error
        raise
    _leave_group()


def _is_loss(error: BaseException) -> bool:
    """Whether an exchange failed because of other ranks; gloo has no class of its own for that."""
    is_gloos = isinstance(error, RuntimeError) and any(words in str(error) for words in _GLOO_WORDS)
    return isinstance(error, dist.DistError) or is_gloos


def _farewell(world: World, store: Store, error: BaseException) -> str:
    """Say who is gone: the ranks that, having lost others as this one has, do not sign off."""
    reason = str(error).strip().partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
    others = [rank for rank in range(world.size) if rank != world.rank]
    is_timeout = any(words in str(error).lower() for words in ("timed out", "timeout"))
    patience = _FAREWELL_AFTER_TIMEOUT_S if is_timeout else _FAREWELL_S
    try:
        store.set(f"farewell/{world.rank}", "")
        with suppress(dist.DistStoreError):
            store.wait([f"farewell/{rank}" for rank in others], timedelta(seconds=patience))
        missing = [rank for rank in others if not store.check([f"farewell/{rank}"])]
    except (dist.DistError, RuntimeError):
        missing = [0]  # it kept the store
    gone = f"rank {', '.join(map(str, missing))} died or hangs" if missing else "the connection to another rank broke"
    return f"{gone} ({reason}); the run goes on from the last checkpoint when it is started again"


def _end_with_parent() -> None:
    """An agent that is killed takes its ranks along: left alone, they would write where the next attempt does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG


def source_address(host: str) -> str | None:
    """This machine's IPv4 address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _interface_of(address: str | None) -> str | None:
    """The network interface that has an IPv4 address, on Linux."""
    if address is None or sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


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


@dataclass(kw_only=True)
class StopRequest:
    """Whether somebody asked this process, or another rank, to end."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_signalled = False  # this process itself


@contextmanager
def stop_on_sigterm(stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """SIGTERM (preemption, torchrun's end), SIGUSR1 (Slurm's warning) and Ctrl-C ask for a checkpoint and an orderly end.

    A second Ctrl-C ends a run of one process at once; of several, their agent decides. Who was asked, or knows from another
    rank, is ending: a signal that comes later still must not turn that into a failure.
    """
    request, is_interrupted = stop or StopRequest(), False

    def ask(number: int, frame: Any) -> None:
        nonlocal is_interrupted
        is_ours = number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", "1")) == 1
        if is_ours and request.is_signalled:
            raise KeyboardInterrupt
        request.is_asked = request.is_signalled = True
        if is_ours:
            is_interrupted = True
            with suppress(OSError):  # the reader of a pipe was interrupted, too; and print may be under way
                os.write(2, b"\ntrain: a checkpoint, then the end; Ctrl-C again ends at once\n")

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        if not request.is_asked or is_interrupted:  # a notebook lives on
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait_for_own_signal(world: World) -> None:
    """Ranks that ended because those of another machine were asked to, wait until they are asked as well.

    A machine that comes or leaves has all agents end their ranks and meet anew. An agent whose ranks ended before it saw that
    would take the run for finished, and close it for all.

    Raises:
        LaunchError: nobody asked this machine's ranks, so its agent is to start them again.
    """
    stop, several = world.stop, int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if several and stop.is_asked and not stop.is_signalled and not _signal_within(stop, _OWN_SIGNAL_S):
        raise LaunchError(
            "ranks of another machine were asked to end, those of this one were not: they go on without it"
        )


def _signal_within(stop: StopRequest, seconds: float) -> bool:
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        if not stop.is_signalled:
            select.select([read], [], [], seconds)
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
    return stop.is_signalled


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
            f"see their output"
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
