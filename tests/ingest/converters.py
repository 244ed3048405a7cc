"""Converters that can be killed: one process that has imported everything, and forks a fresh one for every attempt.

Run as `python -m tests.ingest.converters SOURCE OPTIONS`: for each line with a URL on stdin it prints `started PID`, then
what the attempt reports, then `ended STATUS`.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self


def main(source: str, options: str) -> None:
    import nilearn.masking  # noqa: F401 imported once for all attempts, as what follows

    import fmristream.shards.zarr_metadata  # noqa: F401
    from fmristream.ingest.convert import convert
    from fmristream.ingest.options import ConvertOptions

    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            report = convert(source, line.strip(), options=ConvertOptions(**json.loads(options)))
            found = {"digest": report.content_digest, "resumed": report.resumed, "there": report.already_there}
            print("report", json.dumps(found), flush=True)
            os._exit(0)
        os.setpgid(pid, 0)  # here too: whoever reads the next line may kill the group at once
        print("started", pid, flush=True)
        print("ended", os.waitpid(pid, 0)[1], flush=True)


@dataclass(slots=True)
class Attempt:
    """One conversion under way, and what it printed."""

    pid: int
    started: float
    lines: list[str] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return any(line.startswith("ended") for line in self.lines)

    @property
    def was_killed(self) -> bool:
        return f"ended {int(signal.SIGKILL)}" in self.lines

    @property
    def report(self) -> dict[str, Any] | None:
        found = [line for line in self.lines if line.startswith("report")]
        return json.loads(found[0].partition(" ")[2]) if found else None


def _holds(condition: Callable[[], bool]) -> bool:
    """Whether it holds; a folder that vanishes while it is looked into tells that not yet, or no more."""
    with suppress(FileNotFoundError):
        return condition()
    return False


class Converters:
    """Starts attempts and kills them; a context manager."""

    def __init__(self, source: str, **options: Any) -> None:
        command = [sys.executable, "-m", "tests.ingest.converters", source, json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._rest = b""
        assert self._line(timeout_s=120) == "ready"

    def start(self, url: str) -> Attempt:
        """Begin an attempt."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{url}\n".encode())
        line = self._line(timeout_s=60)
        assert line.startswith("started")
        return Attempt(pid=int(line.split()[1]), started=time.monotonic())

    def wait(self, attempt: Attempt, *, until: Callable[[], bool] | None = None) -> None:
        """Return when the attempt has ended, or when the condition holds."""
        while not (attempt.has_ended or (until is not None and _holds(until))):
            line = self._line(timeout_s=60 if until is None else 0.002)
            if line:
                attempt.lines.append(line)

    def kill(self, attempt: Attempt) -> None:
        """SIGKILL to its whole process group, if it is still there, and its end."""
        if not attempt.has_ended:
            with suppress(ProcessLookupError):  # it ended at this moment
                os.killpg(attempt.pid, signal.SIGKILL)
        self.wait(attempt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _line(self, *, timeout_s: float) -> str:
        """The next line, or nothing within the time."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                return ""
            data = os.read(self._process.stdout.fileno(), 4096)
            assert data, "the converters' process has died"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


if __name__ == "__main__":
    main(*sys.argv[1:])
