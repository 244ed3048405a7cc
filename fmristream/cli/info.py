"""Say what a dataset holds, from its tables alone."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fmristream.cli.words import as_json, duration, number, plural, size

if TYPE_CHECKING:
    from fmristream.report.info import GridInfo, Info, RunInfo

WHEN_INTERRUPTED = "nothing was changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream info`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument("--runs", action="store_true", help="list every run")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help='list and count runs that meet a condition, such as "age > 60"; implies --runs',
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the dataset's numbers."""
    from fmristream.report.info import describe, describe_runs
    from fmristream.shards.dataset import open_dataset

    dataset = open_dataset(arguments.url)
    info = describe(dataset)
    is_listed = arguments.runs or arguments.where is not None
    chosen = dataset if arguments.where is None else dataset.where(arguments.where)
    rows = describe_runs(chosen) if is_listed else ()
    if arguments.json:
        listed = {"run_table": [asdict(row) for row in rows]} if is_listed else {}
        print(as_json({**info.as_dict(), **listed}))
    else:
        _print(info, rows)
        if arguments.where is not None:
            subjects = len({row.subject for row in rows})
            print(f"{plural(len(rows), 'run')} of {plural(subjects, 'subject')} where {arguments.where}")
    return 0


def _print(info: "Info", rows: "tuple[RunInfo, ...]") -> None:
    from fmristream.cli.tables import print_facts, print_lines, print_table

    print_facts(info.url, _facts(info))
    print_table(
        "splits",
        ("part", "subjects", "runs", "frames"),
        [(s.part, number(s.subjects), number(s.runs), number(s.frames)) for s in info.splits],
    )
    print_table(
        "runs",
        ("name", "subject", "split", "space", "frames", "TR s", "grid", "voxels", "dtype", "stored", "mean", "SD"),
        [_cells(row) for row in rows],
        max_rows=len(rows),
    )
    print_lines("warnings", info.warnings, style="bold yellow")


def _facts(info: "Info") -> list[tuple[str, str]]:
    repetition = ", ".join(f"{tr_s:g} s" for tr_s in info.tr_s[:5]) + (" …" if len(info.tr_s) > 5 else "")
    unknown = f"{'; ' if repetition else ''}unknown in {plural(info.runs_without_tr, 'run')}"
    hours = f", {duration(info.duration_s)}" if info.duration_s is not None else ""
    ratio = f", {info.stored_bytes / info.decoded_bytes:.2f} of the decoded voxels" if info.decoded_bytes else ""
    source = f", {info.stored_bytes / info.source_bytes:.2f} of the source" if info.source_bytes else ""
    grids = "; ".join(_grid(grid, alone=len(info.grids) == 1) for grid in info.grids[:4])
    more = f"; and {len(info.grids) - 4} more" if len(info.grids) > 4 else ""
    return [
        ("runs", number(info.runs)),
        ("subjects", number(info.subjects) + (", under pseudonyms" if info.pseudonyms else "")),
        ("sessions", _some(info.sessions)),
        ("tasks", _some(info.tasks)),
        ("frames", f"{number(info.frames)}{hours}"),
        ("TR", repetition + (unknown if info.runs_without_tr else "")),
        ("grid", grids + more),
        ("space", ", ".join(f"{space or 'unknown'} ({plural(runs, 'run')})" for space, runs in info.spaces.items())),
        ("dtype", ", ".join(f"{dtype} ({plural(runs, 'run')})" for dtype, runs in info.dtypes.items())),
        ("stored", f"{size(info.stored_bytes)} in {plural(info.objects, 'object')}{ratio}{source}"),
        ("layout", f"{info.layout}, codec {info.codec}, format {info.format_version}, written by {info.tool}"),
        ("lossy", _lossy(info)),
        ("resampled", _resampled(info)),
        ("headers", {"none": "", "scrub": "scrubbed", "keep": "original, every byte"}.get(info.headers, info.headers)),
        ("atlases", _atlases(info)),
        ("split", str(info.split["kind"])),
        ("quarantined", number(info.quarantined)),
        ("content", info.content_digest),
        ("generation", f"{info.generation_digest} (number {info.generation})"),
    ]


def _resampled(info: "Info") -> str:
    """What runs that were not so before were resampled to."""
    to = info.resampling
    parts = [f"to TR {to['tr_s']:g} s"] if "tr_s" in to else []
    if "shape" in to:
        parts.append(f"onto a grid of {' x '.join(map(str, to['shape']))}")
    if "voxel_mm" in to:
        parts.append(f"to voxels of {to['voxel_mm']:g} mm")
    return ", ".join(parts)


def _lossy(info: "Info") -> str:
    """The bound that lossy codes hold, and what was measured."""
    if not info.lossy:
        return ""
    return (
        f"every value within {info.lossy['bound_sd']:g} temporal SD; measured at most {info.lossy['max_error_sd']:.4f}, "
        f"rms of a run at most {info.lossy['rms_error_sd']:.4f}"
    )


def _atlases(info: "Info") -> str:
    """By the digits by which `Dataset.parcels` tells them apart."""
    atlases = info.contents.get("atlases", {})
    return "; ".join(f"{digest[:8]} ({plural(int(one['parcels']), 'parcel')})" for digest, one in atlases.items())


def _grid(grid: "GridInfo", *, alone: bool) -> str:
    shape = "×".join(str(size) for size in grid.shape)
    sizes = "×".join(f"{edge:.3g}" for edge in grid.voxel_size_mm)
    runs = "" if alone else f" ({plural(grid.runs, 'run')})"
    if grid.kind == "brain-models":
        shown = f"{plural(len(grid.structures), 'structure')}"
        return f"none: {number(grid.voxels)} grayordinates of {shown}{runs}"
    return f"{shape} {grid.orientation}, {sizes} mm, {number(grid.voxels)} voxels stored ({grid.share:.0%}){runs}"


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")


def _cells(row: "RunInfo") -> tuple[str, ...]:
    return (
        row.name,
        row.subject,
        row.split,
        row.space,
        number(row.frames),
        "–" if row.tr_s is None else f"{row.tr_s:g}",
        "×".join(str(size) for size in row.shape),
        number(row.voxels),
        row.dtype,
        size(row.stored_bytes),
        "–" if row.mean is None else f"{row.mean:.4g}",
        "–" if row.sd is None else f"{row.sd:.4g}",
    )
