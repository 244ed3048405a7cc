"""Every model against every planted effect, on held-out subjects, with controls: the table of docs/proof.md.

    python tools/proof.py OUT                               everything: three core-hours
    python tools/proof.py OUT --models swift fc --effects coupling --seeds 0
    python tools/proof.py OUT --plan --report docs/proof.md nothing is computed: the page from what is there

Goes on where it was stopped: OUT/results.jsonl has a line for each finished cell, and a network that SIGTERM or Ctrl-C
stops keeps a checkpoint. The first seed of everything is done first.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `tools` is not installed

from fmristream.errors import UsageError  # noqa: E402
from tools.proof_cells import EFFECTS, MODELS, Cell, Settings, cells  # noqa: E402
from tools.proof_cohorts import Scores  # noqa: E402
from tools.proof_report import write_report  # noqa: E402
from tools.proof_results import append, expected_s, in_hours, line_of, read_lines, remaining  # noqa: E402

CONTEXT = multiprocessing.get_context("spawn")
# How long a stopped network may take to write its checkpoint.
GRACE_S = 60.0


class Stopped(Exception):
    """SIGTERM or Ctrl-C."""


@dataclasses.dataclass(kw_only=True)
class Worker:
    """A process that computes one cell at a time."""

    process: Any
    pipe: Connection
    cell: Cell


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute what is not there yet; 0 if nothing failed, 130 if stopped."""
    chosen = _parser().parse_args(arguments)
    settings = dataclasses.replace(Settings(), steps=chosen.steps, subjects=chosen.subjects)
    try:
        wanted = cells(chosen.models, chosen.effects, chosen.seeds)
    except UsageError as error:
        print(f"proof: {error}", file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = chosen.out / "results.jsonl"
    todo = remaining(wanted, read_lines(results), settings)
    _tell(todo, wanted, results, settings)
    status = 0
    if todo and not chosen.plan:
        budget_s = 3600 * chosen.hours
        try:
            with _sigterm_as_exception():
                status = run(todo, settings, out=chosen.out, workers=chosen.workers, budget_s=budget_s)
        except (Stopped, KeyboardInterrupt):
            print("proof: stopped; the same command goes on", file=sys.stderr)
            return 130
    if chosen.report:
        write_report(chosen.report, out=chosen.out, wanted=wanted, settings=settings)
        print(f"written: {chosen.report}")
    return status


def run(todo: Sequence[Cell], settings: Settings, *, out: Path, workers: int, budget_s: float) -> int:
    """Compute cells on some processes; 1 if one of them failed.

    Networks that are not there, or refuse their options, are told once and left out; why is kept in OUT/refused.json.
    """
    todo_left = _Queue(todo, settings, out=out, budget_s=budget_s)
    crew: list[Worker] = []
    failed = 0
    try:
        while True:
            while len(crew) < workers and (cell := todo_left.take()) is not None:
                crew.append(_hire(settings, out, cell))
            if not crew:
                return 1 if failed else 0
            for pipe in wait([worker.pipe for worker in crew]):
                worker = next(worker for worker in crew if worker.pipe is pipe)
                kind, answer = _answer(worker)
                if kind == "done":
                    todo_left.done(worker.cell, *answer)
                elif kind == "refused":
                    todo_left.refused(worker.cell, answer)
                else:
                    failed += 1
                    print(f"{worker.cell.key}: failed: {answer}", file=sys.stderr, flush=True)
                _next_or_home(worker, crew, todo_left)
    finally:
        _dismiss(crew)


class _Queue:
    """What is left to do, what it has taken so far, and which networks are not there."""

    def __init__(self, todo: Sequence[Cell], settings: Settings, *, out: Path, budget_s: float) -> None:
        self._left = deque(todo)
        self._settings, self._results, self._budget_s = settings, out / "results.jsonl", budget_s
        self._spent_s = 0.0
        self._refusals = out / "refused.json"
        before = json.loads(self._refusals.read_text()) if self._refusals.exists() else {}
        anew = {cell.model for cell in todo}
        self._reasons = {model: reason for model, reason in before.items() if model not in anew}
        self._write_refusals()

    def take(self) -> Cell | None:
        """The next cell whose network is there and that the budget allows."""
        while self._left:
            cell = self._left.popleft()
            if cell.model in self._reasons:
                continue
            if self._spent_s + expected_s(cell, read_lines(self._results), self._settings) <= self._budget_s:
                return cell
            spent = f"{in_hours(self._spent_s)} of {in_hours(self._budget_s)} are spent"
            print(f"{cell.key}: left for another time, {spent}", flush=True)
        return None

    def done(self, cell: Cell, scores: Scores, facts: Mapping[str, Any]) -> None:
        """Keep what a cell gave, and tell it."""
        line = line_of(cell, self._settings, scores, facts)
        append(self._results, line)
        self._spent_s += facts["core_s"]
        low, high = line["auroc_interval"]
        print(
            f"{cell.key}: AUROC {line['auroc']:.2f} ({low:.2f} to {high:.2f}), frames shuffled "
            f"{line['shuffled_auroc']:.2f}, {line['core_s']:.0f} core-seconds in {line['seconds']:.0f} s; "
            f"{_left(self._left, self._results, self._settings)}",
            flush=True,
        )

    def refused(self, cell: Cell, reason: str) -> None:
        """Leave a network's other cells out."""
        if cell.model not in self._reasons:
            print(f"{cell.model}: not there: {reason}", flush=True)
        self._reasons[cell.model] = reason
        self._write_refusals()

    def _write_refusals(self) -> None:
        part = self._refusals.with_suffix(".part")
        part.write_text(json.dumps(self._reasons, indent=1) + "\n")
        os.replace(part, self._refusals)


def work(pipe: Connection, settings: Settings, out: Path) -> None:
    """What a worker does: a cell comes, what became of it goes, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; who hired us tells us to stop
    from tools.proof_train import NotThereError, compute, one_thread

    one_thread()
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        try:
            done = compute(cell, settings, out=out)
        except NotThereError as error:
            pipe.send(("refused", str(error)))
        except Exception:
            # Reported by the other end, which counts it: one cell must not end the others.
            pipe.send(("failed", traceback.format_exc()))
        else:
            if done is None:
                return
            pipe.send(("done", (done.scores, done.facts)))


def _hire(settings: Settings, out: Path, cell: Cell) -> Worker:
    os.environ["OMP_NUM_THREADS"] = "1"  # the children's
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=work, args=(theirs, settings, out), daemon=True)
    process.start()
    theirs.close()
    ours.send(cell)
    return Worker(process=process, pipe=ours, cell=cell)


def _answer(worker: Worker) -> tuple[str, Any]:
    try:
        kind, answer = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return "failed", f"its process ended with status {worker.process.exitcode}"
    return kind, answer


def _next_or_home(worker: Worker, crew: list[Worker], queue: _Queue) -> None:
    """Another cell for a worker; it leaves the crew where there is none, or where its process has died."""
    if worker.process.is_alive() and (cell := queue.take()) is not None:
        worker.cell = cell
        worker.pipe.send(cell)
        return
    crew.remove(worker)
    worker.pipe.close()  # which ends it
    worker.process.join(GRACE_S)


def _dismiss(crew: Sequence[Worker]) -> None:
    """End all workers; those that train write a checkpoint first."""
    for worker in crew:
        worker.process.terminate()
        worker.pipe.close()
    for worker in crew:
        worker.process.join(GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(todo: Sequence[Cell], wanted: Sequence[Cell], results: Path, settings: Settings) -> None:
    print(f"{len(wanted) - len(todo)} of {len(wanted)} cells are done; {_left(todo, results, settings)}", flush=True)


def _left(todo: Collection[Cell], results: Path, settings: Settings) -> str:
    lines = read_lines(results)
    return f"{len(todo)} left, about {in_hours(sum(expected_s(cell, lines, settings) for cell in todo))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="cohorts (1.7 GB), results.jsonl, logs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--effects", nargs="+", default=list(EFFECTS), metavar="EFFECT", help=f"of {', '.join(EFFECTS)}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of cohorts and trainings (default: 0 1 2)"
    )
    parser.add_argument("--steps", type=int, default=Settings().steps, help="of each training (default: %(default)s)")
    parser.add_argument(
        "--subjects", type=int, default=Settings().subjects, help="of each cohort (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1, help="processes of one thread (default: 1)")
    parser.add_argument("--hours", type=float, default=3.0, help="core-hours after which no cell is begun (default: 3)")
    parser.add_argument("--plan", action="store_true", help="say what is left and compute nothing")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the tables into this page, the plot beside it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
