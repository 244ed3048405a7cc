"""Where a step goes: a few steps timed part by part on every rank, as many traced by torch's profiler, and both told."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train.state import Run

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

WAIT, COPY, FORWARD, LOSS, BACKWARD, REDUCE = "data wait", "copy to device", "forward", "loss", "backward", "all-reduce"
OPTIMISER, EXCHANGE, LOG = "optimiser", "exchange", "log"
VALIDATION, CHECKPOINT = "validation", "checkpoint"
PHASES = (WAIT, COPY, FORWARD, LOSS, BACKWARD, REDUCE, OPTIMISER, EXCHANGE, LOG, VALIDATION, CHECKPOINT)
# First steps allocate, choose kernels and compile: they are neither timed nor traced.
_WARM_UP = 5
_OPERATORS = 15  # rows of the table of operators


class NoProfile:
    """What `fit` tells its phases to where nothing is profiled."""

    def mark(self, phase: str) -> None:
        """From here on it is this."""

    def end_step(self) -> None:
        """A step, with all that follows it, is done."""


class Profile(NoProfile):
    """Times `steps` steps, traces as many, writes what was found below the run's folder, and is silent from then on.

    All moments between two marks belong to the first one's phase, so that phases add up to the whole. Forward, loss,
    backward and the all-reduce that backward could not hide are told apart by hooks, which are taken away at the end. On a
    GPU every mark waits for the device: phases are then what they take alone, and a step takes longer than it does unwatched.
    """

    def __init__(self, run: Run, *, steps: int) -> None:
        self._run = run
        self._steps = steps
        self._done = 0
        self._phase, self._since = LOG, time.perf_counter()
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._counts = dict.fromkeys(PHASES, 0)
        self._warm_s: list[float] = []
        self._began = self._since
        self._hooks: list[RemovableHandle] = []
        self._last_gradient = ""
        self._trace: torch.profiler.profile | None = None
        self._label: torch.profiler.record_function | None = None

    def mark(self, phase: str) -> None:
        if self._is_timing and self._run.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._is_timing:
            self._spent[self._phase] += now - self._since
            self._counts[phase] += phase != self._phase
        self._phase, self._since = phase, now
        if self._trace is not None:
            self._relabel(phase)

    def end_step(self) -> None:
        if self._done >= _WARM_UP + 2 * self._steps:
            return
        self.mark(WAIT)
        now = time.perf_counter()
        if self._done < _WARM_UP:
            self._warm_s.append(now - self._began)
        self._began = now
        self._done += 1
        if self._done == _WARM_UP - 1:
            self._find_last_gradient()
        elif self._done == _WARM_UP:
            self._watch_network()
        elif self._done == _WARM_UP + self._steps:
            self._start_trace()
        elif self._done == _WARM_UP + 2 * self._steps:
            self._finish()

    def close(self) -> None:
        """Leave nothing behind where a run ended before its profile did."""
        self._remove_hooks()
        if self._trace is not None:
            self._end_trace()
            self._trace = None

    @property
    def _is_timing(self) -> bool:
        return _WARM_UP <= self._done < _WARM_UP + self._steps

    def _find_last_gradient(self) -> None:
        """Which parameter's gradient comes last; what of backward comes after it is the all-reduce alone."""
        if self._run.world.size == 1:
            return
        for name, parameter in self._run.network.named_parameters():
            if parameter.requires_grad:
                self._hooks.append(_after_gradient(parameter, self._noting(name)))

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            self._last_gradient = name

        return note

    def _watch_network(self) -> None:
        self._remove_hooks()
        network = self._run.network
        self._hooks += [network.register_forward_pre_hook(self._enter), network.register_forward_hook(self._leave)]
        parameter = dict(network.named_parameters()).get(self._last_gradient)
        if parameter is not None:
            self._hooks.append(_after_gradient(parameter, lambda _: self.mark(REDUCE)))

    def _enter(self, network: nn.Module, inputs: Any) -> None:
        if network.training and self._phase != VALIDATION:
            self.mark(FORWARD)

    def _leave(self, network: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._phase != FORWARD:
            return
        self.mark(LOSS)
        if self._is_timing:
            for tensor in _tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]

    def _begin_backward(self, gradient: Tensor) -> None:
        if self._phase == LOSS:
            self.mark(BACKWARD)

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _start_trace(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._run.world.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._trace = torch.profiler.profile(activities=kinds)
        self._trace.start()
        self._relabel(WAIT)

    def _relabel(self, phase: str) -> None:
        """Name what follows in the trace; backward is named with the loss, since its hooks may run in other threads."""
        if phase in (BACKWARD, REDUCE):
            return
        if self._label is not None:
            self._label.__exit__(None, None, None)
        self._label = torch.profiler.record_function(f"phase: {phase}" + (" and backward" if phase == LOSS else ""))
        self._label.__enter__()  # type: ignore[no-untyped-call]

    def _end_trace(self) -> None:
        assert self._trace is not None
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        self._trace.stop()

    def _finish(self) -> None:
        run, trace = self._run, self._trace
        assert trace is not None
        self._remove_hooks()
        self._end_trace()
        self._trace = None
        own = [self._spent[phase] for phase in PHASES] + [float(self._counts[CHECKPOINT])]
        rows = run.world.stack(torch.tensor(own, dtype=torch.float64)).numpy()
        spent = [dict(zip(PHASES, row.tolist(), strict=False)) for row in rows]
        slowest = slowest_rank(spent)
        folder = run.out / "profile"
        last_timed = run.step - self._steps
        if run.world.rank in (0, slowest):
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(folder / f"steps-{last_timed + 1}-{run.step}-rank-{run.world.rank}.json"))
        if run.world.is_main:
            text = told(
                spent,
                slowest=slowest,
                first=last_timed - self._steps + 1,
                last=last_timed,
                about=self._about(),
                unwatched_s=statistics.median(self._warm_s[1:]),
                checkpoints=int(rows[0, -1]),
                checkpoint_every=run.recipe.train.checkpoint_every,
            )
            operators = trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=_OPERATORS)
            path = folder / f"steps-{last_timed - self._steps + 1}-{last_timed}.txt"
            path.write_text(
                f"{text}\nOperators of rank 0 in the {self._steps} steps after these, traced\n{operators}\n"
            )
            run.log.event("profile", {"written": str(path.relative_to(run.out)), **_shares(spent[0])})

    def _about(self) -> str:
        world = self._run.world
        kind = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
        ranks = "1 process" if world.size == 1 else f"{world.size} ranks"
        return f"{self._run.recipe.model.name}, batch {self._run.recipe.train.batch_size}, {ranks}, {kind}"


@contextmanager
def profiling(run: Run) -> Iterator[NoProfile]:
    """What `fit` tells its phases to; a profile where the recipe asks for one and enough steps are left."""
    steps = run.recipe.watch.profile
    left, needed = run.recipe.train.steps - run.step, _WARM_UP + 2 * steps
    if steps == 0 or left < needed:
        if steps and left and run.world.is_main:
            run.log.event("warning", {"profile": f"takes {needed} steps, {left} are left; nothing is profiled"})
        yield NoProfile()
        return
    profile = Profile(run, steps=steps)
    try:
        yield profile
    finally:
        profile.close()


def slowest_rank(spent: Sequence[Mapping[str, float]]) -> int:
    """The rank that the others wait for: with most time in what it does by itself."""
    own = [sum(seconds for phase, seconds in row.items() if phase not in (EXCHANGE, REDUCE)) for row in spent]
    return own.index(max(own))


def told(
    spent: Sequence[Mapping[str, float]],
    *,
    slowest: int,
    first: int,
    last: int,
    about: str,
    unwatched_s: float,
    checkpoints: int,
    checkpoint_every: int,
) -> str:
    """The text of a profile: each phase of rank 0 and of the slowest rank, in ms a step and percent.

    Args:
        spent: seconds of each phase over all timed steps, of each rank.
        slowest: rank.
        first: timed step.
        last: timed step.
        about: network, batch, ranks, device.
        unwatched_s: median of the steps before, which nothing was done to.
        checkpoints: how many were taken among the timed steps.
        checkpoint_every: steps.
    """
    steps = last - first + 1
    ranks = list(dict.fromkeys([0, slowest]))
    names = [f"rank {rank}{' (slowest)' if rank == slowest else ''}" for rank in ranks]
    lines = [
        f"Where a step goes: steps {first} to {last}; {about}",
        *([] if len(spent) == 1 else [" " * 16 + "".join(f"{name:>24}" for name in names)]),
        " " * 16 + f"{'ms':>16}{'%':>8}" * len(ranks),
    ]
    for phase in PHASES:
        if any(spent[rank][phase] > 0 for rank in ranks):
            lines.append(f"{phase:16}" + "".join(_cells(spent[rank][phase], spent[rank], steps) for rank in ranks))
    lines.append(f"{'a step':16}" + "".join(_cells(sum(spent[rank].values()), spent[rank], steps) for rank in ranks))
    lines += ["", f"Steps before these, without the profiler's hooks: median {1000 * unwatched_s:.1f} ms."]
    if len(spent) > 1:
        lines.append(
            "all-reduce: what backward could not hide, from the last gradient to its end (with what DDP copies then; under "
            "FSDP it is not told apart from backward). exchange: one message a step, and with it the wait for slower ranks."
        )
    if checkpoints:
        took = spent[0][CHECKPOINT] / checkpoints
        usual = (sum(spent[0].values()) - spent[0][CHECKPOINT]) / steps * checkpoint_every
        lines.append(
            f"{checkpoints} checkpoint(s) fell among these steps, {took:.2f} s each; one every {checkpoint_every} steps is "
            f"{100 * took / (took + usual):.1f} % of a run's time."
        )
    else:
        lines.append(f"No checkpoint fell among these steps; the recipe takes one every {checkpoint_every}.")
    return "\n".join(lines) + "\n"


def _cells(seconds: float, row: Mapping[str, float], steps: int) -> str:
    return f"{1000 * seconds / steps:16.2f}{100 * seconds / sum(row.values()):8.1f}"


def _shares(row: Mapping[str, float]) -> dict[str, float]:
    """Percent by phase, for the log."""
    total = sum(row.values())
    return {
        phase.replace(" ", "_").replace("-", "_"): round(100 * seconds / total, 2) for phase, seconds in row.items()
    }


def _after_gradient(parameter: Tensor, note: Callable[[Tensor], None]) -> "RemovableHandle":
    hook: RemovableHandle = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    return hook


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Tensors in what a network gives: alone, in lists and tables, or in fields."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for item in outputs.values():
            yield from _tensors(item)
    elif isinstance(outputs, list | tuple):
        for item in outputs:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(outputs):
        for one in dataclasses.fields(outputs):
            yield from _tensors(getattr(outputs, one.name))
