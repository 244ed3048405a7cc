"""Stream random windows as a training would, and say how fast they come, and what was asked of the store."""

import argparse
import os
from typing import TYPE_CHECKING

from fmristream.cli.words import as_json, number, size

if TYPE_CHECKING:
    from fmristream.report.bench import BenchReport

WHEN_INTERRUPTED = "nothing was changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream bench`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument("--window", type=_positive, default=20, metavar="FRAMES", help="of a window (default: 20)")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="windows of a batch (default: 8)")
    parser.add_argument("--batches", type=_positive, default=50, metavar="N", help="that are timed (default: 50)")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="that fetch and decode (default: one for each CPU)"
    )
    parser.add_argument("--split", metavar="PART", help="only its runs: train, val or test")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    parser.add_argument("--normalize", default="voxel-zscore", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--step",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="pretend a training step between batches, to see what waiting is left (default: none)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from fmristream.cli.progress import meter
    from fmristream.report.bench import BenchOptions, bench

    options = BenchOptions(
        window=arguments.window,
        batch_size=arguments.batch_size,
        batches=arguments.batches,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
        split=arguments.split,
        seed=arguments.seed,
        normalize=arguments.normalize,
        step_s=arguments.step,
    )
    with meter(quiet=arguments.quiet) as shown:
        report = bench(
            arguments.url,
            options,
            progress=lambda done, total: shown.update("streaming", done=done, total=total, unit="batches"),
        )
    if arguments.json:
        print(as_json(report.as_dict()))
    else:
        _print(report)
    return 0


def _print(report: "BenchReport") -> None:
    from fmristream.cli.tables import print_facts

    share = report.waited_s / report.seconds
    print_facts(
        report.url,
        [
            (
                "windows",
                f"{_rate(report.windows_per_s)} /s of {report.window} frames and {number(report.voxels)} voxels",
            ),
            ("frames", f"{_rate(report.frames_per_s)} /s"),
            ("read", f"{_rate(report.read_mb_s)} MB/s"),
            ("waited", f"{report.waited_s:.3g} s of {report.seconds:.3g} s ({share:.0%})"),
            ("opened", f"in {report.open_s:.3g} s, {number(report.open_requests)} requests"),
            ("first batch", f"after {report.first_batch_s:.3g} s more"),
            ("requests", f"{number(report.requests)}, {report.requests_per_window:.3f} a window for its frames"),
            ("fetched", f"{size(report.bytes_fetched)} in all"),
            (
                "of frames",
                f"{size(report.window_bytes_fetched)} for {size(report.window_bytes_used)} that were used: "
                f"{report.fetched_over_used:.3f}; {size(report.ahead_bytes)} more ahead",
            ),
            (
                "streamed",
                f"{number(report.batches)} batches of {report.batch_size} windows, {report.threads} threads",
            ),
        ],
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, 1 or more")
    return int(text)


def _rate(value: float) -> str:
    """Three digits that mean something, and none of them as a power of ten."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
