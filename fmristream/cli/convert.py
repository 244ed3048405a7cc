"""Convert NIfTI runs into a dataset: from BIDS, fMRIPrep, HCP, UK Biobank, INDI, ABCD, folders, archives, a table, URLs."""

import argparse
import shlex
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fmristream.cli import tars
from fmristream.cli.choosing import add_choosing, as_typed, chosen
from fmristream.cli.words import as_json, number, plural, shown_url, size

if TYPE_CHECKING:
    from fmristream.cli.progress import Meter
    from fmristream.ingest.options import ConvertOptions, ConvertReport, Progress
    from fmristream.ingest.resampling import Resample

WHEN_INTERRUPTED = "finished runs are kept; run the same command again and it goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, bucket prefix, glob, file, .zip or .tar, table of runs (.tsv, .csv, .parquet), or synth://?subjects=8",
    )
    parser.add_argument("url", metavar="URL", help="new folder, or s3://bucket/prefix")
    parser.add_argument(
        "--mask",
        default="auto",
        metavar="MASK",
        help="voxels to store: auto (the runs' own masks, else computed), none (whole volumes), first:K (computed from "
        "K frames), or the path of a mask (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        default="auto",
        metavar="SPLIT",
        help="train, val and test by subject: hash (stable when subjects are added), exact (exact shares), none, or a "
        "CSV or TSV file with the columns subject and split (default: the table's own column split, else hash)",
    )
    parser.add_argument("--split-ratios", type=_ratios, metavar="A,B,C", help="shares (default: 0.7,0.15,0.15)")
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="another seed, another split")
    parser.add_argument(
        "--layout",
        default="voxels",
        choices=("voxels", "volume"),
        help="voxels (those of the mask, for training) or volume (whole frames as OME-Zarr, for viewers and export; "
        "streams slower) (default: %(default)s)",
    )
    parser.add_argument(
        "--header",
        default="scrub",
        choices=("scrub", "keep"),
        help="NIfTI headers in layout volume: scrub (no free text, no extensions; reported) or keep (every byte, so that "
        "export gives back the very file) (default: %(default)s)",
    )
    parser.add_argument(
        "--atlas",
        action="append",
        default=[],
        metavar="PATH",
        help="store time series of its parcels, too: a label image (3-D) or probabilistic maps (4-D) in the space of the "
        "runs; may be repeated",
    )
    parser.add_argument(
        "--no-side", action="store_true", help="leave out confounds, events and recordings that lie beside the runs"
    )
    parser.add_argument(
        "--no-sketch", action="store_true", help="store no fingerprints, by which copies of runs are found"
    )
    parser.add_argument(
        "--format",
        default="zarr",
        choices=("zarr", "webdataset"),
        help="zarr (a dataset) or webdataset (tar shards of windows, from a dataset or from NIfTI) (default: %(default)s)",
    )
    parser.add_argument(
        "--codec",
        default="lossless",
        choices=("lossless", "raw", "int16", "int8"),
        help="lossless, raw (the same values uncompressed, for fast local disks), int16 (floats, within .002 of each "
        "voxel's temporal SD) or int8 (a byte a voxel, within .025 SD; both read the source twice) (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs converted at the same time")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="let the workers of a running dask scheduler do it: tcp://host:8786"
    )
    parser.add_argument(
        "--cluster", choices=("slurm",), help="submit --workers N jobs that do it (needs dask-jobqueue)"
    )
    parser.add_argument(
        "--cluster-options", metavar="FILE", help="TOML: queue, account, walltime, memory, ...; see docs/cluster.md"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="do the I-th of N shares of the runs and commit nothing, for array jobs"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each worker: 1, or 2 to decompress in a thread of its own (default: 2 where there are CPUs for it)",
    )
    parser.add_argument(
        "--participants",
        metavar="TABLE",
        help="columns about subjects: CSV, TSV or Parquet, in place of participants.tsv",
    )
    parser.add_argument("--subject-column", metavar="NAME", help="which of its columns holds the subjects' labels")
    parser.add_argument(
        "--group-by",
        metavar="COLUMN",
        help="never divide these between splits: a column of family or site; none: subjects",
    )
    parser.add_argument(
        "--pseudonyms",
        metavar="KEYFILE",
        help="call subjects and groups by keyed hashes of their labels; a local file of 32 random bytes or more, or hex",
    )
    parser.add_argument(
        "--resample-tr", type=float, metavar="SECONDS", help="resample in time to this repetition time, without aliases"
    )
    parser.add_argument(
        "--resample-to", metavar="TEMPLATE", help="resample in space to the grid of this 3-D NIfTI file, by the affines"
    )
    parser.add_argument(
        "--resample-mm",
        type=float,
        metavar="MM",
        help="or to cubic voxels of this size on each run's own field of view",
    )
    parser.add_argument("--tr", type=float, metavar="SECONDS", help="repetition time, over headers and sidecars")
    parser.add_argument(
        "--update",
        choices=("new", "all"),
        help="bring a dataset that is there up to date: new adds runs, all also replaces those whose source changed",
    )
    add_choosing(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    tars.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what came of it."""
    if arguments.format == "webdataset":
        return tars.run(
            arguments,
            _options(arguments),
            convert=lambda url: _convert(arguments, url),
            show=lambda report: _print(report, arguments),
        )
    tars.require_none(arguments)
    report = _convert(arguments, arguments.url)
    if arguments.json:
        print(as_json(_document(report)))
    else:
        _print(report, arguments)
    return report.exit_code


def _convert(arguments: argparse.Namespace, url: str) -> "ConvertReport":
    from fmristream.cli.progress import meter
    from fmristream.ingest.convert import convert

    with meter(quiet=arguments.quiet) as shown:
        return convert(
            arguments.source,
            url,
            options=_options(arguments),
            dry_run=arguments.dry_run,
            progress=lambda now: _tell(shown, now),
        )


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected three shares, as in 0.7,0.15,0.15") from None


def _options(arguments: argparse.Namespace) -> "ConvertOptions":
    from fmristream.catalog.split import DEFAULT_RATIOS, checked_ratios
    from fmristream.ingest.options import ConvertOptions
    from fmristream.ingest.sources import Phenotypes

    return ConvertOptions(
        mask=arguments.mask,
        split=arguments.split,
        split_ratios=DEFAULT_RATIOS if arguments.split_ratios is None else checked_ratios(arguments.split_ratios),
        split_seed=arguments.split_seed,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        cluster=arguments.cluster,
        cluster_options=arguments.cluster_options,
        shard=arguments.shard,
        threads=arguments.threads,
        update=arguments.update,
        layout=arguments.layout,
        header=arguments.header,
        atlases=tuple(arguments.atlas),
        side=not arguments.no_side,
        sketch=not arguments.no_sketch,
        codec=arguments.codec,
        tr_s=arguments.tr,
        pseudonyms=arguments.pseudonyms,
        resample=_resample(arguments),
        phenotypes=Phenotypes(
            url=arguments.participants, subject_column=arguments.subject_column, group_by=arguments.group_by
        ),
        **chosen(arguments),
    )


def _resample(arguments: argparse.Namespace) -> "Resample | None":
    from fmristream.ingest.resampling import Resample, read_grid

    if arguments.resample_tr is None and arguments.resample_to is None and arguments.resample_mm is None:
        return None
    return Resample(
        tr_s=arguments.resample_tr,
        grid=None if arguments.resample_to is None else read_grid(arguments.resample_to),
        voxel_mm=arguments.resample_mm,
    )


def _tell(shown: "Meter", now: "Progress") -> None:
    if now.note:
        shown.note(now.note)
    elif now.frames:
        detail = f"run {min(now.runs_done + 1, now.runs)} of {number(now.runs)}" if now.runs else ""
        shown.update(now.stage, done=now.frames_done, total=now.frames, unit="frames", detail=detail)
    else:
        shown.update(now.stage, done=now.runs_done, total=now.runs, unit="runs")


def _document(report: "ConvertReport") -> dict[str, Any]:
    return {**asdict(report), "url": shown_url(report.url), "exit_code": report.exit_code}


def _print(report: "ConvertReport", arguments: argparse.Namespace) -> None:
    from fmristream.cli.tables import print_facts, print_lines, print_table

    if report.shard:
        print_facts(_shard_headline(report), _shard_facts(report))
        print_table("quarantined", ("input", "reason"), [(q.name, q.reason) for q in report.quarantined])
        return
    print_facts(_headline(report, shown_url(arguments.source), shown_url(report.url)), _facts(report))
    print_table("quarantined", ("input", "reason"), [(q.name, q.reason) for q in report.quarantined])
    print_lines("warnings", report.warnings, style="bold yellow")
    print_lines("next", _next_steps(report, arguments))


def _headline(report: "ConvertReport", source: str, url: str) -> str:
    if report.dry_run:
        return f"{source} would be converted into {url}; nothing was written"
    if report.already_there:
        if report.tables_not_compared:
            return f"{url} holds exactly this already (tables beside the runs were not compared); nothing was written"
        return f"{url} holds exactly this already; nothing was written"
    return f"converted {source} into {url}"


def _shard_headline(report: "ConvertReport") -> str:
    where = f"shard {report.shard} of {shown_url(report.url)}"
    if report.stage == "committed":
        return f"{where}: there is a dataset already; nothing was done"
    if report.stage == "masks":
        return (
            f"{where}: masks of {plural(report.runs, 'run')} recorded; run the shards again when all have got here "
            f"(still missing: {number(report.missing_shards)} of them)"
        )
    return f"{where}: {plural(report.runs, 'run')} converted; when all shards are done, run the command without --shard"


def _shard_facts(report: "ConvertReport") -> list[tuple[str, str]]:
    return [
        ("done before", number(report.resumed) if report.resumed else ""),
        ("frames", number(report.frames) if report.frames else ""),
        ("source", size(report.source_bytes) if report.source_bytes else ""),
        ("quarantined", number(len(report.quarantined))),
    ]


def _facts(report: "ConvertReport") -> list[tuple[str, str]]:
    splits = ", ".join(f"{part} {number(count)}" for part, count in sorted(report.splits.items(), key=_by_part))
    stored = size(report.stored_bytes) if report.stored_bytes else ""
    ratio = f" ({report.stored_bytes / report.source_bytes:.2f} of it)" if report.source_bytes and stored else ""
    about = "about " if report.dry_run else ""
    return [
        ("kind", report.source_kind),
        ("runs", number(report.runs) + (f" ({number(report.resumed)} done before)" if report.resumed else "")),
        ("added", number(report.added) if report.added not in (0, report.runs) else ""),
        ("replaced", number(report.replaced) if report.replaced else ""),
        ("subjects", number(report.subjects)),
        ("split", f"{splits} subjects" if splits else "none"),
        ("frames", number(report.frames)),
        ("spaces", ", ".join(space or "unknown" for space in report.spaces)),
        ("source", size(report.source_bytes) if report.source_bytes else ""),
        ("stored", f"{about}{stored}{ratio}" if stored else ""),
        (
            "objects",
            f"{plural(report.objects, 'file')} in {plural(report.folders, 'folder')}" if report.objects else "",
        ),
        ("headers", _headers(report)),
        ("quarantined", number(len(report.quarantined))),
        ("not chosen", _not_chosen(report)),
        ("content", report.content_digest),
        ("generation", report.generation_digest),
    ]


def _by_part(item: tuple[str, int]) -> int:
    order = ("train", "val", "test")
    return order.index(item[0]) if item[0] in order else len(order)


def _not_chosen(report: "ConvertReport") -> str:
    """How many files were left out on purpose, by reason."""
    reasons = Counter(file.reason for file in report.not_chosen)
    return "; ".join(f"{plural(count, 'file')}: {reason}" for reason, count in reasons.most_common())


def _headers(report: "ConvertReport") -> str:
    """What became of NIfTI headers, where any are stored."""
    if report.headers == "keep":
        return "kept, every byte"
    removed = ", ".join(f"{name} ({plural(runs, 'run')})" for name, runs in report.headers_removed.items())
    scrubbed = f"scrubbed; held and removed: {removed or 'nothing'}"
    return {"none": "", "scrub": "to be scrubbed" if report.dry_run else scrubbed}[report.headers]


def _next_steps(report: "ConvertReport", arguments: argparse.Namespace) -> list[str]:
    if report.dry_run:
        return ["run the same command without --dry-run"]
    url = shlex.quote(shown_url(report.url))
    key = f" --pseudonyms {shlex.quote(arguments.pseudonyms)}" if arguments.pseudonyms else ""
    return [
        f"fmristream verify {url} --against {shlex.quote(shown_url(arguments.source))}{as_typed(arguments)}{key}",
        f"fmristream preview {url} --out pictures",
    ]
