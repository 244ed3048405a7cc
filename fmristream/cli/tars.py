"""The part of `fmristream convert` that writes tar shards: its options, and what it prints."""

import argparse
import shlex
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from fmristream.cli.words import as_json, number, plural, shown_url, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from fmristream.ingest.options import ConvertOptions, ConvertReport
    from fmristream.report.tar_options import TarOptions
    from fmristream.report.webdataset import TarReport
    from fmristream.shards.dataset import Dataset

# What `--format webdataset` alone knows; None, or False, where it was not given.
_OPTIONS = (
    "window", "stride", "parts", "normalize", "dtype", "arrays", "grid", "samples_per_shard", "seed", "targets",
    "with_subjects", "mix_spaces", "via",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--format webdataset`."""
    group = parser.add_argument_group(
        "tar shards of windows (--format webdataset)", "SOURCE may be a dataset; see docs/webdataset.md"
    )
    group.add_argument("--window", type=int, metavar="N", help="frames of a sample (default: 20)")
    group.add_argument("--stride", type=int, metavar="N", help="frames between starts (default: the window)")
    group.add_argument("--parts", type=_words, metavar="A,B", help="parts of the split to write (default: all)")
    group.add_argument(
        "--normalize",
        metavar="RECIPE",
        help="raw (stored values, slope and intercept beside them) or a recipe: voxel-zscore, ... (default: raw)",
    )
    group.add_argument("--dtype", choices=("float16", "float32"), help="of normalised values (default: float32)")
    group.add_argument(
        "--arrays",
        choices=("packed", "placed"),
        help="packed (t, v): voxels of the mask; placed (t, x, y, z) (default: packed)",
    )
    group.add_argument("--grid", type=_grid, metavar="X,Y,Z", help="pad or cut placed arrays to this grid, centred")
    group.add_argument("--samples-per-shard", type=int, metavar="N", help="default: what fits into 256 MB")
    group.add_argument("--seed", type=int, metavar="N", help="another seed, another order (default: 0)")
    group.add_argument("--targets", type=_words, metavar="A,B", help="columns of the participants table to add")
    group.add_argument("--with-subjects", action="store_true", help="write subject labels and run names into shards")
    group.add_argument("--mix-spaces", action="store_true", help="take runs whose voxels do not correspond, too")
    group.add_argument(
        "--via",
        metavar="URL",
        help="where NIfTI files are converted to first, and stay (default: beside a local URL, as URL-dataset)",
    )


def require_none(arguments: argparse.Namespace) -> None:
    """Raise UsageError where an option of tar shards was given without them."""
    from fmristream.errors import UsageError

    given = [name for name in _OPTIONS if getattr(arguments, name) not in (None, False)]
    if given:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{words}: of tar shards only; add --format webdataset")


def run(
    arguments: argparse.Namespace,
    options: "ConvertOptions",
    convert: "Callable[[str], ConvertReport]",
    show: "Callable[[ConvertReport], None]",
) -> int:
    """Write tar shards from a dataset, or from NIfTI files that are converted first; say what came of it.

    Args:
        arguments: the command line.
        options: of the conversion of NIfTI files.
        convert: converts SOURCE into a dataset at a URL.
        show: prints the report of that.
    """
    from fmristream.cli.progress import meter
    from fmristream.report.webdataset import require_target, write_webdataset
    from fmristream.shards.dataset import open_dataset
    from fmristream.storage import open_store

    chosen = _tar_options(arguments)
    dataset, first = _dataset_of(arguments.source, arguments, options), None
    if dataset is None:
        via = _via(arguments, options)
        if not arguments.dry_run:
            require_target(open_store(arguments.url))
        first = convert(via)
        if not arguments.json:
            show(first)
        dataset = None if arguments.dry_run else open_dataset(via)
    report = None
    if dataset is not None:
        with meter(quiet=arguments.quiet) as shown:
            report = write_webdataset(
                dataset,
                arguments.url,
                options=chosen,
                dry_run=arguments.dry_run,
                progress=lambda done, total: shown.update("writing tars", done=done, total=total, unit="windows"),
            )
    if arguments.json:
        print(as_json({"conversion": _document(first), "webdataset": _document(report)}))
    elif report is not None:
        _print(report, arguments.source if first is None else first.url)
    return 0 if first is None else first.exit_code


def _dataset_of(source: str, arguments: argparse.Namespace, options: "ConvertOptions") -> "Dataset | None":
    """The dataset that the source is; None where it is something else."""
    from fmristream.errors import UsageError
    from fmristream.shards.dataset import open_dataset
    from fmristream.shards.generation import holds_dataset
    from fmristream.storage import open_store

    try:
        is_dataset = holds_dataset(open_store(source))
    except UsageError:  # synth://, and whatever else only NIfTI files are read from
        return None
    if not is_dataset:
        return None
    defaults = replace(type(options)(), workers=options.workers)
    given = [each.name for each in fields(options) if getattr(options, each.name) != getattr(defaults, each.name)]
    if given or arguments.via is not None:
        names = ", ".join(given or ["via"])
        raise UsageError(
            f"{shown_url(source)}: is a dataset already, and {names} is for converting NIfTI; leave it out"
        )
    return open_dataset(source)


def _via(arguments: argparse.Namespace, options: "ConvertOptions") -> str:
    """Where the dataset on the way is made: it names subjects, so it is put into no bucket that nobody asked for."""
    from fmristream.errors import UsageError
    from fmristream.storage.urls import scheme_of

    if options.shard is not None:
        raise UsageError("--shard: convert into a dataset first, then that into tar shards (--format webdataset)")
    if arguments.via is not None:
        return str(arguments.via)
    if scheme_of(arguments.url) != "file":
        raise UsageError(
            f"{shown_url(arguments.url)}: NIfTI files become a dataset first, whose tables name subjects; say where by "
            "--via URL, or give a dataset as the source"
        )
    return str(arguments.url).rstrip("/") + "-dataset"


def _tar_options(arguments: argparse.Namespace) -> "TarOptions":
    from fmristream.report.tar_options import TarOptions

    given = {name: getattr(arguments, name) for name in _OPTIONS if name != "via"}
    return TarOptions(workers=arguments.workers, **{name: value for name, value in given.items() if value is not None})


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _grid(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected three sizes, as in 96,96,96")
    return tuple(int(size) for size in sizes)


def _document(report: "ConvertReport | TarReport | None") -> dict[str, Any] | None:
    return None if report is None else {**asdict(report), "url": shown_url(report.url)}


def _print(report: "TarReport", source: str) -> None:
    from fmristream.cli.tables import print_facts, print_lines, print_table

    url = shown_url(report.url)
    headline = f"wrote windows of {shown_url(source)} as tar shards into {url}"
    if report.dry_run:
        headline = f"windows of {shown_url(source)} would be written as tar shards into {url}; nothing was written"
    elif report.already_there:
        headline = f"{url} holds exactly these tar shards already; nothing was written"
    resumed = f"{plural(report.resumed, 'shard')} written before" if report.resumed else ""
    print_facts(headline, [("resumed", resumed), ("content", report.content_digest)])
    about = "about " if report.dry_run else ""
    rows = [
        (
            part.name,
            number(part.subjects),
            number(part.runs),
            number(part.samples),
            number(part.shards),
            f"{about}{size(part.bytes)}",
        )
        for part in report.parts
    ]
    print_table("parts", ("part", "subjects", "runs", "samples", "shards", "size"), rows, max_rows=len(rows))
    print_lines("warnings", report.warnings, style="bold yellow")
    if not report.dry_run:
        part = report.parts[0]
        last = f"{{000000..{part.shards - 1:06d}}}" if part.shards > 1 else "000000"
        print_lines("next", [f"webdataset.WebDataset({shlex.quote(f'{url}/{part.name}/{part.name}-{last}.tar')})"])
