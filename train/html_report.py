"""OUT/report.html: one self-contained page about a finished run, made from what lies in its folder alone.

    python -m train.html_report OUT

It fetches nothing and needs no script. It names no subject (report.json and the prediction table do), but dots of a scatter
are people all the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fmristream.errors import FmriStreamError, UsageError
from fmristream.storage.urls import redacted
from train.config import Recipe
from train.files import write_whole
from train.html_facts import RunFacts, gather
from train.html_numbers import beside_section, headline, target_section
from train.html_origin import (
    code_section,
    data_section,
    leaks_section,
    reading_section,
    recipe_section,
    training_section,
)
from train.html_tags import Html, page, tag, text

REPORT_FILE = "report.html"


def finish(recipe: Recipe, *, out: Path) -> None:
    """After a run's report is in place: a page about it, the baselines beside it, and the page again with them.

    Raises:
        FmriStreamError: the baselines' data cannot be read; the network's report and a page that says so are in place.
    """
    from train.beside import stand_beside

    write_html(out)
    try:
        stand_beside(recipe, out=out)
    finally:
        write_html(out)
        print(f"written: {out / REPORT_FILE}", flush=True)


def write_html(out: Path) -> Path:
    """Write the page of a finished run; where.

    Raises:
        UsageError: there is no report.json.
        CorruptDataError: it, or another file of the folder, is not what was written.
    """
    path = out / REPORT_FILE
    write_whole(path, page_of(gather(out)))
    return path


def page_of(run: RunFacts) -> str:
    """The whole page."""
    title = f"{run.network_name}: {', '.join(run.target_names) or run.objective_kind}"
    sections: list[Html] = [
        tag("header", tag("h1", text(title)), tag("p", text(run.in_words), class_="lead")),
        headline(run),
        *(target_section(run, view) for view in run.views),
        beside_section(run),
        training_section(run),
        leaks_section(run),
        data_section(run),
        code_section(run),
        recipe_section(run),
        reading_section(run),
    ]
    return page(title, *sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.html of a finished run; the exit status is 0, 1 or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m train.html_report", description="Write report.html of a finished run."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the run's folder, with report.json")
    options = parser.parse_args(arguments)
    try:
        print(f"written: {write_html(options.out)}")
    except FmriStreamError as error:
        print(f"html_report: {redacted(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
