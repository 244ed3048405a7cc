"""Remove objects that no version of a dataset names; with --keep or --purge older versions as well."""

import argparse
from dataclasses import asdict

from fmristream.cli.words import as_json, number, plural, shown_url, size

WHEN_INTERRUPTED = "what is removed is removed, no version that stays lacks anything; run the same command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream gc`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument("--keep", type=int, metavar="N", help="drop all versions but the N newest")
    parser.add_argument(
        "--purge", action="store_true", help="drop versions that name a withdrawn subject, with all that only they hold"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, remove nothing")


def run(arguments: argparse.Namespace) -> int:
    """Collect, and say whose pins are dead."""
    from fmristream.cli.tables import print_facts, print_lines, print_table
    from fmristream.ingest.gc import gc

    report = gc(arguments.url, keep=arguments.keep, purge=arguments.purge, dry_run=arguments.dry_run)
    if arguments.json:
        print(as_json({**asdict(report), "url": shown_url(report.url)}))
        return 0
    done = "would be removed from" if report.dry_run else "removed from"
    facts = [
        ("freed", size(report.bytes) if report.bytes else ""),
        ("uploads", number(report.uploads) if report.uploads else ""),
        ("versions left", number(report.versions_left)),
        ("receipt", report.receipt),
    ]
    print_facts(f"{plural(report.objects, 'object')} {done} {shown_url(report.url)}", facts)
    rows = [(str(one.generation), one.generation_digest, one.content_digest) for one in report.versions]
    print_table("versions that can no longer be opened", ("version", "generation", "content"), rows)
    print_lines("warnings", report.warnings, style="bold yellow")
    return 0
