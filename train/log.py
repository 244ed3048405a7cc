"""What a run writes down as it goes, and what of it led to where it stands."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fmristream.errors import CorruptDataError
from train.files import for_json
from train.progress import Watcher, screen

# What a history is made of.
_COUNTED = ("start", "step", "eval")


class Log:
    """One JSON object per line, each flushed as it is written, and told to whoever watches; without a file, nothing."""

    def __init__(self, file: IO[str] | None, watchers: Sequence[Watcher] = ()) -> None:
        self._file = file
        self.watchers = list(watchers)
        self.attempt = ""  # whose steps these are (train/fence.py)

    def join(self, watcher: Watcher) -> None:
        """Tell somebody more, from now on; the log closes it."""
        self.watchers.append(watcher)

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Something that happens now and then."""
        self._write({"event": kind, **(self._by if kind in _COUNTED else {}), **facts})
        for watcher in self.watchers:
            watcher.event(kind, facts)

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        """One optimiser step of `total`; every `show_every`-th is shown."""
        self._write({"event": "step", **self._by, **facts})
        for watcher in self.watchers:
            watcher.step(facts, total=total, show_every=show_every)

    def close(self) -> None:
        """Let those who watch finish."""
        for watcher in self.watchers:
            watcher.close()

    def flush_to_disk(self) -> None:
        """Have the lines until now survive this machine."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    @property
    def _by(self) -> dict[str, str]:
        return {"attempt": self.attempt} if self.attempt else {}

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(for_json(line), allow_nan=False) + "\n")
            self._file.flush()


@contextmanager
def open_log(path: Path, *, enabled: bool) -> Iterator[Log]:
    """Append to a run's log, and show it as suits the terminal; a line that a kill cut short is closed first."""
    if not enabled:
        yield Log(None)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        if cut_short:
            file.write("\n")
        log = Log(file, screen())
        try:
            yield log
        finally:
            log.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The steps and looks at validation that led to where a run stands; those that a resume undid are left out."""

    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]


def read_history(path: Path) -> History:
    """Read a run's log; a start at step k undoes what was logged after k, and what older attempts log after it counts nothing.

    Raises:
        CorruptDataError: a line is damaged in another way than by a kill, after which a new attempt begins.
    """
    steps: list[Mapping[str, Any]] = []
    evals: list[Mapping[str, Any]] = []
    cut, attempt = 0, ""
    for number, line in enumerate(lines_of(path), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            cut = number
            continue
        event, by = entry["event"], entry.pop("attempt", "")  # what ran, not who ran it, is history
        if by and by < attempt:
            continue  # it did not know yet that it was superseded
        if cut and event in ("step", "eval"):
            raise CorruptDataError(f"{path}: line {cut} is not the JSON that was written, and the run went on after it")
        cut = 0
        if event == "start":
            attempt = by
            steps = [done for done in steps if done["step"] <= entry["step"]]
            evals = [done for done in evals if done["step"] <= entry["step"]]
        elif event == "step":
            steps.append(entry)
        elif event == "eval":
            evals.append(entry)
    return History(steps=steps, evals=evals)


def lines_of(path: Path) -> list[str]:
    """The lines of a log; what a power cut left of one may be no text, and is no JSON then."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def last_logged_step(path: Path) -> int:
    """The highest step that any attempt logged, undone or not; 0 where there is none."""
    if not path.exists():
        return 0
    steps = [0]
    for line in lines_of(path):
        with suppress(json.JSONDecodeError):  # cut short by a kill; `read_history` tells other damage
            entry = json.loads(line)
            if entry["event"] == "step":
                steps.append(entry["step"])
    return max(steps)


def newest_attempt(path: Path) -> str:
    """The newest attempt that logged its start; empty where there is none."""
    newest = ""
    for line in lines_of(path) if path.exists() else ():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["event"] == "start":
                newest = max(newest, entry.get("attempt", ""))
    return newest
