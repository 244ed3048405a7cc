"""What runs in a process of its own, in the environment of its peer.

    python -m tools.stream_peers.worker make LAYOUT FACTS
    python -m tools.stream_peers.worker read CASE FACTS

`read` opens the case once, and compares its first windows with what they have to be. For each line of its input,
`{"round", "windows"}`, it streams windows anew: the first ones untimed, until whatever it keeps in flight is in flight,
then so many, and tells how that went.
"""

import contextlib
import ctypes
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tools.stream_peers.cases import Case, Stream
from tools.stream_peers.checks import CHECKED, require_equal
from tools.stream_peers.data import Facts, Sample
from tools.stream_peers.layouts import prepare


def main(arguments: list[str]) -> int:
    """Do what is asked for."""
    task, what, text = arguments
    facts = Facts.parse(text)
    if task == "make":
        prepare(replace(facts, url=""), what)
        return 0
    case = Case(**json.loads(what))
    started = time.perf_counter()
    stream = case.open(facts)
    first_s = _first(facts, case, stream, started)
    print(json.dumps({"first_s": first_s}), flush=True)
    for line in sys.stdin:
        print(json.dumps(one_round(stream, case, **json.loads(line))), flush=True)
    return 0


def _first(facts: Facts, case: Case, stream: Stream, started: float) -> float:
    """Seconds to the first window, in a process that has imported numpy; it and the next ones are the right ones."""
    samples = stream(0)
    sample = next(samples)
    seconds = time.perf_counter() - started
    require_equal(facts, case, sample)
    for other in islice(samples, CHECKED - 1):
        require_equal(facts, case, other)
    _close(samples)
    return seconds


def one_round(stream: Stream, case: Case, *, round: int, windows: int) -> dict[str, Any]:
    """Seconds that so many windows took; of peers that work ahead, in the middle of their work."""
    samples = stream(round + 1)
    before, windows = untimed(case), -(-windows // batch(case)) * batch(case)
    for _ in islice(samples, before):
        pass
    started, cpu, disk = time.perf_counter(), time.process_time(), from_disk()
    for _ in islice(samples, windows):
        pass
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    disk_mb = (from_disk() - disk) / 1e6
    _close(samples)
    give_back()
    return {"windows": windows, "seconds": seconds, "cpu_s": cpu_s, "untimed": before, "disk_mb": disk_mb}


_DEEPEST = 48  # windows in flight where the loader decides: its requests at most


def untimed(case: Case) -> int:
    """Windows before the clock starts: a loader's batches that are ready ahead, and one turn of what is in flight."""
    return max(4 * batch(case), 2 * (case.in_flight or _DEEPEST)) if is_batched(case) else max(1, case.in_flight)


def is_batched(case: Case) -> bool:
    """Whether windows come in batches: then only whole ones are timed."""
    return case.peer.endswith(":ours")


def batch(case: Case) -> int:
    """Windows that come at once."""
    if not is_batched(case):
        return 1
    from tools.stream_peers.ours import batch_of

    return batch_of(case)


def from_disk() -> int:
    """Bytes that this process had read from a disk so far: what was not in the page cache. 0 where that is not told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


def give_back() -> None:
    """Memory that is free goes back to the system: others wait for their turn, and files are to stay in the page cache."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _close(samples: Iterator[Sample]) -> None:
    close = getattr(samples, "close", None)
    if close is not None:
        close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
