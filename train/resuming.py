"""Where a run begins: with its own newest whole checkpoint, with other weights, or anew; and how it is saved."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from fmristream.errors import ResumeError
from train import build
from train.beyond.facts import data_facts
from train.checkpoint import Checkpoint, gather_rng, load_checkpoint, newest_whole, restore_rng, save_checkpoint
from train.config import Recipe, as_tables
from train.objectives import Objective
from train.optim import optimizer_tensors, restore_optimizer
from train.state import Run
from train.tasks import Supervised


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
        "data": data_facts(clips, frames=max(part.clips.window for part in (run.train, run.val, run.test) if part)),
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
