"""Look for what is on both sides of a split, or in two datasets: the same run, the same subject, copies of runs."""

import argparse
from typing import TYPE_CHECKING

from fmristream.cli.words import as_json, number, plural, shown_url

if TYPE_CHECKING:
    from fmristream.report.leaks import LeakReport

WHEN_INTERRUPTED = "nothing was changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream audit`."""
    parser.add_argument("url", metavar="URL", help="the dataset that is trained on")
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", help="another dataset, to be tested on; else the parts of URL's own split"
    )
    parser.add_argument("--train", metavar="CONDITION", help="runs of URL to train on (\"split == 'train'\")")
    parser.add_argument("--test", metavar="CONDITION", help="runs to test on; all others where not given")
    parser.add_argument("--no-fingerprints", action="store_true", help="compare digests and labels only")


def run(arguments: argparse.Namespace) -> int:
    """Say what was found; 1 if a run or subject is certainly on both sides."""
    from fmristream.report.leaks import find_leaks
    from fmristream.shards.dataset import open_dataset

    dataset = open_dataset(arguments.url)
    other = open_dataset(arguments.other) if arguments.other else dataset
    chosen = arguments.train or ("" if arguments.other else "split == 'train'")
    train = dataset.where(chosen) if chosen else dataset
    rest = arguments.test or ("" if arguments.other else f"not ({chosen})")
    report = find_leaks(train, other.where(rest) if rest else other, fingerprints=not arguments.no_fingerprints)
    if arguments.json:
        urls = {"url": shown_url(arguments.url), "other": shown_url(arguments.other or arguments.url)}
        print(as_json({**urls, **report.as_dict()}))
    else:
        _print(arguments, report)
    return 1 if report.certain else 0


def _print(arguments: argparse.Namespace, report: "LeakReport") -> None:
    from fmristream.cli.tables import print_facts, print_table

    found = plural(len(report.certain), "leak") if report.certain else "no leak"
    suspected = plural(len(report.suspected), "suspicion") if report.suspected else "nothing suspected"
    print_facts(
        f"{shown_url(arguments.url)}: {found}, {suspected}",
        [
            ("training runs", number(report.train_runs)),
            ("test runs", number(report.test_runs)),
            ("without fingerprint", number(report.without_fingerprint) if report.without_fingerprint else ""),
        ],
    )
    print_table(
        "on both sides",
        ("what", "train", "test", "correlation"),
        [(leak.kind, leak.train, leak.test, "–" if leak.time is None else f"{leak.time:.2f}") for leak in report.leaks],
    )
