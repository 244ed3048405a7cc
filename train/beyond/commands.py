"""The command line of what is done with a trained network: `python -m train --task predict CKPT URL`, also under torchrun."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fmristream.errors import UsageError
from fmristream.storage.urls import without_credentials
from train.launch import World
from train.launching import Nodes

DONE = 0
# What a task does with the options, and the help of the task.
Work = Callable[[argparse.Namespace, World], Sequence[str]]


def asks_for_task(arguments: Sequence[str]) -> bool:
    """Whether a command line is one of these."""
    return any(argument == "--task" or argument.startswith("--task=") for argument in arguments)


def run_task(arguments: Sequence[str]) -> int:
    """Do what the command line says; the exit status."""
    from train.launch import join_world, local_device_count

    options = parser().parse_args(list(arguments))
    without_credentials(options.url)
    _refuse_strangers(options)
    processes = options.nproc or local_device_count()
    if "RANK" not in os.environ and processes > 1:
        from train.elastic import launch

        return launch(arguments, processes=processes, nodes=Nodes(), restarts=0)  # a task begins anew
    with join_world(timeout_s=options.timeout_s) as world:
        told = _TASKS[options.task](options, world)
    if world.is_main:
        for sentence in told:
            print(f"note: {sentence}")
        print(f"written: {options.out}")
    return DONE


def parser() -> argparse.ArgumentParser:
    """Its options."""
    found = argparse.ArgumentParser(
        prog="python -m train",
        description="Use a trained network: nothing is learnt, and everything that was fitted stays as training left it.",
        epilog="predict: scores. embed: features. probe: what they tell. anomaly: which runs are unlike those of training.",
    )
    found.add_argument("--task", required=True, choices=sorted(_TASKS), help="what to do")
    found.add_argument("checkpoint", metavar="CKPT", help="the folder of a run, of a checkpoint, or of an import")
    found.add_argument("url", metavar="URL", help="of a converted dataset")
    found.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the results (default: TASK-CKPT)")
    found.add_argument("--split", default="all", metavar="NAME", help="runs of one split (default: all runs)")
    found.add_argument("--where", default="", metavar="CONDITION", help="runs that meet a condition")
    found.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="complete the recipe of an import (repeatable)"
    )
    found.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="COLUMN",
        help="probe: what to read from the features (repeatable)",
    )
    found.add_argument(
        "--reference", default="train", metavar="SPLIT", help="anomaly: runs of the training data to compare with"
    )
    found.add_argument("--seed", type=int, default=0, metavar="N", help="probe: of folds and permutations")
    found.add_argument("--nproc", type=_positive, metavar="N", help="processes (default: one per GPU, one on a CPU)")
    found.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="how long ranks wait for each other")
    return found


def _predict(options: argparse.Namespace, world: World) -> Sequence[str]:
    from train.beyond.predict import predict
    from train.beyond.trained import load_trained

    trained = load_trained(options.checkpoint, options.set)
    return predict(trained, options.url, out=options.out, world=world, split=options.split, where=options.where)


def _embed(options: argparse.Namespace, world: World) -> Sequence[str]:
    from train.beyond.embed import embed
    from train.beyond.trained import load_trained

    trained = load_trained(options.checkpoint, options.set)
    return embed(trained, options.url, out=options.out, world=world, split=options.split, where=options.where)


def _probe(options: argparse.Namespace, world: World) -> Sequence[str]:
    from train.beyond.probes import probe
    from train.beyond.trained import load_trained

    trained = load_trained(options.checkpoint, options.set)
    return probe(
        trained,
        options.url,
        out=options.out,
        world=world,
        targets=options.target,
        where=options.where,
        seed=options.seed,
    )


def _anomaly(options: argparse.Namespace, world: World) -> Sequence[str]:
    from train.beyond.anomaly import anomaly
    from train.beyond.trained import load_trained

    trained = load_trained(options.checkpoint, options.set)
    return anomaly(
        trained,
        options.url,
        out=options.out,
        world=world,
        split=options.split,
        where=options.where,
        reference=options.reference,
    )


_TASKS: Mapping[str, Work] = {"anomaly": _anomaly, "embed": _embed, "predict": _predict, "probe": _probe}


def _refuse_strangers(options: argparse.Namespace) -> None:
    """Options of other tasks, which would be passed over in silence."""
    if options.target and options.task != "probe":
        raise UsageError(f"--target is of --task probe, got --task {options.task}; leave it out")
    if options.reference != "train" and options.task != "anomaly":
        raise UsageError(f"--reference is of --task anomaly, got --task {options.task}; leave it out")
    if options.split != "all" and options.task == "probe":
        raise UsageError("--task probe takes all splits: it learns from train and scores test; leave --split out")
    if options.out is None:
        options.out = Path(f"{options.task}-{Path(options.checkpoint).name}")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text!r}")
    return number
