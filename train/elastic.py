"""Start the ranks of a run here, alone or with other machines, and start them again when one is lost.

This is torchrun's agent with the settings that were found to survive losses (docs/multinode.md), so that nobody has to
know them. Under torchrun itself nothing of this module runs.
"""

import errno
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from train.fence import SUPERSEDED
from train.launch import LaunchError, source_address
from train.launching import Nodes

_WRONG_USAGE = 2  # the exit status of a rank whose recipe or data are refused: another attempt would be refused as well

# A dead machine is known after 10 s without its sign of life, and latecomers are waited for 5 s: torch's 15 and 30 s would
# not let a run go on within 30 s. Much less takes machines that are only busy for dead: with 5 and 3 s, at a load of 20 on two
# cores, two of four went on while the others waited in vain. Machines' clocks must agree within these seconds.
RENDEZVOUS = {"keep_alive_interval": 1, "keep_alive_max_attempt": 10, "last_call_timeout": 5, "join_timeout": 600}
_CONNECT_S = 600.0  # machines of a job do not start at once
MONITOR_S = 0.5
# What lasted as long was no start in vain: of 64 nodes some fail every week, and the run is to go on for all that.
_LASTING_S = 600.0
# How long ranks may write their checkpoint after a signal; the Slurm template asks for it 120 s before the end.
GRACE_S = 100
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def launch(arguments: Sequence[str], *, processes: int, nodes: Nodes, restarts: int) -> int:
    """Start `train` with these arguments in several processes here, with the other machines' if there are any.

    Returns:
        The exit status: 0 also where a signal ended the run (the ranks then write a checkpoint first).

    Raises:
        LaunchError: the machines did not meet, or the one where they meet was lost.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # By default every attempt is given the first attempt's key-value server, although its machine may be the lost one.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in SIGNALS)
    try:
        with meeting_point(nodes) as (host, port, own):
            return _run_agent(arguments, processes=processes, nodes=nodes, restarts=restarts, place=(host, port, own))
    except SignalException as stop:
        return 0 if stop.sigval in (signal.SIGTERM, signal.SIGUSR1) else 128 + int(stop.sigval)
    except RendezvousClosedError as error:
        raise LaunchError("the run was ended by another machine; its output says why") from error
    except RendezvousTimeoutError as error:
        raise LaunchError(
            f"{nodes.minimum} machines did not come to {nodes.host}:{nodes.port} within "
            f"{RENDEZVOUS['join_timeout']} s; start the same command, with the same options, on each of them"
        ) from error
    except RendezvousConnectionError as error:
        raise LaunchError(
            f"{nodes.host}:{nodes.port}, where the machines meet, was lost, which ends the run; start the same command "
            "on all machines again: it goes on from the last checkpoint"
        ) from error


@contextmanager
def meeting_point(nodes: Nodes) -> Iterator[tuple[str, int, str]]:
    """(host, port, this machine's address towards it); the machine that has the host's address keeps the server.

    torch compares names and addresses of this machine with the host's, which fails in network namespaces and for
    aliases. Who can listen at the host's address is the host; of several processes there, the first.
    """
    try:
        found = socket.getaddrinfo(nodes.host, nodes.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise LaunchError(f"--rendezvous: {nodes.host} is not known here: {error.strerror}") from error
    # IPv4 first: gloo's interfaces and those of most clusters
    family, _, _, _, address = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)[0]
    named_itself = (
        nodes.maximum > 1 and str(address[0]).startswith("127.") and nodes.host not in ("localhost", address[0])
    )
    server, port = _listen(family, "" if named_itself else str(address[0]), nodes.port)
    own = source_address("192.0.2.1" if named_itself else str(address[0])) or str(address[0])
    host = str(address[0])
    kept = None
    if server is not None:
        kept = TCPStore(
            host, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=server.detach()
        )
    try:
        yield host, port, own
    finally:
        del kept


def _listen(family: int, address: str, port: int) -> tuple[socket.socket | None, int]:
    """A socket that listens there, where the address is this machine's and nobody does yet."""
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(4096)
    except OSError as error:
        server.close()
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            raise LaunchError(f"--rendezvous: cannot listen at port {port} here: {error.strerror}") from error
        return None, port
    return server, server.getsockname()[1]


def _run_agent(
    arguments: Sequence[str], *, processes: int, nodes: Nodes, restarts: int, place: tuple[str, int, str]
) -> int:
    host, port, own = place
    _wait_for_host(host, port, nodes)
    handler = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            run_id=_run_id(arguments),
            min_nodes=nodes.minimum,
            max_nodes=nodes.maximum,
            local_addr=own,
            is_host=False,  # if it is, the server runs already
            **RENDEZVOUS,
        )
    )
    spec = WorkerSpec(
        role="train",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-u", "-m", "train", *arguments),
        rdzv_handler=handler,
        max_restarts=restarts,
        monitor_interval=MONITOR_S,
        local_addr=own,
    )
    agent = Agent(spec, logs_specs=DefaultLogsSpecs(), shutdown_timeout=GRACE_S)
    try:
        result = agent.run()
    except SignalException:
        raise  # the others may go on: the rendezvous stays open
    except BaseException:
        handler.shutdown()
        raise
    handler.shutdown()
    if result is None:
        raise RendezvousClosedError
    if not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    return max(1, int(first.exitcode))


def _wait_for_host(host: str, port: int, nodes: Nodes) -> None:
    try:
        TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_CONNECT_S))
    except RuntimeError as error:
        raise LaunchError(
            f"{nodes.host}:{nodes.port} did not answer within {_CONNECT_S:g} s: nobody runs this command on that machine, "
            "or the port is closed to this one"
        ) from error


def _run_id(arguments: Sequence[str]) -> str:
    """The same on machines that run the same command in the same job, so that two runs at one port never mix."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return hashlib.sha256("\0".join([job, *arguments]).encode()).hexdigest()[:16]


class Agent(LocalElasticAgent):
    """torchrun's agent that says which rank was lost, and starts nobody again whose command was wrong."""

    _began = 0.0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._began = time.monotonic()
        processes: dict[int, Any] = super()._start_workers(worker_group)
        return processes

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            if time.monotonic() - self._began > _LASTING_S:
                self._remaining_restarts = worker_group.spec.max_restarts
            statuses = {failure.exitcode for failure in result.failures.values()}
            if SUPERSEDED in statuses and self._is_forgotten(worker_group):
                return self._join_anew()
            if statuses & {_WRONG_USAGE, SUPERSEDED}:
                self._remaining_restarts = 0
            self._tell(result)
        elif result.state == WorkerState.HEALTHY and self._is_forgotten(worker_group):
            return self._join_anew()
        return result

    def _join_anew(self) -> RunResult:
        print("train: the others took this machine for dead; its ranks join them anew", file=sys.stderr, flush=True)
        self._remaining_restarts += 1  # which this is not to cost
        return RunResult(state=WorkerState.UNHEALTHY)

    def _is_forgotten(self, worker_group: WorkerGroup) -> bool:
        """Whether the others meet without this machine, whose sign of life came late: two worlds must not train on."""
        handler: Any = worker_group.spec.rdzv_handler  # torch has no public word for it
        return handler._this_node not in handler._state_holder.state.participants

    def _tell(self, result: RunResult) -> None:
        left, whole = self._remaining_restarts, self._worker_group.spec.max_restarts
        again = f"all start again from the last checkpoint (restart {whole - left + 1} of {whole})"
        then = again if left else "the run ends"
        # Those that this agent ended itself, because of the first, are no news.
        lost = {rank: failure for rank, failure in result.failures.items() if failure.exitcode != -signal.SIGTERM}
        for rank, failure in sorted((lost or result.failures).items()):
            how = _how_it_ended(failure)
            print(f"train: rank {rank} on {socket.gethostname()} {how}; {then}", file=sys.stderr, flush=True)


def _how_it_ended(failure: Any) -> str:
    if failure.exitcode >= 0:
        return f"ended with status {failure.exitcode}"
    return f"was ended by {signal.Signals(-failure.exitcode).name}"
