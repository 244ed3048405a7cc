"""How a run is followed while it goes on: lines that a Slurm log can hold, and a bar on a terminal."""

import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

# The bar is drawn by the step itself, so that no thread takes time from the step; four times a second reads as motion.
_REDRAW_S = 0.25
# Over how many of the last steps the bar's rate and waiting are taken.
_RECENT_STEPS = 50


class Watcher(Protocol):
    """What is told of a run, beside its log; only rank 0 has any."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Something that happens now and then."""
        ...

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        """One optimiser step of `total`, with what its line in the log holds."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


class Pace:
    """Rates over steps: of work (frames/s, steps/s, waiting) by the steps' own seconds, of time left by the clock."""

    def __init__(self, steps: int | None = None) -> None:
        self._began: tuple[float, int] | None = None
        self._last = (0.0, 0)
        self._recent: deque[tuple[float, float, float | None]] = deque(maxlen=steps)

    def add(self, facts: Mapping[str, Any]) -> None:
        """Count a step."""
        self._last = (time.perf_counter(), facts["step"])
        if self._began is None:
            self._began = self._last
        self._recent.append((facts.get("seconds", 0.0), facts.get("wait_s", 0.0), facts.get("frames")))

    def begin_anew(self) -> None:
        """Forget the steps, as after a line; the clock goes on."""
        self._recent.clear()

    @property
    def seconds_a_step(self) -> float | None:
        """By the clock since the first one, so that looks at validation and checkpoints are in it."""
        if self._began is None or self._last[1] <= self._began[1]:
            return None
        return (self._last[0] - self._began[0]) / (self._last[1] - self._began[1])

    @property
    def frames_per_s(self) -> float | None:
        """Of the global batch; None where a step does not say its frames."""
        seconds = sum(took for took, _, _ in self._recent)
        frames = [count for _, _, count in self._recent]
        if seconds <= 0 or any(count is None for count in frames):
            return None
        return sum(count for count in frames if count is not None) / seconds

    @property
    def steps_per_s(self) -> float | None:
        """Of the steps alone, as frames are; None before the first."""
        seconds = sum(took for took, _, _ in self._recent)
        return len(self._recent) / seconds if seconds > 0 else None

    @property
    def wait_percent(self) -> float | None:
        """Share of the steps' time in which the device had no batch, on the rank that waited longest."""
        seconds = sum(took for took, _, _ in self._recent)
        return 100 * sum(waited for _, waited, _ in self._recent) / seconds if seconds > 0 else None


class Lines:
    """One line per event, and one every so many steps, on stdout."""

    def __init__(self) -> None:
        self._pace = Pace()

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        print(event_line(kind, facts), flush=True)

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        self._pace.add(facts)
        step = facts["step"]
        if step % show_every and step != total:
            return
        parts = [f"loss {facts['loss']:.4f}", f"lr {facts['lr']:.2e}", *pace_words(self._pace, left=total - step)]
        print(f"step {step}/{total}: {', '.join(parts)}", flush=True)
        self._pace.begin_anew()

    def close(self) -> None:
        pass


class Bar:
    """A bar on stderr, a terminal; events are printed above it where stdout is one, too."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._pace = Pace(_RECENT_STEPS)
        self._drawn = 0.0
        self._words = ""
        columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(10), TextColumn("{task.fields[words]}")
        self._bars: AbstractContextManager[Progress] = Progress(
            *columns,
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )
        self._progress = self._bars.__enter__()
        self._task = self._progress.add_task("", total=None, words="", visible=False)

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._progress.refresh()

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        self._pace.add(facts)
        now = time.perf_counter()
        if now - self._drawn < _REDRAW_S and facts["step"] != total:
            return
        self._drawn = now
        words = [f"loss {facts['loss']:.4f}", f"lr {facts['lr']:.2e}"]
        words += [*pace_words(self._pace, left=total - facts["step"], with_steps=False), memory_words()]
        self._progress.update(
            self._task, completed=facts["step"], total=total, words=", ".join(words), visible=True, refresh=True
        )

    def close(self) -> None:
        self._bars.__exit__(None, None, None)


def screen() -> list[Watcher]:
    """What suits this process's streams: a bar where stderr is a terminal, lines for whatever keeps stdout."""
    if not sys.stderr.isatty():
        return [Lines()]
    if sys.stdout.isatty():
        return [Bar(), _EventLines()]
    return [Bar(), Lines()]  # as `| tee` has it


class _EventLines(Lines):
    """Events alone; the bar tells the steps."""

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        pass


def event_line(kind: str, facts: Mapping[str, Any]) -> str:
    """An event in a line; what is not known is left out."""
    return f"{kind}: {', '.join(f'{key} {_short(value)}' for key, value in facts.items() if value is not None)}"


def pace_words(pace: Pace, *, left: int, with_steps: bool = True) -> list[str]:
    """Rates as far as they are known."""
    words = []
    if pace.frames_per_s is not None:
        words.append(
            f"{pace.frames_per_s:.3g} frames/s" if pace.frames_per_s < 1000 else f"{pace.frames_per_s:,.0f} frames/s"
        )
    if pace.wait_percent is not None:
        words.append(f"wait {pace.wait_percent:.1f} %")
    if with_steps and pace.steps_per_s is not None:
        words.append(f"{pace.steps_per_s:.3g} steps/s")
    if pace.seconds_a_step:
        words.append(f"{time_words(left * pace.seconds_a_step)} left")
    return words


def time_words(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def memory_words() -> str:
    """This process's peak of memory so far: of its GPU where it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        return f"GPU peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
