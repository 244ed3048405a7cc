"""Agents of several machines, for tests: torchrun's and our own, seen through the run's log, lost and joined."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from train.elastic import MONITOR_S, RENDEZVOUS

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def torchrun(
    *, nodes: str, endpoint: str, is_host: bool, restarts: int = 3, nproc: int = 1, own: str = "127.0.0.1"
) -> list[str]:
    """The command that docs/multinode.md gives to those who start torchrun themselves."""
    settings = {"is_host": str(is_host).lower(), **RENDEZVOUS}
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", nodes, "--nproc-per-node", str(nproc), "--max-restarts", str(restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", endpoint, "--local-addr", own),
        *("--rdzv-conf", ",".join(f"{name}={value}" for name, value in settings.items())),
        *("--monitor-interval", str(MONITOR_S), "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        *("-m", "train"),
    ]


class Run:
    """One run by several agents on this machine; what a failed test leaves is killed at the end."""

    def __init__(self, recipe: Path, out: Path, *, nodes: str, kind: str, nproc: int = 1, restarts: int = 3) -> None:
        self.out, self.nodes, self.kind, self.nproc, self.restarts = out, nodes, kind, nproc, restarts
        self.port = free_port()
        self.arguments = [str(recipe), "--out", str(out)]
        self.agents: list[subprocess.Popen[bytes]] = []  # those that live, the first one where they meet
        self.started = 0

    def start(self, count: int) -> list["subprocess.Popen[bytes]"]:
        """Start more agents."""
        found = [self._start_one() for _ in range(count)]
        self.agents += found
        return found

    def _start_one(self) -> "subprocess.Popen[bytes]":
        endpoint = f"127.0.0.1:{self.port}"
        if self.kind == "torchrun":
            options = {"nproc": self.nproc, "restarts": self.restarts}
            command = torchrun(nodes=self.nodes, endpoint=endpoint, is_host=self.started == 0, **options)
            command += self.arguments
        else:
            command = [sys.executable, "-m", "train", *self.arguments, "--nproc", str(self.nproc)]
            command += ["--nodes", self.nodes, "--rendezvous", endpoint, "--restarts", str(self.restarts)]
        said = self.out.parent / f"{self.out.name}-agent-{self.port}-{self.started}.txt"
        self.started += 1
        environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
        with open(said, "wb") as file:
            return subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, stdout=file, stderr=file)

    def said(self) -> str:
        """Everything that all agents and ranks said."""
        return "\n".join(path.read_text() for path in sorted(self.out.parent.glob(f"{self.out.name}-agent-*.txt")))

    def events(self) -> list[dict[str, Any]]:
        """What the log holds by now; a line that is being written is left out."""
        path = self.out / "log.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def attempts(self) -> int:
        """How often ranks have begun."""
        return sum(entry["event"] == "start" for entry in self.events())

    def steps_of_attempt(self, number: int) -> int:
        """Steps that the number-th attempt has taken, of 0 where another has begun since."""
        events = self.events()
        starts = [place for place, entry in enumerate(events) if entry["event"] == "start"]
        return 0 if len(starts) != number else sum(entry["event"] == "step" for entry in events[starts[-1] :])

    def wait_for(self, what: Callable[[], bool], *, timeout_s: float = 150) -> None:
        """Until something is so; an agent that ends meanwhile, or the time, fails the test with all that was said."""
        deadline = time.monotonic() + timeout_s
        while not what():
            ended = [agent.returncode for agent in self.agents if agent.poll() is not None]
            assert not ended, f"agents ended with {ended}\n{self.said()[-6000:]}"
            assert time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.05)

    def wait_for_world(self, size: int, *, steps: int = 1) -> int:
        """Until as many ranks have taken steps together; which attempt that is."""

        def is_there() -> bool:
            starts = [entry for entry in self.events() if entry["event"] == "start"]
            return bool(starts) and starts[-1]["world_size"] == size and self.steps_of_attempt(len(starts)) >= steps

        self.wait_for(is_there)
        return self.attempts()

    def ranks(self, agents: Sequence["subprocess.Popen[bytes]"]) -> list[psutil.Process]:
        return [child for agent in agents for child in psutil.Process(agent.pid).children()]

    def lose(self, count: int, *, choose: Callable[[list, int], list]) -> None:
        """Kill machines, agent and ranks at once; never the one where all meet."""
        lost = choose(self.agents[1:], count)
        victims = [*self.ranks(lost), *(psutil.Process(agent.pid) for agent in lost)]
        for process in victims:
            process.kill()
        for agent in lost:
            agent.wait()
            self.agents.remove(agent)

    def join(self, count: int) -> None:
        """Start machines; the ranks there are stand still while the new agents import torch, or they might be done."""
        ranks = self.ranks(self.agents)
        for rank in ranks:
            rank.suspend()
        try:
            new = self.start(count)
            self.wait_for(lambda: all(self._has_met(agent) for agent in new))
        finally:
            for rank in ranks:
                rank.resume()

    def _has_met(self, agent: "subprocess.Popen[bytes]") -> bool:
        return any(link.raddr and link.raddr.port == self.port for link in psutil.Process(agent.pid).net_connections())

    def begin(self, count: int) -> None:
        """The first machine, where all meet, and then the others, until all train."""
        self.start(1)
        self.wait_for_world(self.nproc)
        if count > 1:
            self.join(count - 1)
            self.wait_for_world(count * self.nproc)

    def finish(self, timeout_s: float = 200) -> list[int]:
        """Wait for the end; the agents' exit statuses."""
        return [agent.wait(timeout=timeout_s) for agent in self.agents]

    def kill(self) -> None:
        """Leave nobody running."""
        for agent in self.agents:
            if agent.poll() is None:
                for process in [*self.ranks([agent]), psutil.Process(agent.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
                agent.wait()
