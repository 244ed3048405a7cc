"""Rounds in which every case has its turn, each in a process of its own."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tools.shaping_server import Counts, counts_of
from tools.stream_peers.cases import Case
from tools.stream_peers.data import Facts
from tools.stream_peers.environments import Environment

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FEWEST = 2  # windows of a round


@dataclass(kw_only=True)
class Measured:
    """What a case took."""

    case: Case
    windows_per_s: list[float] = field(default_factory=list)  # one each round
    cpu_ms: list[float] = field(default_factory=list)  # of a window, all threads
    disk_mb: list[float] = field(default_factory=list)  # of a round: what was not in the page cache
    first_s: float = 0.0  # from nothing open to the first window, imports included
    requests: float | None = None  # a window, of remote cases
    megabytes: float | None = None  # a window, of remote cases
    missing: str = ""  # why it could not be measured


@dataclass(kw_only=True)
class Worker:
    """A running case."""

    measured: Measured
    process: "subprocess.Popen[str]"
    log: IO[str]
    windows: int = 0  # of a round

    def ask(self, question: dict[str, Any] | None) -> dict[str, Any] | None:
        """Its answer; None where it has died, and why is noted. It stands still before and after, all its threads do."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            if question is not None and self.process.stdin is not None:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # some print as they please
                answer: dict[str, Any] = json.loads(line)
                self.process.send_signal(signal.SIGSTOP)
                return answer
        self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        self.measured.missing = f"failed: {lines[-1] if lines else self.process.returncode}"
        return None


def measure(
    cases: Sequence[Case],
    facts: Facts,
    environments: dict[str, Environment],
    *,
    rounds: int,
    round_s: float,
    most_windows: int,
) -> list[Measured]:
    """Every case, round after round."""
    found = [Measured(case=case, missing=environments[case.environment].missing) for case in cases]
    warm({case.layout for case in cases if case.layout}, facts)
    with contextlib.ExitStack() as stack:
        workers = []
        for measured in found:
            if not measured.missing:
                python = environments[measured.case.environment].python
                workers.append(stack.enter_context(worker(measured, facts, python)))
                calibrate(workers[-1], facts, round_s=round_s, most_windows=most_windows)
        for number in range(1, rounds + 1):
            for one in workers:
                if one.measured.missing:
                    continue
                answer = one.ask({"round": number, "windows": one.windows})
                if answer is not None:
                    one.measured.windows_per_s.append(answer["windows"] / answer["seconds"])
                    one.measured.disk_mb.append(answer["disk_mb"])
                    one.measured.cpu_ms.append(1000 * answer["cpu_s"] / answer["windows"])
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def warm(layouts: set[str], facts: Facts) -> None:
    """Bring the files of the layouts into the page cache."""
    for layout in sorted(layouts):
        for path in sorted((facts.path / layout).rglob("*")):
            if path.is_file():
                with open(path, "rb", buffering=0) as file:
                    while file.read(2**22):
                        pass


def calibrate(one: Worker, facts: Facts, *, round_s: float, most_windows: int) -> None:
    """Open it, let it warm up, and see how many windows fill a round; for remote ones, what each of them costs."""
    opened = one.ask(None)
    if opened is None:
        return
    one.measured.first_s = opened["first_s"]
    before = counts_of(facts.url, reset=True) if facts.url else Counts()
    answer = one.ask({"round": 0, "windows": _FEWEST})
    if answer is None:
        return
    rate = answer["windows"] / answer["seconds"]
    one.windows = int(min(max(rate * round_s / 2, _FEWEST), most_windows))
    if facts.url:
        before = counts_of(facts.url, reset=True)
    answer = one.ask({"round": 0, "windows": one.windows})  # of more windows a better guess
    if answer is None:
        return
    if facts.url:
        after = counts_of(facts.url)
        assert before.requests
        # What is under way at the end was asked for as well.
        count = answer["windows"] + answer["untimed"] + max(one.measured.case.in_flight - 1, 0)
        one.measured.requests, one.measured.megabytes = after.requests / count, after.bytes / 1e6 / count
    one.windows = int(min(max(answer["windows"] / answer["seconds"] * round_s, _FEWEST), most_windows))


@contextlib.contextmanager
def worker(measured: Measured, facts: Facts, python: str) -> Iterator[Worker]:
    """A process for a case, pinned to as many CPUs as it has threads."""
    cpus = sorted(os.sched_getaffinity(0))[-measured.case.threads :]
    environment = {**os.environ, "OMP_NUM_THREADS": str(measured.case.threads), "PYTHONWARNINGS": "ignore"}
    command = [python, "-m", "tools.stream_peers.worker", "read", json.dumps(asdict(measured.case)), facts.text]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    with (
        tempfile.TemporaryFile("w+") as log,
        # In a session of its own: a shell that ends would wake those that stand still.
        subprocess.Popen(
            command, stderr=log, start_new_session=True, **pipes, preexec_fn=lambda: _begin(cpus)
        ) as process,
    ):
        try:
            yield Worker(measured=measured, process=process, log=log)
        finally:
            process.kill()


def _begin(cpus: Sequence[int]) -> None:
    """In the new process: stay on these CPUs, and end with whoever started it, for nobody else would wake it."""
    os.sched_setaffinity(0, cpus)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def make_layout(layout: str, facts: Facts, python: str) -> str:
    """Make a layout in the environment of whoever reads it; why it could not be made, or nothing."""
    command = [python, "-m", "tools.stream_peers.worker", "make", layout, facts.text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 0:
        return ""
    return f"its layout could not be made: {lines[-1] if lines else f'exit status {done.returncode}'}"
