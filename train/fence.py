"""Two attempts at one run never both count: the newer one takes over, and the older one learns that it is superseded.

A machine that was taken for dead, or a second person who gives the same --out, would write checkpoints where another attempt
does. Every attempt that begins leaves a note in the checkpoints' place, whose name says all, so that one listing is enough:

    checkpoints/attempts/00000007-1f2e3d4c-at-800-5a6b7c8d-9e0f1a2b
                         number   token      step job      launcher

Numbers grow, and of two equal ones the greater token counts: no clock is asked, and a store need not create exclusively. What
an attempt writes carries `number-token`. A checkpoint of step s counts unless a later attempt began at a step below s: then
it was written by one that did not know yet that it was superseded, and leads nowhere.
"""

import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fmristream.errors import ConflictError

_NAME = re.compile(r"((?:[0-9]{8})-[0-9a-f]{8})-at-(0|[1-9][0-9]*)-([0-9a-f]{8})-([0-9a-f]{8})")
_NOBODY = "0" * 8


# The exit status of a rank that is superseded: starting it again would only supersede the other in turn.
SUPERSEDED = 3


class SupersededError(ConflictError):
    """A newer attempt writes to this run's folder: this one must end, and must not be started again."""


class NotesPlace(Protocol):
    """Where attempts leave their notes."""

    @property
    def where(self) -> str:
        """Its path or URL, as it may be shown."""

    def notes(self) -> list[str]:
        """Names of the notes that are there; from a disk or a store, never from memory of an earlier look."""

    def leave_note(self, name: str) -> None:
        """Add a note; it is durable on return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a run that got as far as to train."""

    id: str  # number-token: later attempts' compare greater
    step: int  # where it began
    job: str  # the same for the starts of one torchrun or job
    launcher: str  # the process that started it; another one for every torchrun

    @property
    def note(self) -> str:
        return f"{self.id}-at-{self.step}-{self.job}-{self.launcher}"


def attempts_at(place: NotesPlace) -> list[Attempt]:
    """All that have begun there, oldest first."""
    found = (_NAME.fullmatch(name) for name in place.notes())
    made = (Attempt(id=one[1], step=int(one[2]), job=one[3], launcher=one[4]) for one in found if one)
    return sorted(made, key=lambda attempt: attempt.id)


def counts(*, step: int, attempt: str, attempts: Iterable[Attempt]) -> bool:
    """Whether a checkpoint leads to where the run stands now: no later attempt began before it.

    Args:
        step: the checkpoint's.
        attempt: id of the attempt that wrote it; empty where none is said, as by the first releases.
        attempts: all that are known.
    """
    return all(later.step >= step for later in attempts if later.id > attempt)


class Fence:
    """What one attempt may still write; only rank 0 has one."""

    def __init__(self, place: NotesPlace, attempt: Attempt) -> None:
        self._place = place
        self.attempt = attempt

    def check(self) -> None:
        """Raise SupersededError where a newer attempt has begun."""
        newest = attempts_at(self._place)[-1:]
        if newest and newest[0].id > self.attempt.id:
            raise SupersededError(
                f"{self._place.where}: attempt {newest[0].id} of this run took over at step {newest[0].step}, so this one "
                f"({self.attempt.id}) ends and writes nothing more; was it started twice? give every run an --out of its own"
            )


def take_over(place: NotesPlace, *, step: int, newer_than: Iterable[str]) -> Fence:
    """Begin as the newest attempt.

    Args:
        place: where checkpoints are kept.
        step: where this attempt begins.
        newer_than: ids of attempts that other places tell of, the log say: notes may have been removed by hand.

    Raises:
        SupersededError: a stranger took over from the launcher that starts this process again.
    """
    job, launcher = _digest(os.environ.get("TORCHELASTIC_RUN_ID", "")), launcher_id()
    known = attempts_at(place)
    require_not_taken(place, known, job=job, launcher=launcher)
    last = max([0, *(int(name.partition("-")[0]) for name in [*(one.id for one in known), *newer_than] if name)])
    mine = Attempt(id=f"{last + 1:08d}-{secrets.token_hex(4)}", step=step, job=job, launcher=launcher)
    place.leave_note(mine.note)
    fence = Fence(place, mine)
    fence.check()
    return fence


def require_not_taken(place: NotesPlace, known: list[Attempt], *, job: str, launcher: str) -> None:
    """Raise SupersededError where another job took over from this launcher: both would take over from each other for ever."""
    if not known or launcher == _NOBODY or known[-1].launcher == launcher or known[-1].job == job:
        return
    if any(one.launcher == launcher for one in known):
        raise SupersededError(
            f"{place.where}: attempt {known[-1].id} of another job took over this run while it was started again here, so it "
            "is left to that one; was it started twice? give every run an --out of its own"
        )


def launcher_id() -> str:
    """The agent that started this process, and starts it again; nobody else's name. Zeros where there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return _NOBODY
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat", encoding="utf-8", errors="replace") as file:
            began = file.read().rpartition(")")[2].split()[19]  # ticks since this machine's start
    except (OSError, IndexError):  # no Linux: then attempts are limited by --max-restarts alone
        return _NOBODY
    return _digest(f"{socket.gethostname()} {parent} {began}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text else _NOBODY
