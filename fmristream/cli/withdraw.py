"""Take subjects out of a dataset: commit a version without them. `gc --purge` then removes what older versions hold."""

import argparse
import shlex
from dataclasses import asdict

from fmristream.cli.words import as_json, number, plural, shown_url

WHEN_INTERRUPTED = "nothing is half done; run the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream withdraw`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument(
        "--subject", action="append", required=True, metavar="LABEL", help="without sub-; may be given again"
    )
    parser.add_argument(
        "--pseudonyms", metavar="KEYFILE", help="the dataset's key: labels are those of the source (else: pseudonyms)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Withdraw, and say what is left to do."""
    from fmristream.cli.tables import print_facts, print_lines
    from fmristream.ingest.withdraw import withdraw

    report = withdraw(arguments.url, arguments.subject, dry_run=arguments.dry_run, pseudonyms=arguments.pseudonyms)
    if arguments.json:
        print(as_json({**asdict(report), "url": shown_url(report.url)}))
        return 0
    url = shown_url(report.url)
    done = "would be withdrawn from" if report.dry_run else "withdrawn from"
    facts = [
        ("subjects", ", ".join(report.subjects)),
        ("runs", f"{number(report.runs)} with {number(report.frames)} frames; {number(report.runs_left)} are left"),
        ("participants", number(report.participants)),
        ("skipped", number(report.skipped)),
        ("content", report.content_digest),
        ("generation", report.generation_digest),
    ]
    print_facts(f"{plural(len(report.subjects), 'subject')} {done} {url}", facts)
    print_lines("still holding them", [f"version {digest}" for digest in report.older], style="bold yellow")
    if not report.dry_run:
        steps = [
            f"fmristream gc {shlex.quote(url)} --purge",
            "take them out of the source as well; copies of the dataset and versions that a bucket keeps are yours to purge",
        ]
        print_lines("next", steps)
    return 0
