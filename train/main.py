"""The command line of the trainer: a recipe, what to change in it, where to write."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fmristream.errors import FmriStreamError, UsageError
from train.config import Recipe, as_toml, load_recipe, recipe_path
from train.launching import add_options, launched

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
_REPORT_S = 3600.0  # how long the report and what stands beside it may take


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say; the exit status is 0 (done, or stopped by SIGTERM after a checkpoint), 1 or 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
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
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except OSError as error:
        print(f"train: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr, flush=True)
        return FAILED


def _train(recipe: Recipe, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    status = launched(options, arguments)
    if status is not None:
        return status

    from train.launch import join_world, main_first
    from train.loop import train
    from train.report import write_report

    out = options.out or Path("runs") / recipe_path(options.recipe).stem
    with join_world(timeout_s=recipe.train.timeout_s) as world:
        outcome = train(recipe, out=out, world=world)
        # Agents of other machines that end early would take the place where all meet with them.
        with main_first(world, timeout_s=_REPORT_S):
            if world.is_main and outcome is not None:
                write_report(outcome, recipe, out=out)
        if world.is_main and outcome is None:
            print(f"stopped after a checkpoint; the same command goes on from {out / 'checkpoints'}", flush=True)
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a 4-D network on a converted dataset; goes on from the newest checkpoint in --out.",
        epilog="Several processes: --nproc N here; several machines: --nodes and --rendezvous (docs/multinode.md).",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file, or a name in train/recipes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe (repeatable)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoints, log and report (default: runs/RECIPE)")
    add_options(parser)
    parser.add_argument("--check", action="store_true", help="print the resolved recipe and stop")
    return parser
