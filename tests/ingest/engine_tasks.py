"""Tasks for engines, by name importable on any worker: well-behaved ones and ones that take their process with them."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A number, and a folder in which tasks leave traces."""

    name: str
    value: int = 0
    folder: str = ""


def double(item: Item, on_frame=None) -> int:
    return 2 * item.value


def leave_a_trace(item: Item, on_frame=None) -> int:
    (Path(item.folder) / f"{item.value}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return item.value


def die_once(item: Item, on_frame=None) -> int:
    """Number 3 kills its process the first time."""
    mark = Path(item.folder) / "died"
    if item.value == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item.value


def die_always(item: Item, on_frame=None) -> int:
    if item.value == 3:
        (Path(item.folder) / f"death-{time.monotonic_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item.value


def sleep(item: Item, on_frame=None) -> int:
    time.sleep(item.value)
    return item.value


def trace_and_sleep(item: Item, on_frame=None) -> int:
    leave_a_trace(item)
    time.sleep(120)
    return item.value


def trace_and_sleep_shortly(item: Item, on_frame=None) -> int:
    leave_a_trace(item)
    time.sleep(2)
    return item.value
