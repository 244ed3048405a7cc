"""A run, read from top to bottom: batch, device, loss, step, log; a checkpoint now and then; a score at the end."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from fmristream.errors import ResumeError
from train import build, evaluate
from train.checkpoint import Checkpoint, gather_rng, load_checkpoint, newest_whole, restore_rng, save_checkpoint
from train.config import Recipe, as_tables, as_toml
from train.data import Part, augmentation, open_part, open_parts, signal_of
from train.evaluate import NonFiniteError, Subjects, Windows
from train.extras import fit_extras
from train.launch import StopRequest, World, spread, stop_on_sigterm
from train.objectives import Objective, make_objective, require_known_classes
from train.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from train.report import Log, open_log
from train.tasks import Supervised, Task, UnscoredTask

if TYPE_CHECKING:
    from fmristream.stream.augment import Compose
    from fmristream.stream.batch import Batch

__all__ = ["Outcome", "Run", "StopRequest", "fit", "open_part", "start", "train", "weighted_backward"]


@dataclass(kw_only=True)
class Run:
    """What changes while training, and what it is made of."""

    recipe: Recipe
    out: Path
    world: World
    train: Part
    val: Part | None
    test: Part | None
    task: Task
    model: nn.Module
    network: nn.Module  # the model, or the model in DDP
    optimizer: torch.optim.Optimizer
    log: Log
    augment: "Compose | None" = None
    step: int = 0  # optimiser steps done

    @property
    def bf16(self) -> bool:
        precision = self.recipe.train.precision
        return precision == "bf16" or (precision == "auto" and self.world.device.type == "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a finished run: its scores by subject, or by window where there is no target."""

    step: int
    task: Task
    val: Subjects | Windows | None
    test: Subjects | Windows | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What all ranks know of a step before it is taken."""

    loss: float  # of the global batch
    gradient_norm: float
    stopping: bool
    wait_s: float  # the longest that a rank waited for its batch
    windows: list[int]  # of the global batch, in order; empty where they are not logged


def train(recipe: Recipe, *, out: Path, world: World) -> Outcome | None:
    """Train from the newest whole checkpoint in `out`, or from the start; None where a signal stopped it early.

    Raises:
        FmriStreamError: the data, the recipe or a loss does not allow to go on.
    """
    with ExitStack() as stack:
        run = start(recipe, out=out, world=world, stack=stack)
        stop = stack.enter_context(stop_on_sigterm())
        if not fit(run, stop):
            return None
        return Outcome(
            step=run.step,
            task=run.task,
            val=score(run, run.val) if run.val else None,
            test=score(run, run.test) if run.test else None,
        )


def fit(run: Run, stop: StopRequest) -> bool:
    """Take the steps that are left; False where a signal asked to stop, after a checkpoint."""
    plan = run.recipe.train
    batches = endless(run.train)
    while run.step < plan.steps:
        asked, epoch = time.perf_counter(), run.train.loader.epoch
        batch = next(batches)
        waited = time.perf_counter() - asked
        rate = learning_rate(run.step, config=run.recipe.optim, total_steps=plan.steps)
        set_learning_rate(run.optimizer, rate)
        loss = backward(run, batch)
        norm = clip_gradients(run.model, max_norm=plan.clip)
        facts = exchange(run, batch, loss=loss, norm=norm, waited_s=waited, stopping=stop.is_asked)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        note(run, batch, facts, epoch=epoch, rate=rate, seconds=time.perf_counter() - asked)
        if run.val and plan.eval_every and run.step % plan.eval_every == 0:
            look(run, run.val)
        if run.step == plan.steps or run.step % plan.checkpoint_every == 0 or facts.stopping:
            save(run)
        if facts.stopping and run.step < plan.steps:
            stop.is_asked = True  # wherever the signal came
            return False
    return True


def endless(part: Part) -> Iterator["Batch"]:
    """One epoch after another, from where the loader stands."""
    while True:
        yield from part.loader


def backward(run: Run, packed: "Batch") -> torch.Tensor:
    """Add the global batch's gradients to the parameters; return this rank's part of its mean loss."""
    batch = packed.to(run.world.device, augment=run.augment)
    network = evaluate.under_autocast(run.network, device=run.world.device, bf16=run.bf16)
    losses = run.task.losses(network, batch)
    return weighted_backward(losses, global_size=batch.global_size, world=run.world)


def weighted_backward(losses: torch.Tensor, *, global_size: int, world: World) -> torch.Tensor:
    """Gradients of the mean over the global batch, whatever the ranks' shares of it.

    DDP takes the mean over ranks: each rank divides the sum of its losses by the global number, and undoes DDP's
    division by the number of ranks. Missing targets count as loss 0, so no rank needs to know the others' labels.
    """
    part = losses.sum() / global_size
    torch.autograd.backward(part * world.size)
    return part.detach()


def exchange(
    run: Run, batch: "Batch", *, loss: torch.Tensor, norm: torch.Tensor, waited_s: float, stopping: bool
) -> StepFacts:
    """One message from each rank to all before the step is taken.

    Raises:
        NonFiniteError: a loss or the gradient is not finite; every rank raises, and the weights are still good.
    """
    part, gradient_norm = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one wait for the device
    width = -(-batch.global_size // run.world.size) if run.recipe.train.log_windows else 0
    row = torch.full((3 + width,), -1.0, dtype=torch.float64)
    row[:3] = torch.tensor([part, waited_s, float(stopping)], dtype=torch.float64)
    if width:
        own = own_windows(batch)
        row[3 : 3 + len(own)] = own.double()  # exact below 2^53
    rows = run.world.stack(row)
    parts = rows[:, 0].tolist()
    total = math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan
    if not (math.isfinite(total) and math.isfinite(gradient_norm)):
        refuse(run, batch, finite=math.isfinite(part), loss=total, norm=gradient_norm)
    windows = rows[:, 3:].long().flatten()
    return StepFacts(
        loss=total,
        gradient_norm=gradient_norm,
        stopping=bool(rows[:, 2].any()),
        wait_s=float(rows[:, 1].max()),
        windows=windows[windows >= 0].tolist(),
    )


def own_windows(batch: "Batch") -> torch.Tensor:
    """Window numbers of this rank's samples, one for the views of each."""
    return batch.window[: len(batch) // batch.views].cpu()


def refuse(run: Run, batch: "Batch", *, finite: bool, loss: float, norm: float) -> None:
    """Name the windows that a non-finite loss or gradient came from."""
    own = own_windows(batch)
    mine = torch.stack([own, torch.full_like(own, int(finite))], dim=1)
    rows = run.world.gather(mine)
    guilty = rows[rows[:, 1] == 0] if bool((rows[:, 1] == 0).any()) else rows
    raise NonFiniteError(
        f"step {run.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}, the step is not taken; "
        f"windows {guilty[:, 0].tolist()} of split {run.recipe.data.train_split!r}; "
        f"look at them, or lower optim.lr and go on from the last checkpoint"
    )


def note(run: Run, batch: "Batch", facts: StepFacts, *, epoch: int, rate: float, seconds: float) -> None:
    """Put the step into the log."""
    run.log.step(
        {
            "step": run.step,
            "epoch": epoch,
            "position": batch.position,
            "loss": facts.loss,
            "lr": rate,
            "gradient_norm": facts.gradient_norm,
            "seconds": round(seconds, 6),
            "wait_s": round(facts.wait_s, 6),
            "windows": facts.windows,
        },
        total=run.recipe.train.steps,
        show_every=run.recipe.train.log_every,
    )


def look(run: Run, part: Part) -> None:
    """Score the validation windows on the way; nothing is chosen by it."""
    found = score(run, part)
    if isinstance(found, Windows):
        numbers = found.numbers
    else:
        assert isinstance(run.task, Supervised)
        if not found.label:
            return
        numbers = evaluate.measure(found, objective=run.task.objective, threshold=0.0)
    if run.world.is_main:
        run.log.event("eval", {"step": run.step, "split": run.recipe.data.val_split, **numbers})


def score(run: Run, part: Part) -> Subjects | Windows:
    """Every subject of a split from every window, or what the task says of all windows."""
    predictions = evaluate.predict(run.model, part, task=run.task, world=run.world, bf16=run.bf16)
    if isinstance(run.task, Supervised):
        return evaluate.by_subject(predictions, objective=run.task.objective, runs=part.clips.runs)
    return evaluate.over_windows(predictions, task=cast(UnscoredTask, run.task), runs=part.clips.runs)


def start(recipe: Recipe, *, out: Path, world: World, stack: ExitStack) -> Run:
    """Open the data, make the network, and go back to the newest whole checkpoint."""
    parts = open_parts(recipe, out=out, world=world, stack=stack)
    signal, objective = signal_of(parts), objective_of(recipe, parts)
    extras = fit_extras(parts["train"].clips, columns=recipe.data.columns, out=out, world=world)
    torch.manual_seed(recipe.train.seed)  # the same weights on every rank
    outputs = None if objective is None else objective.outputs
    model = build.make_model(recipe, signal, outputs=outputs, extras=extras).to(world.device)
    task = build.make_task(recipe, model=model, signal=signal, objective=objective, extras=extras)
    torch.manual_seed(recipe.train.seed + 1 + world.rank)  # but each rank its own dropout
    run = Run(
        recipe=recipe,
        out=out,
        world=world,
        train=parts["train"],
        val=parts.get("val"),
        test=parts.get("test"),
        task=task,
        model=model,
        network=model,
        optimizer=make_optimizer(model, recipe.optim),
        log=stack.enter_context(open_log(out / "log.jsonl", enabled=world.is_main)),
        augment=augmentation(recipe),
    )
    resumed_from = resume(run)
    if resumed_from is None:
        begin(run)
    run.network = spread(model, world)
    if world.is_main:
        (out / "recipe.toml").write_text(as_toml(recipe), encoding="utf-8")
        facts = {"step": run.step, "resumed_from": resumed_from, "world_size": world.size, "device": str(world.device)}
        run.log.event("start", facts)
    return run


def objective_of(recipe: Recipe, parts: Mapping[str, Part]) -> Objective | None:
    """The target, coded by the training subjects alone; None for objectives without one.

    Raises:
        UsageError: the column does not fit, or other subjects have classes that those of training lack.
    """
    kind, target = recipe.objective.kind, recipe.data.target
    if target is None or (kind != "classification" and kind != "regression"):
        return None
    values = {name: np.array(part.clips.target_values[target], dtype=np.float64) for name, part in parts.items()}
    objective = make_objective(
        kind,
        target,
        labels=parts["train"].clips.target_labels[target],
        train_values=values["train"],
        loss=recipe.objective.loss or "mse",
        huber_delta=recipe.objective.huber_delta or 1.0,
    )
    for name, known in values.items():
        require_known_classes(objective, known, split=name)
    return objective


def begin(run: Run) -> None:
    """Begin with another run's weights, where the recipe says so."""
    loaded = build.begin(run.recipe, run.model)
    if loaded is not None and run.world.is_main:
        facts = {"from": run.recipe.start.from_, "tensors": loaded.tensors, "left_out": len(loaded.ignored)}
        run.log.event("begin", facts)


def resume(run: Run) -> str | None:
    """Go back to the newest whole checkpoint, on any number of ranks; its name, or None where there is none.

    Raises:
        ResumeError: it was made by another network, or from other data.
    """
    folder = run.out / "checkpoints"
    found = None
    if run.world.is_main:
        found, damaged = newest_whole(folder)
        for fault in damaged:
            run.log.event("damaged", {"checkpoint": fault.folder.name, "reason": fault.reason})
    step = run.world.from_main(found.step if found else -1)
    if step < 0:
        return None
    name = f"step-{step}"
    checkpoint = found or load_checkpoint(folder / name)
    run.train.loader.load_state_dict(checkpoint.state["loader"])
    try:
        run.model.load_state_dict(dict(checkpoint.model))
    except RuntimeError as error:
        raise ResumeError(
            f"{folder / name}: was made by another network than the recipe's; give another --out: {error}"
        ) from error
    if wrong := build.differing(checkpoint.state.get("network", {}), build.unseen_options(run.model)):
        raise ResumeError(
            f"{folder / name}: was trained with another {wrong}; give another --out, or the recipe of then"
        )
    restore_optimizer(run.model, run.optimizer, dict(checkpoint.optimizer))
    restore_rng(checkpoint.rng, run.world)
    saved, now = checkpoint.state["objective"], run.task.state()
    if isinstance(run.task, Supervised) and saved.get("kind") == now["kind"]:
        saved = objective_state(saved, now)
    if saved != as_json(now):
        raise ResumeError(
            f"{folder / name}: was trained for {saved}, the recipe and the data now say {now}; "
            "give another --out, or the recipe and the participants table of then"
        )
    run.step = step
    if run.world.is_main and (changed := changes(checkpoint.state["recipe"], as_tables(run.recipe))):
        run.log.event("changed", changed)
    return name


def as_json(state: Mapping[str, Any]) -> Any:
    """The same as a checkpoint gives it back."""
    return json.loads(json.dumps(state))


def objective_state(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
    """A target's state as it is written now: those of the first releases lack what has a default."""
    default = as_json(Objective(kind="regression", target="").state())
    return {name: value for name, value in default.items() if name in now} | dict(saved)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What a resumed run does otherwise; what recipes of then could not say, they meant by default."""
    before = {section: {**values, **before.get(section, {})} for section, values in as_tables(Recipe()).items()}
    names = {(section, key) for recipe in (before, now) for section, values in recipe.items() for key in values}
    pairs = {
        f"{section}.{key}": (before.get(section, {}).get(key), now.get(section, {}).get(key)) for section, key in names
    }
    return {name: f"{old} -> {new}" for name, (old, new) in sorted(pairs.items()) if old != new}


def save(run: Run) -> None:
    """Write a checkpoint: every rank's random state, everything else from rank 0."""
    rng = gather_rng(run.world)
    if not run.world.is_main:
        return
    clips = run.train.clips
    state = {
        "loader": run.train.loader.state_dict(),
        "recipe": as_tables(run.recipe),
        "objective": as_json(run.task.state()),
        "network": build.unseen_options(run.model),
        "dataset": {
            "url": run.recipe.data.url,
            "content_digest": clips.content_digest,
            "generation_digest": clips.generation_digest,
            "selection_digest": clips.selection_digest,
        },
        "world_size": run.world.size,
        "torch": torch.__version__,
    }
    checkpoint = Checkpoint(
        step=run.step,
        model=run.model.state_dict(),
        optimizer=optimizer_tensors(run.model, run.optimizer),
        rng=rng,
        state=state,
    )
    save_checkpoint(run.out / "checkpoints", checkpoint, keep_last=run.recipe.train.keep_last)
