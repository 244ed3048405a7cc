"""`fmristream COMMAND …`: finds the command, turns errors into one line and an exit status.

0 done · 1 failed, or a fault was found · 2 wrong usage · 3 done, with inputs left out · 130 interrupted ·
141 whoever read the output has gone
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from fmristream._version import __version__
from fmristream.errors import FmriStreamError, UsageError

FAILED, WRONG_USAGE, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141

# What each command is for; its module is imported when it is chosen, what it needs when it runs.
COMMANDS = {
    "convert": "turn NIfTI runs into a dataset",
    "info": "say what a dataset holds",
    "verify": "check a dataset, or compare it with its source",
    "preview": "picture every run",
    "audit": "look for what is trained and tested on",
    "bench": "measure how fast windows of a dataset stream",
    "withdraw": "take subjects out of a dataset",
    "gc": "remove what no version of a dataset needs",
    "export": "write runs as NIfTI files again",
}

EXAMPLES = """\
examples:
  fmristream convert /data/bids s3://lab/study      one command, interrupt it and run it again at will
  fmristream info s3://lab/study
  fmristream verify s3://lab/study --against /data/bids
  fmristream preview s3://lab/study --out pictures
  fmristream bench s3://lab/study                   how fast it streams to this machine
  fmristream export s3://lab/study nifti --all
"""


def run() -> NoReturn:
    """Entry point of the installed command."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status."""
    try:
        arguments = build_parser(argv).parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    command = _module(arguments.command)
    try:
        status = int(command.run(arguments))
        sys.stdout.flush()
    except FmriStreamError as error:
        _complain(error, debug=arguments.debug)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        print(f"\ninterrupted: {command.WHEN_INTERRUPTED}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = None  # nothing is left to flush at exit
        return NOBODY_READS
    return status


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the command that `argv` names."""
    parser = _Parser(
        prog="fmristream",
        description="Convert 4D fMRI once, share it by URL, stream it into 4D models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fmristream {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, purpose in COMMANDS.items():
        # Without abbreviations: a script that says --split must not change its meaning when --split-seed appears.
        command = commands.add_parser(name, help=purpose, allow_abbrev=False)
        if name == chosen:
            module = _module(name)
            command.description = module.__doc__
            module.add_arguments(command)
            command.add_argument("--json", action="store_true", help="print the result as JSON")
            command.add_argument("--quiet", action="store_true", help="no progress on stderr")
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Parser(argparse.ArgumentParser):
    """Repeats what was typed in its errors, but no secrets of it."""

    def error(self, message: str) -> NoReturn:
        from fmristream.storage.urls import redacted

        super().error(redacted(message))


def _module(name: str) -> ModuleType:
    return import_module(f"fmristream.cli.{name}")


def _complain(error: FmriStreamError, *, debug: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from fmristream.cli.words import on_one_line
    from fmristream.storage.urls import redacted

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if debug:
        import traceback

        console.print(Text(redacted("".join(traceback.format_exception(error)))))
    console.print(Text(f"error: {on_one_line(redacted(str(error)))}", style="red"))
