"""The command line of the trainer: a recipe, what to change in it, where to write."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmristream.errors import FmriStreamError, UsageError
from fmristream.storage.urls import display_url
from train.beyond.commands import asks_for_task, run_task
from train.config import Recipe, as_toml, load_recipe, recipe_path
from train.fence import SUPERSEDED, SupersededError
from train.launching import add_options, launched, positive

if TYPE_CHECKING:
    from train.launch import World
    from train.loop import Outcome

# How long the other ranks wait for the report, with the baselines that stand in it: a day.
_REPORTING_S = 86400.0

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130  # and 3: a newer attempt took over (train/fence.py)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say; the exit status is 0 (done, or stopped by SIGTERM after a checkpoint), 1, 2 or 3."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    out = None
    try:
        if asks_for_task(arguments):
            return run_task(arguments)
        options = _parser().parse_args(arguments)
        out = options.out
        profile = [] if options.profile is None else [f"watch.profile={options.profile}"]
        recipe = load_recipe(options.recipe, [*options.set, *profile])
        if options.check:
            from train.build import check_recipe

            check_recipe(recipe)
            print(as_toml(recipe), end="")
            return DONE
        if not recipe.data.url:
            raise UsageError(f"{options.recipe}: data.url is not set; pass --set data.url=URL of a converted dataset")
        return _train(recipe, options, arguments)
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except FmriStreamError as error:
        rank = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"train{rank}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, SupersededError):
            return SUPERSEDED
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except OSError as error:
        told = f"{error.filename or out or 'results'}: {error.strerror or error}"
        advice = "the same command goes on, once --out is a folder that can be written and has room"
        print(f"train: {told}; {advice}", file=sys.stderr, flush=True)
        return FAILED


def _train(recipe: Recipe, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    status = launched(options, arguments)
    if status is not None:
        return status

    from train.launch import join_world
    from train.loop import train
    from train.resuming import checkpoints_of

    out = options.out or Path("runs") / recipe_path(options.recipe).stem
    with join_world(timeout_s=recipe.train.timeout_s) as world:
        outcome = train(recipe, out=out, world=world)
        if outcome is None:
            if world.is_main:
                place = display_url(checkpoints_of(recipe, out))
                print(f"stopped after a checkpoint; the same command goes on from {place}", flush=True)
            return DONE
        _finish(outcome, recipe, out=out, world=world)
    return DONE


def _finish(outcome: "Outcome", recipe: Recipe, *, out: Path, world: "World") -> None:
    """Rank 0 writes the report; all score the other data; rank 0 puts beside it what takes longest.

    The others wait: agents of other machines that end early would take the place where all meet with them.
    """
    from train.beyond.transfer import score_elsewhere
    from train.html_report import finish
    from train.launch import main_first
    from train.model_card import write_card
    from train.report import write_report

    with main_first(world, timeout_s=_REPORTING_S):
        if world.is_main:
            write_report(outcome, recipe, out=out)
    if recipe.eval.urls:  # after the report, which nothing may cost
        score_elsewhere(recipe, out=out, world=world)
    with main_first(world, timeout_s=_REPORTING_S):
        if world.is_main:
            finish(recipe, out=out)
            print(f"written: {write_card(out)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a 4-D network on a converted dataset; goes on from the newest checkpoint in --out.",
        epilog="Several processes: --nproc N here; several machines: --nodes and --rendezvous (docs/multinode.md). With a "
        "trained network: python -m train --task predict|embed|probe|anomaly --help.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file, or a name in train/recipes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe (repeatable)"
    )
    parser.add_argument("--out", type=_folder, metavar="DIR", help="checkpoints, log and report (default: runs/RECIPE)")
    add_options(parser)
    parser.add_argument(
        "--profile",
        type=positive,
        nargs="?",
        const=5,
        metavar="STEPS",
        help="time so many steps (5) part by part and trace as many, into DIR/profile",
    )
    parser.add_argument("--check", action="store_true", help="print the resolved recipe and stop")
    return parser


def _folder(text: str) -> Path:
    """A path; an empty one is a shell variable that is not set, and would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, got an empty string; give . for the current one")
    return Path(text)
