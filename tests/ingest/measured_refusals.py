"""Run by test_damage in its own process: read files that should be refused, each in a fork, and tell what it took.

`python -m tests.ingest.measured_refusals HEALTHY FILE...` prints a JSON list of {name, reason, seconds, growth_mib}.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

from fmristream.errors import SourceError
from tests.ingest.reading import as_run, read


def main(healthy: str, *paths: str) -> None:
    read(healthy)  # imports are not what is measured
    print(json.dumps([measured(Path(path)) for path in paths]))


def measured(path: Path) -> dict[str, object]:
    """In a fork, whose peak begins at what this process has."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(send, json.dumps(_refusal(path)).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as file:
        found = file.read()
    os.waitpid(pid, 0)
    return json.loads(found)


def _refusal(path: Path) -> dict[str, object]:
    # Address space is not to be had either: what asks for what a header says fails here.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20, resource.RLIM_INFINITY))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    reason = ""
    try:
        read(as_run(path).url)
    except SourceError as error:
        reason = str(error)
    seconds = time.monotonic() - started
    growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"name": path.name, "reason": reason, "seconds": seconds, "growth_mib": growth_mib}


if __name__ == "__main__":
    main(*sys.argv[1:])
