"""Where a run begins: with its own newest whole checkpoint, with other weights, or anew; and how it is saved."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmristream.errors import ConflictError, ResumeError, UsageError
from fmristream.storage.urls import display_url
from train import build
from train.averaging import Ema
from train.beyond.facts import data_facts
from train.checkpoint import Stored, gather_rng, newest_verified, restore_rng
from train.checkpoint_async import Saver, gather_texts, shared_token, together
from train.checkpoint_manifest import read_manifest
from train.checkpoint_shelf import Shelf, open_shelf
from train.checkpoint_writing import Keep, take
from train.config import Recipe, as_tables
from train.data import Part
from train.fence import Fence, take_over
from train.launch import World
from train.leaks import audit_start
from train.log import Log, newest_attempt
from train.objectives import Objective
from train.optim import optimizer_tensors, restore_optimizer
from train.state import Run
from train.tasks import Supervised

# What decides how steps are taken and has no say in what is scored; beside the sections `optim` and `start`.
_OF_TRAINING = ("train.batch_size", "train.accumulate", "train.clip", "train.parallel")


def begin(run: Run) -> None:
    """Begin with another run's weights, where the recipe says so."""
    begun = build.begin(run.recipe, run.model)
    if begun is None:
        return
    origin = begun.origin
    which = {} if origin is None else {"checkpoint": origin.name, "weights": origin.which}
    if run.world.is_main:
        facts = {"from": display_url(run.recipe.start.from_), "tensors": begun.tensors, "left_out": len(begun.ignored)}
        run.log.event("begin", facts | which)
    audit_start(run, None if origin is None else origin.state)


def checkpoints_of(recipe: Recipe, out: Path) -> str:
    """Where a run keeps its checkpoints: a folder or a URL."""
    return recipe.train.checkpoints or str(out / "checkpoints")


def make_saver(recipe: Recipe, *, out: Path, world: World) -> Saver:
    """What writes a run's checkpoints."""
    keep = Keep(last=recipe.train.keep_last, best=recipe.train.keep_best)
    return Saver(checkpoints_of(recipe, out), world, keep=keep)


def find_newest(recipe: Recipe, *, out: Path, world: World, log: Log) -> Stored | None:
    """The newest whole checkpoint, the same on every rank; None where there is none. Damaged ones are logged.

    Raises:
        StorageError: the store cannot be reached, or another rank does not find there what rank 0 does.
    """
    shelf = open_shelf(checkpoints_of(recipe, out))
    what = f"{shelf.where}: looking for the newest checkpoint"
    found, damaged = together(lambda: newest_verified(shelf) if world.is_main else (None, []), world, what=what)
    for fault in damaged:
        log.event("damaged", {"checkpoint": fault.folder.name, "reason": fault.reason})
    chosen = gather_texts(f"{found.name} {found.manifest.digest}" if found else "", world)[0]
    if not chosen:
        return None
    return together(lambda: found or _the_same(shelf, chosen), world, what=what)


def _the_same(shelf: Shelf, chosen: str) -> Stored:
    name, _, digest = chosen.partition(" ")
    found = Stored(shelf.folder(name))
    if found.manifest.digest != digest:
        raise ResumeError(f"{found.where}: is another checkpoint here than on rank 0; all ranks must see one place")
    return found


def resume(run: Run) -> Stored | None:
    """Go back to the place and the weights of the newest whole checkpoint, on any number of ranks; None where there is none.

    `resume_rest` follows, when the model is spread over the ranks and has its optimiser.

    Raises:
        ResumeError: it was made by another network, for another objective, or from other data.
        StorageError: the store, or another rank, fails.
    """
    if run.world.is_main:
        run.saver.seen = run.saver.shelf.steps()
    found = find_newest(run.recipe, out=run.out, world=run.world, log=run.log)
    if found is None:
        return None
    restore_place(found, run.train)
    restore_weights(found, run.model, world=run.world)
    _require_objective(run, found)
    run.step = found.step
    run.look_is_due = found.state.get("look_is_due", False)
    changed = changes(found.state["recipe"], as_tables(run.recipe)) | _other_version(found, run.train)
    if run.world.is_main and changed:
        run.log.event("changed", changed)
    return found


def require_as_trained(run: Run, found: Stored) -> None:
    """Of a run that is over: a recipe that would have trained otherwise describes what never happened.

    Raises:
        UsageError: it would have.
    """
    told = changes(found.state["recipe"], as_tables(run.recipe))
    otherwise = {
        name: how for name, how in told.items() if name in _OF_TRAINING or name.startswith(("optim.", "start."))
    }
    if otherwise:
        listed = ", ".join(f"{name} {how}" for name, how in otherwise.items())
        raise UsageError(
            f"{run.out}: its {run.step} steps are done, and were taken otherwise than this recipe says ({listed}); give the "
            "recipe of then, more train.steps, or another --out"
        )


def begin_attempt(run: Run, found: Stored | None) -> None:
    """Take over from the attempts before, which are over or believed to be; all ranks call it together, ready to train.

    Only an attempt that has all it needs does so: one whose recipe is refused disturbs nobody.

    Raises:
        SupersededError: this run was taken over by another job while it was started again.
        ConflictError: an attempt that is alive wrote a checkpoint since this one looked for the newest.
    """
    shelf, log = run.saver.shelf, run.out / "log.jsonl"

    def take() -> Fence | None:
        if not run.world.is_main:
            return None
        is_as_found = found is None or read_manifest(shelf.folder(found.name)).digest == found.manifest.digest
        if shelf.steps() != run.saver.seen or not is_as_found:
            raise ConflictError(
                f"{shelf.where}: another attempt at this run wrote there while this one was starting, so it is alive; end it, "
                "or give the same command again to go on in its place"
            )
        return take_over(
            shelf, step=run.step, newer_than=[newest_attempt(log), found.manifest.attempt if found else ""]
        )

    run.saver.begin(together(take, run.world, what=f"{shelf.where}: beginning"))
    if run.saver.fence is not None:
        run.log.attempt = run.saver.fence.attempt.id


def restore_place(found: Stored, part: Part) -> None:
    """Go on in the data where a checkpoint was made; ResumeError where that was other data."""
    part.loader.load_state_dict(found.state["loader"])


def restore_weights(found: Stored, model: nn.Module, *, world: World) -> None:
    """Put a checkpoint's weights into a network, which may be sharded by now or not yet.

    Raises:
        ResumeError: they are another network's.
    """
    current = model.state_dict()
    weights = _section(found, "model", world, current.get)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ResumeError(
            f"{found.where}: was made by another network than the recipe's; give another --out, or the recipe of then: "
            f"{build.shortened(error)}"
        ) from error
    if wrong := build.differing(found.state.get("network", {}), build.unseen_options(model)):
        raise ResumeError(f"{found.where}: was trained with another {wrong}; give another --out, or the recipe of then")


def resume_rest(run: Run, found: Stored) -> None:
    """Put back the optimiser, what else the run keeps, and the random states.

    Raises:
        ResumeError: they belong to another network.
    """
    parameters = dict(run.model.named_parameters())
    tensors = _section(found, "optimizer", run.world, lambda key: parameters.get(key.partition("/")[2]))
    restore_optimizer(run.model, run.optimizer, tensors)
    _restore_extra(run, found)
    restore_rng(_section(found, "rng", run.world), run.world)


def go_to(run: Run, step: int) -> None:
    """Give the model the weights of a checkpoint of this run, their average with them, and nothing else.

    Raises:
        CorruptDataError: it is damaged.
        StorageError: it cannot be read, on whichever rank.
    """
    settle(run)
    found = together(
        lambda: Stored(run.saver.shelf.folder(f"step-{step}")),
        run.world,
        what=f"{run.saver.shelf.where}: reading step {step}",
    )
    restore_weights(found, run.model, world=run.world)
    _restore_kept(run, found, ["ema"])
    if run.ema is not None and "ema" not in found.state.get("extra", {}):
        # Of a time when the recipe had none: the mean of later weights is not that of these.
        run.extra["ema"] = Ema(run.model, decay=run.ema.decay)


def _section(
    found: Stored, name: str, world: World, like: Callable[[str], torch.Tensor | None] = lambda key: None
) -> dict[str, torch.Tensor]:
    return together(lambda: found.section(name, like), world, what=f"{found.where}: reading {name}")


def _restore_extra(run: Run, found: Stored) -> None:
    kept = found.state.get("extra", {})
    _restore_kept(run, found, run.extra)
    differ = {
        **{name: "is new: the checkpoint has none" for name in run.extra if name not in kept},
        **{name: "of the checkpoint is left: the recipe has none" for name in kept if name not in run.extra},
    }
    if differ:
        run.log.event("kept", differ)


def _restore_kept(run: Run, found: Stored, names: Iterable[str]) -> None:
    """Put back what a checkpoint keeps under these names, and the run keeps, too."""
    kept = found.state.get("extra", {})
    for name in names:
        if name in run.extra and name in kept:
            keeper = run.extra[name]
            stored = _section(found, name, run.world, keeper.tensors().get) if name in found.sections else {}
            keeper.restore(stored, kept[name])


def _require_objective(run: Run, found: Stored) -> None:
    saved, now = found.state["objective"], run.task.state()
    if isinstance(run.task, Supervised) and saved.get("kind") == now["kind"]:
        saved = objective_state(saved, now)
    if saved != as_json(now):
        raise ResumeError(
            f"{found.where}: was trained for {saved}, the recipe and the data now say {now}; "
            "give another --out, or the recipe and the participants table of then"
        )


def save(run: Run, *, is_best: bool = False) -> None:
    """Begin to write a checkpoint; all ranks call it together, between two steps.

    What the run is goes into memory here, so training goes on at once; one that is still being written is waited for first.

    Args:
        run: as it stands.
        is_best: keep it beside the newest ones, in place of the best one until now.

    Raises:
        StorageError: the checkpoint before could not be written, on whichever rank.
    """
    saver, world = run.saver, run.world
    run.log.flush_to_disk()  # a checkpoint must not know of steps that the log forgets with its machine
    saver.settle()
    if saver.saved_step == run.step:
        if is_best:
            saver.mark_best()
        return
    token = shared_token(world)
    sections = {
        "model": run.model.state_dict(),
        "optimizer": optimizer_tensors(run.model, run.optimizer),
        "rng": gather_rng(world),
        **{name: tensors for name, keeper in run.extra.items() if (tensors := keeper.tensors())},
    }
    saver.start(
        take(sections, _state_of(run), step=run.step, token=token, rank=world.rank, ranks=world.size, is_best=is_best)
    )
    if not run.recipe.train.checkpoint_async:
        saver.settle()


def settle(run: Run) -> None:
    """Wait for the checkpoint that is being written; all ranks call it together.

    Raises:
        StorageError: it could not be written, on whichever rank.
    """
    run.saver.settle()


def _state_of(run: Run) -> dict[str, Any]:
    """What is no tensor. The schedule needs nothing: the learning rate is a function of the step."""
    clips = run.train.clips
    return {
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
        "look_is_due": run.look_is_due,
        "world_size": run.world.size,
        "torch": torch.__version__,
        "extra": {name: as_json(keeper.facts()) for name, keeper in run.extra.items()},
    }


def as_json(state: Mapping[str, Any]) -> Any:
    """The same as a checkpoint gives it back."""
    return json.loads(json.dumps(state))


def objective_state(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
    """A target's state as it is written now: those of the first releases lack what has a default."""
    default = as_json(Objective(kind="regression", target="").state())
    return {name: value for name, value in default.items() if name in now} | dict(saved)


def _other_version(found: Stored, part: Part) -> dict[str, str]:
    """Whether the dataset is of another version by now: its runs are the same, labels of subjects may not be."""
    before, now = found.state["dataset"].get("generation_digest"), part.clips.generation_digest
    return {} if before in (None, now) else {"dataset.generation_digest": f"{before[:12]} -> {now[:12]}"}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What a resumed run does otherwise; what recipes of then could not say, they meant by default."""
    default = as_tables(Recipe())
    del default["data"]["target"]  # always said by who has one
    before = {section: {**values, **before.get(section, {})} for section, values in default.items()}
    names = {(section, key) for recipe in (before, now) for section, values in recipe.items() for key in values}
    pairs = {
        f"{section}.{key}": (before.get(section, {}).get(key), now.get(section, {}).get(key)) for section, key in names
    }
    return {name: f"{old} -> {new}" for name, (old, new) in sorted(pairs.items()) if old != new}
