"""A run, read from top to bottom: batch, device, loss, step, log; a checkpoint now and then; a score at the end."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fmristream.errors import ResumeError, UsageError
from train import evaluate
from train.checkpoint import Checkpoint, gather_rng, load_checkpoint, newest_whole, restore_rng, save_checkpoint
from train.config import Recipe, as_tables, as_toml
from train.evaluate import NonFiniteError, Part, Subjects
from train.launch import StopRequest, World, spread, stop_on_sigterm
from train.objectives import Objective, make_objective
from train.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from train.report import Log, open_log

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch


@dataclass(kw_only=True)
class Run:
    """What changes while training, and what it is made of."""

    recipe: Recipe
    out: Path
    world: World
    train: Part
    val: Part | None
    test: Part | None
    objective: Objective
    model: nn.Module
    network: nn.Module  # the model, or the model in DDP
    optimizer: torch.optim.Optimizer
    log: Log
    step: int = 0  # optimiser steps done

    @property
    def bf16(self) -> bool:
        precision = self.recipe.train.precision
        return precision == "bf16" or (precision == "auto" and self.world.device.type == "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a finished run: its scores by subject."""

    step: int
    objective: Objective
    val: Subjects | None
    test: Subjects | None


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
            objective=run.objective,
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
    batch = packed.to(run.world.device)
    with torch.autocast(run.world.device.type, dtype=torch.bfloat16, enabled=run.bf16):
        outputs = run.network(batch.bold)
    losses = run.objective.losses(outputs, batch.targets[run.objective.target])
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
        row[3 : 3 + len(batch.window)] = batch.window.double()  # exact below 2^53
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


def refuse(run: Run, batch: "Batch", *, finite: bool, loss: float, norm: float) -> None:
    """Name the windows that a non-finite loss or gradient came from."""
    mine = torch.stack([batch.window.cpu(), torch.full_like(batch.window.cpu(), int(finite))], dim=1)
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
    """Score the validation subjects on the way; nothing is chosen by it."""
    subjects = score(run, part)
    if run.world.is_main and subjects.label:
        numbers = evaluate.measure(subjects, objective=run.objective, threshold=0.0)
        run.log.event("eval", {"step": run.step, "split": run.recipe.data.val_split, **numbers})


def score(run: Run, part: Part) -> Subjects:
    """Every subject of a split, from every window."""
    predictions = evaluate.predict(run.model, part, objective=run.objective, world=run.world, bf16=run.bf16)
    return evaluate.by_subject(predictions, objective=run.objective, runs=part.clips.runs)


def start(recipe: Recipe, *, out: Path, world: World, stack: ExitStack) -> Run:
    """Open the data, make the network, and go back to the newest whole checkpoint."""
    data = recipe.data
    parts = {
        name: open_part(
            recipe, split=split, seed=recipe.train.seed if name == "train" else None, world=world, stack=stack
        )
        for name, split in (("train", data.train_split), ("val", data.val_split), ("test", data.test_split))
        if split
    }
    clips = parts["train"].clips
    objective = make_objective(
        recipe.objective.kind,
        data.target,
        labels=clips.target_labels[data.target],
        train_values=np.array(clips.target_values[data.target], dtype=np.float64),
    )
    torch.manual_seed(recipe.train.seed)  # the same weights on every rank
    model = make_model(recipe, grid=clips.grid, outputs=objective.outputs).to(world.device)
    torch.manual_seed(recipe.train.seed + 1 + world.rank)  # but each rank its own dropout
    run = Run(
        recipe=recipe,
        out=out,
        world=world,
        train=parts["train"],
        val=parts.get("val"),
        test=parts.get("test"),
        objective=objective,
        model=model,
        network=model,
        optimizer=make_optimizer(model, recipe.optim),
        log=stack.enter_context(open_log(out / "log.jsonl", enabled=world.is_main)),
    )
    resumed_from = resume(run)
    run.network = spread(model, world)
    if world.is_main:
        (out / "recipe.toml").write_text(as_toml(recipe), encoding="utf-8")
        facts = {"step": run.step, "resumed_from": resumed_from, "world_size": world.size, "device": str(world.device)}
        run.log.event("start", facts)
    return run


def open_part(recipe: Recipe, *, split: str, seed: int | None, world: World, stack: ExitStack) -> Part:
    """One split: with a seed in the order of training, else every window once in stored order."""
    from fmristream import StreamingDataset, StreamingLoader

    data, training = recipe.data, seed is not None
    clips = StreamingDataset(
        data.url,
        window=data.window,
        stride=data.stride if training or recipe.eval.stride is None else recipe.eval.stride,
        split=split,
        seed=seed,
        normalize=data.normalize,
        targets=(data.target,),
        grid=data.grid,
    )
    loader = StreamingLoader(
        clips,
        batch_size=recipe.train.batch_size if training else recipe.eval.batch_size or recipe.train.batch_size,
        rank=world.rank,
        world_size=world.size,
        threads=data.threads,
        prefetch_batches=data.prefetch_batches,
    )
    stack.callback(loader.close)
    return Part(clips=clips, loader=loader)


def check_model(recipe: Recipe) -> None:
    """Raise UsageError for model options that do not fit; without a grid in the recipe only the data can tell."""
    if recipe.data.grid is not None:
        with torch.device("meta"):
            make_model(recipe, grid=recipe.data.grid, outputs=1)


def make_model(recipe: Recipe, *, grid: tuple[int, int, int], outputs: int) -> nn.Module:
    """The network for the grid and window that the data have."""
    from train.models import build_model

    given = {"img_size": (*grid, recipe.data.window), "outputs": outputs}
    for name in given:
        if name in recipe.model.options:
            raise UsageError(f"model.{name} follows from the data and the objective; leave it out of the recipe")
    return build_model(recipe.model.name, {**recipe.model.options, **given})


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
    restore_optimizer(run.model, run.optimizer, dict(checkpoint.optimizer))
    restore_rng(checkpoint.rng, run.world)
    saved = Objective(**checkpoint.state["objective"])
    if saved != run.objective:
        raise ResumeError(
            f"{folder / name}: was trained for {saved}, the recipe and the data now say {run.objective}; "
            "give another --out, or the recipe and the participants table of then"
        )
    run.step = step
    if run.world.is_main and (changed := changes(checkpoint.state["recipe"], as_tables(run.recipe))):
        run.log.event("changed", changed)
    return name


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What a resumed run does otherwise than the one it goes on from."""
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
        "objective": dataclasses.asdict(run.objective),
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
