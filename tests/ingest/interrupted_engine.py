"""Run by test_execute: a driver with two workers that would be at work for minutes, until somebody interrupts it."""

import signal
import sys

from fmristream.ingest.execute import Engine
from tests.ingest.engine_tasks import Item, trace_and_sleep


def main(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts tests in the background ignores it
    tasks = [Item(name=str(value), value=value, folder=folder) for value in range(8)]
    try:
        with Engine(2) as engine:
            list(engine.run(trace_and_sleep, tasks))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
