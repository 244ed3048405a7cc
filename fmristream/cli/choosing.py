"""The options that say which runs of a source are meant; `convert` and `verify --against` share them."""

import argparse
import shlex
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from fmristream.ingest.sources import EntityFilter

_ENTITIES = ("subject", "session", "task", "acq", "run", "echo", "res", "den", "desc")


class Chosen(TypedDict):
    """Keywords of `find_runs`."""

    space: str | None
    subject_pattern: str | None
    kind: str | None
    entities: "EntityFilter"
    cifti: bool


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """Options for runs, in a group of their own."""
    group = parser.add_argument_group("which runs (repeat an option for several labels; none: without the label)")
    for name in _ENTITIES:
        group.add_argument(f"--{name}", action="append", metavar="LABEL", help=_help(name))
    group.add_argument(
        "--space",
        action="append",
        metavar="NAME",
        help="among spaces that files name: only this; else the space that all runs are in",
    )
    group.add_argument(
        "--cifti",
        action="store_true",
        help="grayordinates (CIFTI-2 .dtseries.nii), where volumes are there as well (default: the volumes)",
    )
    group.add_argument(
        "--kind",
        metavar="KIND",
        help="what the source is, where its layout does not tell: bids, folder, hcp-ya, hcp-lifespan, ukb, abcd, abide-pcp, "
        "fcp1000, bids-sites, nki, or a .toml file that describes it",
    )
    group.add_argument(
        "--subject-pattern", metavar="REGEX", help="for plain folders: its group is the subject, as in 'S(\\d+)/'"
    )


def chosen(arguments: argparse.Namespace) -> Chosen:
    """What was chosen. One space may also declare what files do not say; several can only select."""
    from fmristream.ingest.sources import EntityFilter

    labels = {name: tuple(getattr(arguments, name) or ()) for name in _ENTITIES}
    spaces = tuple(arguments.space or ())
    return Chosen(
        space=spaces[0] if len(spaces) == 1 else None,
        subject_pattern=arguments.subject_pattern,
        kind=arguments.kind,
        entities=EntityFilter(**labels, space=spaces if len(spaces) > 1 else ()),
        cifti=arguments.cifti,
    )


def as_typed(arguments: argparse.Namespace) -> str:
    """The same options for another command line, with a space before each."""
    words = []
    for name in (*_ENTITIES, "space"):
        words += [word for label in getattr(arguments, name) or () for word in (f"--{name}", label)]
    for name in ("kind", "subject_pattern"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", value]
    words += ["--cifti"] if arguments.cifti else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _help(name: str) -> str:
    if name == "desc":
        return "a form of the runs: preproc, hp2000_clean, ... (default: the collection's usual one)"
    if name == "den":
        return "runs of grayordinates with this density: 91k, 170k, ..."
    return f"runs with this {name}"
