"""A run, read from top to bottom: batch, device, loss, step, log; a checkpoint now and then; a score at the end."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fmristream.errors import UsageError
from train import build
from train.averaging import Ema
from train.checkpoint_async import together
from train.config import Recipe, as_toml
from train.data import Part, augmentation, open_part, open_parts, signal_of, unreachable
from train.extras import fit_extras
from train.launch import AskedToStop, StopRequest, World, stop_on_sigterm
from train.leaks import audit_run
from train.log import last_logged_step, open_log
from train.optim import learning_rate, make_optimizer, set_learning_rate
from train.parallel import spread
from train.profiling import CHECKPOINT, COPY, LOG, OPTIMISER, VALIDATION, NoProfile, profiling
from train.provenance import note_start
from train.resuming import (
    begin,
    begin_attempt,
    go_to,
    make_saver,
    require_as_trained,
    resume,
    resume_rest,
    save,
    settle,
)
from train.scaling import LossScale
from train.scoring import look, outcome_of, score
from train.state import Keeper, Outcome, Run, StepFacts
from train.steps import require_batch, require_divisible, take_gradients, take_step, weighted_backward
from train.stopping import make_best, uses_best
from train.targets import num_outputs, objectives_of
from train.trackers import open_trackers, require_trackers

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch

__all__ = ["Outcome", "Run", "StopRequest", "fit", "open_part", "score", "start", "train", "weighted_backward"]


def train(recipe: Recipe, *, out: Path, world: World) -> Outcome | None:
    """Train from the newest whole checkpoint in `out`, or from the start; None where a signal stopped it early.

    Raises:
        FmriStreamError: the data, the recipe or a loss does not allow to go on.
    """
    with ExitStack() as stack:
        run = start(recipe, out=out, world=world, stack=stack)
        stop = stack.enter_context(stop_on_sigterm(world.stop))
        began_at = run.step
        if not fit(run, stop):
            return None
        try:
            with weights_to_score(run) as step:
                outcome = outcome_of(run, step=step, was_finished=run.step == began_at)
        except AskedToStop:  # the checkpoint of the last step is there
            run.log.event("stop", {"step": run.step})
            return None
        run.saver.require_current()  # whoever took over meanwhile writes the report
        return outcome


def fit(run: Run, stop: StopRequest) -> bool:
    """Take the steps that are left, or fewer where patience ends; False where a signal asked to stop, after a checkpoint."""
    with profiling(run) as profile:
        return take_steps(run, stop, profile)


def take_steps(run: Run, stop: StopRequest, profile: NoProfile) -> bool:
    """As `fit`, which says to the profile what each moment is spent on."""
    plan = run.recipe.train
    batches = endless(run.train)
    if run.look_is_due:
        is_best = look_if_due(run, profile)
        if not run.look_is_due and (is_best or is_over(run)):
            save(run, is_best=is_best)
            settle(run)
    while not (run.look_is_due or is_over(run)):
        asked, epoch = time.perf_counter(), run.train.loader.epoch
        batch = next(batches)
        waited = time.perf_counter() - asked
        profile.mark(COPY)
        rate = learning_rate(run.step, config=run.recipe.optim, total_steps=plan.steps)
        set_learning_rate(run.optimizer, rate)
        stopping = stop.is_asked or run.saver.has_failed
        facts = take_gradients(run, batch, waited_s=waited, stopping=stopping, profile=profile)
        profile.mark(OPTIMISER)
        take_step(run)
        profile.mark(LOG)
        note(run, batch, facts, epoch=epoch, rate=rate, seconds=time.perf_counter() - asked)
        del batch  # its memory is another one's before the next is asked for
        is_best = look_if_due(run, profile)
        is_last = is_over(run) or facts.stopping or run.look_is_due
        if is_last or is_best or run.step % plan.checkpoint_every == 0:
            profile.mark(CHECKPOINT)
            save(run, is_best=is_best)  # raises where the one before could not be written
        if is_last:
            settle(run)
        profile.end_step()
        if is_last:
            break
    if is_over(run) and not run.look_is_due:
        return True
    stop.is_asked = True  # wherever the signal came
    run.log.event("stop", {"step": run.step})
    return False


def is_over(run: Run) -> bool:
    """Whether no step is left, or nothing better is to be expected."""
    return run.step >= run.recipe.train.steps or (run.best is not None and run.best.is_over)


def look_if_due(run: Run, profile: NoProfile) -> bool:
    """Look at validation now and then, and after the last step where looks decide; whether these weights are the best.

    A look that a signal breaks off stays due: the run goes on with it, and decides as it would have.
    """
    every, best = run.recipe.train.eval_every, run.best
    is_end = best is not None and run.step >= run.recipe.train.steps
    run.look_is_due = run.val is not None and every > 0 and (run.step % every == 0 or is_end)
    if run.val is None or not run.look_is_due:
        return False
    profile.mark(VALIDATION)
    try:
        with averaged(run):
            numbers = look(run, run.val)
    except AskedToStop:
        return False
    run.look_is_due = False
    if best is None:
        return False
    is_best = best.see(numbers, step=run.step)
    if best.is_over and run.world.is_main:
        run.log.event("patience", {"step": run.step, "metric": best.metric, "best": best.value, "at": best.step})
    return is_best


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The model with the mean of its weights, where the run keeps one."""
    with run.ema.in_place() if run.ema is not None else nullcontext():
        yield


@contextmanager
def weights_to_score(run: Run) -> Iterator[int]:
    """The model as the end of the run scores it: at its best look or as it is, averaged where the run averages; of which step.

    Raises:
        CorruptDataError: the best checkpoint is damaged.
        UsageError: no look told which is the best, because the run was over before looks decided by this metric.
    """
    step = run.step
    if run.best is not None and uses_best(run.recipe):
        if not run.best.step:
            raise UsageError(
                f"eval.use = 'best': no look of this run was compared by {run.best.metric!r}, which it was over without; set "
                "eval.use = 'last', the eval.metric of then, or more train.steps"
            )
        step = run.best.step
        go_to(run, step)
        if run.world.is_main:
            run.log.event("best", {"step": run.best.step, run.best.metric: run.best.value})
    with averaged(run):
        yield step


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
            "frames": frames_in(batch, run.world),
            **fetched(run.train),
            "windows": facts.windows,
            **({} if run.loss_scale is None else {"loss_scale": run.loss_scale.value}),
        },
        total=run.recipe.train.steps,
        show_every=run.recipe.train.log_every,
    )


def frames_in(batch: "Batch", world: World) -> int | None:
    """Frames of the global batch, each view's; None where runs differ in length and other ranks alone know theirs."""
    if batch.lengths is None:
        return batch.global_size * batch.views * batch.signal.shape[2]
    return int(batch.lengths.sum()) if world.size == 1 else None


def fetched(part: Part) -> dict[str, int]:
    """Bytes that this rank's loader has fetched from a store so far; nothing where files are read in place."""
    counts = part.loader.counts
    return {} if counts is None else {"fetched_bytes": counts.bytes_fetched}


def start(recipe: Recipe, *, out: Path, world: World, stack: ExitStack) -> Run:
    """Open the data, make the network, and go back to the newest whole checkpoint."""
    require_trackers(recipe)
    parts = open_parts(recipe, out=out, world=world, stack=stack)
    signal, objectives = signal_of(parts), objectives_of(recipe, parts)
    extras = fit_extras(parts["train"].clips, columns=recipe.data.columns, out=out, world=world)
    torch.manual_seed(recipe.train.seed)  # the same weights on every rank
    model = build.make_model(recipe, signal, outputs=num_outputs(objectives), extras=extras).to(world.device)
    require_divisible(recipe, model)
    task = build.make_task(recipe, model=model, signal=signal, objectives=objectives, extras=extras)
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
        saver=stack.enter_context(make_saver(recipe, out=out, world=world)),
        augment=augmentation(recipe),
    )
    audit_run(run)
    seen = last_logged_step(out / "log.jsonl") if world.is_main else 0
    checkpoint = resume(run)
    if checkpoint is None:
        require_batch(recipe, run.train.clips.num_windows)
        begin(run)
    run.network = spread(model, world, recipe.train)
    run.optimizer = make_optimizer(model, recipe.optim)  # of the parameters as they are now
    run.extra |= keepers(run)
    if checkpoint is not None:
        resume_rest(run, checkpoint)
        if is_over(run) and not run.look_is_due:
            require_as_trained(run, checkpoint)
    begin_attempt(run, checkpoint)
    resumed_from = None if checkpoint is None else f"step-{checkpoint.step}"
    note_start(run, resumed_from=resumed_from)
    if world.is_main:
        (out / "recipe.toml").write_text(as_toml(recipe), encoding="utf-8")
        facts = {"step": run.step, "resumed_from": resumed_from, "world_size": world.size, "device": str(world.device)}
        run.log.event("start", facts)
        if run.look_is_due and seen == run.step:
            seen -= 1  # the look tells of this step
        open_trackers(recipe, out=out, done=run.step, seen=seen, log=run.log)
    if missing := together(lambda: unreachable(recipe) if world.is_main else {}, world, what="eval.urls"):
        run.log.event("eval.urls", missing)
    return run


def keepers(run: Run) -> dict[str, Keeper]:
    """What the recipe asks to be kept beside network and optimiser."""
    plan, found = run.recipe.train, dict[str, Keeper]()
    if plan.ema:
        found["ema"] = Ema(run.model, decay=plan.ema)
    if plan.precision == "fp16":
        found["scaler"] = LossScale()
    objectives = run.task.objectives
    classes = len(objectives[0].values) if objectives else 0
    if (best := make_best(run.recipe, classes=classes)) is not None:
        found["best"] = best
    return found
