"""Picture runs: mean, SD and tSNR slices beside a carpet plot, one PNG per run."""

import argparse
from dataclasses import asdict

from fmristream.cli.words import as_json

WHEN_INTERRUPTED = "pictures that are listed are complete"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream preview`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument("--out", default="preview", metavar="FOLDER", help="where PNGs go (default: ./%(default)s)")
    parser.add_argument("--run", action="append", metavar="NAME", help="only this run; may be given again")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N runs")


def run(arguments: argparse.Namespace) -> int:
    """Draw, and print each path as soon as its picture is there."""
    from fmristream.cli.progress import meter
    from fmristream.report.preview import preview
    from fmristream.shards.dataset import open_dataset

    dataset = open_dataset(arguments.url)
    names = arguments.run if arguments.run is not None else [run.name for run in dataset.runs]
    drawn = []
    with meter(quiet=arguments.quiet) as shown:
        for picture in preview(
            dataset,
            arguments.out,
            runs=names[: arguments.limit],
            progress=lambda done, total: shown.update("drawing", done=done, total=total, unit="runs"),
        ):
            drawn.append(picture)
            if not arguments.json:
                print(picture.path, flush=True)
    if arguments.json:
        print(as_json({"pictures": [asdict(picture) for picture in drawn]}))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of runs, 1 or more")
    return int(text)
