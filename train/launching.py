"""What the command line says of launching: how many processes here, and with which other machines."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fmristream.errors import UsageError

DEFAULT_PORT = 29400  # torchrun's own for c10d
DEFAULT_RESTARTS = 3  # torch's LaunchConfig's


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """How many machines take part, and where they meet; `host` is one of them, and the run ends with it."""

    minimum: int = 1
    maximum: int = 1
    host: str = "127.0.0.1"  # nothing leaves this machine, whatever its name resolves to
    port: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of launching: how many processes here, and with which other machines."""
    parser.add_argument("--nproc", type=positive, metavar="N", help="processes (default: one per GPU, one on a CPU)")
    parser.add_argument(
        "--nodes", metavar="N|MIN:MAX", help="machines that run this same command; MIN:MAX: they may come and go"
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST[:PORT]", help=f"the one of them where all meet (port {DEFAULT_PORT})"
    )
    parser.add_argument(
        "--restarts",
        type=_count,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help=f"how often this machine's processes start again soon after one died (default: {DEFAULT_RESTARTS})",
    )


def launched(options: argparse.Namespace, arguments: Sequence[str]) -> int | None:
    """The exit status of the ranks started here, or None where this process is a rank, or the only process."""
    if "RANK" in os.environ:
        return None
    from train.launch import local_device_count

    nodes = parse_nodes(options.nodes, options.rendezvous)
    processes = options.nproc or local_device_count()
    if options.nodes is None and processes == 1:
        return None

    from train.elastic import launch

    return launch(arguments, processes=processes, nodes=nodes, restarts=options.restarts)


def parse_nodes(count: str | None, rendezvous: str | None) -> Nodes:
    """What `--nodes` and `--rendezvous` say.

    Raises:
        UsageError: one is not of its form, or is missing beside the other.
    """
    if count is None and rendezvous is None:
        return Nodes()
    if count is None or rendezvous is None:
        raise UsageError("--nodes and --rendezvous go together: how many machines, and at which HOST[:PORT] they meet")
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", count)
    minimum = int(numbers[1]) if numbers else 0
    maximum = int(numbers[2] or minimum) if numbers else 0
    if not 1 <= minimum <= maximum:
        raise UsageError(f"--nodes: expected N or MIN:MAX of at least 1, got {count!r}")
    place = re.fullmatch(r"(\[[^]]+\]|[^:]+)(?::(\d+))?", rendezvous)
    if not place:
        raise UsageError(f"--rendezvous: expected HOST or HOST:PORT, got {rendezvous!r}")
    return Nodes(minimum=minimum, maximum=maximum, host=place[1].strip("[]"), port=int(place[2] or DEFAULT_PORT))


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)
