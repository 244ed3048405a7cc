"""A run, read from top to bottom: batch, device, loss, step, log; a checkpoint now and then; a score at the end."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from train import build, evaluate
from train.config import Recipe, as_toml
from train.data import Part, augmentation, open_part, open_parts, signal_of
from train.evaluate import Subjects, Windows
from train.extras import fit_extras
from train.launch import StopRequest, World, spread, stop_on_sigterm
from train.objectives import Objective, make_objective, require_known_classes
from train.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from train.report import open_log
from train.resuming import begin, resume, save
from train.state import Outcome, Run, StepFacts
from train.steps import backward, exchange, weighted_backward
from train.tasks import Supervised, UnscoredTask

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch

__all__ = ["Outcome", "Run", "StopRequest", "fit", "open_part", "start", "train", "weighted_backward"]


def train(recipe: Recipe, *, out: Path, world: World) -> Outcome | None:
    """Train from the newest whole checkpoint in `out`, or from the start; None where a signal stopped it early.

    Raises:
        FmriStreamError: the data, the recipe or a loss does not allow to go on.
    """
    with ExitStack() as stack:
        run = start(recipe, out=out, world=world, stack=stack)
        stop = stack.enter_context(stop_on_sigterm(world.stop))
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
            run.log.event("stop", {"step": run.step})
            return False
    return True


def endless(part: Part) -> Iterator["Batch"]:
    """One epoch after another, from where the loader stands."""
    while True:
        yield from part.loader


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
