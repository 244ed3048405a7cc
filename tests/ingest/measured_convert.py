"""Run by test_memory in its own process: convert a tiny run to warm up, then others, and tell how memory grew at each.

`python -m tests.ingest.measured_convert OPTIONS WARM_SOURCE TARGET SOURCE...` prints a JSON list of {peak_mib, seconds}.
"""

import json
import sys
import threading
import time

import psutil

import fmristream
from fmristream.ingest.options import ConvertOptions

MIB = 2**20


class Peak:
    """Highest resident memory while the block runs, above what there was at its start, in MiB."""

    def __enter__(self) -> "Peak":
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        return (self._highest - self._start) / MIB

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._highest = max(self._highest, self._process.memory_info().rss)


def main(options: str, warm: str, target: str, *sources: str) -> None:
    chosen = ConvertOptions(**json.loads(options))
    fmristream.convert(warm, f"{target}-warm", options=chosen)
    found = []
    for number, source in enumerate(sources):
        started = time.monotonic()
        with Peak() as peak:
            report = fmristream.convert(source, f"{target}-{number}", options=chosen)
        assert report.exit_code == 0
        found.append({"peak_mib": peak.mib, "seconds": time.monotonic() - started, "frames": report.frames})
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
