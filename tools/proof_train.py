"""One cell of the proof: a network trained by the trainer's own loop, scored on held-out subjects in order and shuffled."""

import contextlib
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmristream import StreamingDataset, StreamingLoader
from fmristream.errors import SpaceError, UsageError
from tools.proof_cells import INPUTS, MODELS, Cell, Settings, described, digest_of, recipe_of
from tools.proof_cohorts import Scores, dataset_of, read_scores
from tools.proof_inputs import Hook, channel_sds, scaled_by, shuffled_frames, static_mean
from train.config import Recipe
from train.evaluate import Subjects
from train.launch import World, stop_on_sigterm
from train.loop import Run, fit, score, start

# Losses of the last steps, whose mean says whether a network learned its training windows.
LAST_STEPS = 50


class NotThereError(Exception):
    """A network that this checkout doesn't have, or that refuses its options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a cell gave: scores of test subjects, and facts for the record."""

    scores: Scores
    facts: Mapping[str, Any]


def compute(cell: Cell, settings: Settings, *, out: Path) -> Done | None:
    """Train and score a cell; None where SIGTERM stopped it, after a checkpoint from which the next call goes on.

    Raises:
        NotThereError: there is no such network, or it cannot be built.
    """
    begun, begun_cpu = time.perf_counter(), time.process_time()
    if MODELS[cell.model].takes == "features":
        scores, num_train = read_scores(out, settings, cell.effect, cell.seed, cell.model)
        facts: dict[str, Any] = {"num_train": num_train}
    else:
        trained = _train(cell, settings, out=out)
        if trained is None:
            return None
        scores, facts = trained
    took = {"seconds": time.perf_counter() - begun, "core_s": time.process_time() - begun_cpu}
    return Done(scores=scores, facts=facts | {name: round(value, 1) for name, value in took.items()})


def _train(cell: Cell, settings: Settings, *, out: Path) -> tuple[Scores, dict[str, Any]] | None:
    recipe = recipe_of(cell, settings, url=dataset_of(out, settings, cell.effect, cell.seed))
    folder = out / "training" / f"{cell.key.replace('/', '_')}-{digest_of(described(cell, settings))}"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        screen = stack.enter_context((folder / "screen.txt").open("a"))
        stack.enter_context(contextlib.redirect_stdout(screen))
        stop = stack.enter_context(stop_on_sigterm())
        run = _started(recipe, folder, stack)
        change = _change(cell, recipe, run)
        if change is not None:
            run.network.register_forward_pre_hook(change)
        if not fit(run, stop):
            return None
        assert run.test is not None
        ordered = score(run, run.test)
        run.network.register_forward_pre_hook(shuffled_frames(cell.seed))
        shuffled = score(run, run.test)
        facts = {
            "num_train": len(set(run.train.clips.subjects)),
            "parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
            "last_loss": _last_loss(folder / "log.jsonl"),
        }
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return _scores(ordered, shuffled), facts


def _started(recipe: Recipe, folder: Path, stack: ExitStack) -> Run:
    try:
        return start(recipe, out=folder, world=World(), stack=stack)
    except (SpaceError, UsageError) as error:
        raise NotThereError(str(error)) from error


def _change(cell: Cell, recipe: Recipe, run: Run) -> Hook | None:
    """What becomes of the input's channels; scales are of training windows alone."""
    change = INPUTS[cell.input].change
    if change == "static-mean":
        return static_mean
    if change != "scaled":
        return None
    data = recipe.data
    clips = StreamingDataset(data.url, window=data.window, split=data.train_split, normalize=data.normalize)
    with contextlib.closing(StreamingLoader(clips, batch_size=run.recipe.train.batch_size)) as loader:
        return scaled_by(channel_sds(batch.bold[batch.valid] for batch in loader))


def _last_loss(log: Path) -> float:
    from train.log import read_history

    return float(np.mean([step["loss"] for step in read_history(log).steps[-LAST_STEPS:]]))


def _scores(ordered: Subjects, shuffled: Subjects) -> Scores:
    assert ordered.label == shuffled.label
    return Scores(subject=ordered.label, truth=ordered.truth, score=ordered.score, shuffled=shuffled.score)


def one_thread() -> None:
    """Networks this small are fastest on one thread, and two cells may share the machine."""
    torch.set_num_threads(1)
