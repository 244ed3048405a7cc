"""A run in TensorBoard, Weights & Biases and MLflow: numbers by name and step, and of the recipe what can name nobody.

The log is the record; trackers are views of it for people. What goes there is picked by what it is, not by what it is not:
finite numbers of steps and looks at validation, numbers and choices of the recipe, and a few names of columns and splits.
No URL, path, condition on participants, list of windows or label of a subject is sent, nor what the packages would send by
themselves (host, user, command line, code, requirements, console).
"""

import importlib.util
import json
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args, get_origin, get_type_hints

from fmristream.errors import UsageError
from fmristream.storage.urls import redacted
from train.config import Recipe, as_tables
from train.event_files import EventFile
from train.files import write_json

if TYPE_CHECKING:
    from train.log import Log

# Text of the recipe that may be sent, beside choices among given words: names of columns, splits and methods.
_TOLD = frozenset({"data.target", "data.normalize", "data.orientation", "data.augment", "model.name"})
# How far a tracker may fall behind, and how long the end of a run waits for it: a server that hangs must hold nothing up.
_MOST_WAITING = 10_000
_LAST_WAIT_S = 30.0
# A thread that woke up for every step would take Python's lock from it.
_COLLECT_S = 1.0
# MLflow's limit for one message.
_MOST_METRICS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Numbers of one step."""

    step: int
    wall_time_s: float
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a tracker is opened with.

    Attributes:
        out: the run's folder, where local ones write.
        project: W&B's project, MLflow's experiment.
        name: of the run, for people.
        settings: of the recipe, what may be told.
        done: steps that this run goes on from.
        key: of the run at W&B or MLflow; None for a new one.
    """

    out: Path
    project: str
    name: str
    settings: Mapping[str, Any]
    done: int
    key: str | None = None


class Tracker(Protocol):
    """Where rows go. Its methods may raise whatever they like: the run goes on without it."""

    @property
    def key(self) -> str | None:
        """By which a resumed run finds it again."""
        ...

    def send(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    key: str | None = None

    def __init__(self, facts: Facts) -> None:
        self._file = EventFile(facts.out / "tensorboard", first_step=facts.done + 1)

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._file.add(row.step, row.numbers, wall_time_s=row.wall_time_s)

    def close(self) -> None:
        self._file.close()


class _WandB:
    """Steps that a resume undid keep the numbers that came first: W&B takes no second ones for a step."""

    def __init__(self, facts: Facts) -> None:
        import wandb

        # A setting that a version does not know is an error: nothing is sent that was not to be.
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            email="",
            host="-",
            program="train",
            save_code=False,
            silent=True,
            username="",
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self.key: str | None = facts.key or uuid.uuid4().hex
        self._run = wandb.init(
            project=facts.project,
            id=self.key,
            resume="allow",
            name=facts.name,
            dir=str(facts.out),
            config=dict(facts.settings),
            settings=settings,
        )

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(dict(row.numbers), step=row.step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """Through the client, since the module's own functions add user, host and command line to a run."""

    def __init__(self, facts: Facts) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric: Callable[..., Any] = Metric
        url = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(facts.out / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=url)
        if facts.key is None:
            experiment = self._client.get_experiment_by_name(facts.project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(facts.project)
            self.key: str | None = self._client.create_run(number, run_name=facts.name).info.run_id
            params = [Param(name, str(value)[:500]) for name, value in facts.settings.items()]
            for first in range(0, len(params), 100):  # its limit for one message
                self._client.log_batch(self.key, params=params[first : first + 100])
        else:
            self.key = facts.key
            self._client.update_run(self.key, status="RUNNING")

    def send(self, rows: Sequence[Row]) -> None:
        metrics = [
            self._metric(name, value, int(1000 * row.wall_time_s), row.step)
            for row in rows
            for name, value in row.numbers.items()
        ]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.key, metrics=metrics[first : first + _MOST_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    open: Callable[[Facts], Tracker]
    package: str = ""  # that it needs
    # A file beside the log: it takes microseconds, and forgets by itself the steps that a resume undid.
    is_local: bool = False


_KINDS: Mapping[str, _Kind] = {
    "tensorboard": _Kind(open=_TensorBoard, is_local=True),
    "wandb": _Kind(open=_WandB, package="wandb"),
    "mlflow": _Kind(open=_Mlflow, package="mlflow"),
}


def require_trackers(recipe: Recipe) -> None:
    """Raise UsageError for a tracker whose package is not installed."""
    for name in recipe.watch.trackers:
        package = _KINDS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"watch.trackers: {name!r} needs the package {package}, which is not installed; "
                f"pip install 'fmristream[{name}]', or leave it out"
            )


def open_trackers(recipe: Recipe, *, out: Path, done: int, seen: int, log: "Log") -> None:
    """Join the recipe's trackers to the log of a run that goes on from step `done`.

    Args:
        recipe: of the run.
        out: its folder, where the trackers' keys are kept (`trackers.json`).
        done: steps that count.
        seen: the last step that was ever logged; those from `done` to here were undone by a resume.
        log: that they are told from.
    """
    keys = _kept_keys(out)
    for name in recipe.watch.trackers:
        kind = _KINDS[name]
        facts = Facts(
            out=out,
            project=recipe.watch.project,
            name=f"{recipe.model.name} {recipe.data.target or recipe.objective.kind}",
            settings=told_settings(recipe),
            done=done,
            key=keys.get(name),
        )
        after = 0 if kind.is_local else seen
        log.join(Tracking(name, partial(kind.open, facts), after=after, log=log, has_thread=not kind.is_local))
    # Trackers that were opened know their keys now.
    opened = {watcher.name: watcher.key for watcher in log.watchers if isinstance(watcher, Tracking) and watcher.key}
    if opened.keys() - keys.keys():
        _keep_keys(out, keys | opened)


def _kept_keys(out: Path) -> dict[str, str]:
    path = out / "trackers.json"
    if not path.exists():
        return {}
    try:
        return {str(name): str(key) for name, key in json.loads(path.read_text(encoding="utf-8")).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise UsageError(f"{path}: is not what was written; remove it, and trackers begin new runs") from error


def _keep_keys(out: Path, keys: Mapping[str, str]) -> None:
    write_json(out / "trackers.json", keys)


class Tracking:
    """Sends what it is told; a tracker that fails is said once and left alone from then on.

    Args:
        name: of the tracker.
        opener: opens it.
        after: steps up to this one were sent before and are not sent again.
        log: where a failure is told.
        has_thread: whether a thread of its own sends, once a second, so that no step waits for a server.
    """

    def __init__(
        self, name: str, opener: Callable[[], Tracker], *, after: int, log: "Log", has_thread: bool = True
    ) -> None:
        self.name = name
        self._after = after
        self._log = log
        self._rows: queue.Queue[Row | None] = queue.Queue(_MOST_WAITING)
        self._failure: Exception | None = None
        self._is_told = False
        self._is_ending = threading.Event()
        self._tracker: Tracker | None = None
        self._thread: threading.Thread | None = None
        try:
            self._tracker = opener()
        except Exception as error:  # whatever a network and three packages may raise; training does not depend on it
            self._failure = error
            self._tell()
            return
        if has_thread:
            # Not waited for beyond `close`: a request that hangs must not keep a finished run from ending.
            self._thread = threading.Thread(target=self._work, name=f"fmristream-{name}", daemon=True)
            self._thread.start()

    @property
    def key(self) -> str | None:
        """Of the run, there."""
        return None if self._tracker is None else self._tracker.key

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Looks at validation are sent, by split."""
        if kind == "eval":
            self._put(int(facts["step"]), told_numbers(facts, prefix=str(facts.get("split", "eval"))))

    def step(self, facts: Mapping[str, Any], *, total: int, show_every: int) -> None:
        """Every step is sent, with frames/s and the share of waiting."""
        numbers = told_numbers(facts, prefix="train")
        seconds = facts.get("seconds") or 0.0
        if seconds > 0:
            numbers["train/wait_percent"] = 100 * facts.get("wait_s", 0.0) / seconds
            if facts.get("frames"):
                numbers["train/frames_per_s"] = facts["frames"] / seconds
        self._put(int(facts["step"]), numbers)

    def close(self) -> None:
        """Wait for what is under way, but not for ever."""
        if self._tracker is None or self._failure is not None:
            if self._tracker is not None and self._thread is None:
                with suppress(OSError):
                    self._tracker.close()
        elif self._thread is None:
            self._attempt(self._tracker.close)
        else:
            self._is_ending.set()
            with suppress(queue.Full):
                self._rows.put(None, timeout=_LAST_WAIT_S)
            self._thread.join(_LAST_WAIT_S)
            if self._thread.is_alive() and self._failure is None:
                self._failure = TimeoutError(f"it did not come to an end within {_LAST_WAIT_S:g} s")
        self._tell()

    def _put(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._failure is None and step > self._after and numbers:
            assert self._tracker is not None
            row = Row(step=step, wall_time_s=time.time(), numbers=numbers)
            if self._thread is None:
                self._attempt(lambda: cast(Tracker, self._tracker).send([row]))
            else:
                try:
                    self._rows.put_nowait(row)
                except queue.Full:
                    self._failure = TimeoutError(f"it is {_MOST_WAITING} rows behind")
        self._tell()

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # as when it was opened
            self._failure = error

    def _tell(self) -> None:
        """Say once that it failed, in the log and on the screen."""
        if self._failure is not None and not self._is_told:
            self._is_told = True
            reason = redacted(" ".join(f"{type(self._failure).__name__}: {self._failure}".split()))[:300]
            self._log.event("warning", {"tracker": self.name, "reason": reason, "so": "training goes on without it"})

    def _work(self) -> None:
        """Send what has come since, until the end; a failure is told by the main thread."""
        tracker = cast(Tracker, self._tracker)

        def send_all() -> None:
            rows: list[Row | None] = []
            while None not in rows:
                rows = [self._rows.get()]
                self._is_ending.wait(_COLLECT_S)
                while not self._rows.empty():
                    rows.append(self._rows.get_nowait())
                if known := [row for row in rows if row is not None]:
                    tracker.send(known)
            tracker.close()

        self._attempt(send_all)


def told_numbers(facts: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """The finite numbers among some facts, by names that every tracker takes; text, lists and tables are left out."""
    return {
        f"{_plain_name(prefix)}/{_plain_name(name)}": float(value)
        for name, value in facts.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\-/]", "_", name)


def told_settings(recipe: Recipe) -> dict[str, Any]:
    """What trackers may know of a recipe: numbers, switches, choices among given words, and a few names."""
    told: dict[str, Any] = {}
    tables = as_tables(recipe)
    for section in fields(recipe):
        choices = _choices(type(getattr(recipe, section.name)))
        for key, value in tables[section.name].items():
            name = f"{section.name}.{key}"
            is_numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
            if isinstance(value, int | float) or is_numbers or name in _TOLD or key in choices:
                told[name] = value
    return told


def _choices(section: type) -> set[str]:
    """Keys of a section whose values are words of a given set."""
    hints = get_type_hints(section)
    return {
        name for name, hint in hints.items() if any(get_origin(part) is Literal for part in (hint, *get_args(hint)))
    }
