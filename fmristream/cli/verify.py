"""Check a dataset: every object's size and digest, indexes against shards; with --deep and --against every voxel."""

import argparse
from typing import TYPE_CHECKING

from fmristream.cli.choosing import add_choosing, chosen
from fmristream.cli.words import as_json, number, plural, shown_url, size

if TYPE_CHECKING:
    from fmristream.report.findings import VerifyReport

WHEN_INTERRUPTED = "nothing was changed; run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream verify`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="decode every chunk, compute digests and statistics again, read a sample through zarr-python",
    )
    parser.add_argument(
        "--against", metavar="SOURCE", help="compare every stored value with the files it came from, read by nibabel"
    )
    add_choosing(parser)  # as given to convert
    parser.add_argument("--pseudonyms", metavar="KEYFILE", help="as given to convert")


def run(arguments: argparse.Namespace) -> int:
    """Check, and say what was found; 1 if anything is wrong."""
    from fmristream.cli.progress import meter
    from fmristream.report.verify import verify

    with meter(quiet=arguments.quiet) as shown:
        report = verify(
            arguments.url,
            deep=arguments.deep,
            against=arguments.against,
            pseudonyms=arguments.pseudonyms,
            **chosen(arguments),
            progress=lambda now: shown.update(now.stage, done=now.done, total=now.total, unit=now.unit),
        )
    if arguments.json:
        shown_urls = {"url": shown_url(report.url), "against": shown_url(report.against)}
        print(as_json({**report.as_dict(), **shown_urls}))
    else:
        _print(report)
    return 0 if report.is_sound else 1


def _print(report: "VerifyReport") -> None:
    from fmristream.cli.tables import print_facts, print_table

    verdict = "is sound" if report.is_sound else f"has {plural(len(report.faults), 'fault')}"
    decoded = f"{number(report.frames_decoded)} frames, {number(report.frames_cross_read)} also through zarr-python"
    compared = (
        f"{number(report.voxels_compared)} stored values in {number(report.frames_compared)} frames of "
        f"{plural(report.runs_compared, 'run')} with {shown_url(report.against)}"
    )
    print_facts(
        f"{shown_url(report.url)} {verdict}",
        [
            ("runs", number(report.runs)),
            ("objects", f"{number(report.objects)} with {size(report.bytes)}: size and digest"),
            ("indexes", f"{plural(report.chunks, 'chunk')} where the index says"),
            ("decoded", decoded if report.deep else ""),
            ("compared", compared if report.against else ""),
            ("content", report.content_digest),
            ("generation", report.generation_digest),
        ],
    )
    print_table("faults", ("run", "object", "what"), [(f.run or "–", f.object or "–", f.what) for f in report.faults])
