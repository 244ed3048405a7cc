"""Write runs as NIfTI files again: byte for byte the source where the dataset keeps original headers."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fmristream.cli.words import as_json, number, on_one_line, plural, size

if TYPE_CHECKING:
    from fmristream.catalog.run import Run
    from fmristream.report.export import Exported
    from fmristream.shards.dataset import Dataset

WHEN_INTERRUPTED = "files that are listed are complete, others were not made"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmristream export`."""
    parser.add_argument("url", metavar="URL", help="the dataset")
    parser.add_argument("out", metavar="OUT", help="a file, .nii or .nii.gz; with --all a folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="NAME", help="the run to write; `fmristream info --runs` lists the names")
    which.add_argument("--all", action="store_true", help="write every run into the folder OUT, as .nii.gz")
    parser.add_argument("--plain", action="store_true", help="with --all: write .nii, not compressed")
    parser.add_argument("--force", action="store_true", help="replace files that are there")


def run(arguments: argparse.Namespace) -> int:
    """Write, and say of each file what it is; 1 if a run could not be read."""
    from fmristream.cli.progress import meter
    from fmristream.errors import CorruptDataError, FormatError, ObjectMissingError
    from fmristream.report.export import export_run
    from fmristream.shards.dataset import open_dataset

    dataset = open_dataset(arguments.url)
    targets = _targets(dataset, arguments)
    written: list[Exported] = []
    faults: list[tuple[str, str]] = []
    total, done = sum(one.frames for one, _ in targets), 0
    with meter(quiet=arguments.quiet) as shown:

        def tell(frames: int) -> None:
            nonlocal done
            done += frames
            shown.update("writing", done=done, total=total, unit="frames")

        for one, path in targets:
            try:
                written.append(export_run(dataset, one, path, force=arguments.force, progress=tell))
            except (CorruptDataError, FormatError, ObjectMissingError) as error:
                if not arguments.all:
                    raise
                faults.append((one.name, str(error)))  # the others may be whole
    if arguments.json:
        faulty = [{"run": name, "what": what} for name, what in faults]
        print(as_json({"files": [asdict(file) for file in written], "faults": faulty}))
    else:
        _print(written, faults)
    return 1 if faults else 0


def _targets(dataset: "Dataset", arguments: argparse.Namespace) -> "list[tuple[Run, Path]]":
    from fmristream.errors import UsageError
    from fmristream.report.export import file_names

    if arguments.all:
        names = file_names(dataset.runs, suffix=".nii" if arguments.plain else ".nii.gz")
        targets = [(one, Path(arguments.out) / names[one.name]) for one in dataset.runs]
        present = [str(path) for _, path in targets if path.exists()]
        if present and not arguments.force:
            shown = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
            raise UsageError(
                f"{len(present)} of {len(targets)} files exist already ({shown}); give another folder, or --force"
            )
        return targets
    if arguments.run is None and len(dataset.runs) != 1:
        raise UsageError(f"the dataset has {plural(len(dataset.runs), 'run')}; give --run NAME or --all")
    return [(dataset.run(arguments.run or 0), Path(arguments.out))]


def _print(written: "Sequence[Exported]", faults: Sequence[tuple[str, str]]) -> None:
    from fmristream.cli.tables import print_facts, print_table

    for file in written[: 1 if len(written) == 1 else 0]:
        facts = [
            ("run", file.run),
            ("file", size(file.bytes)),
            ("image", f"{number(file.stream_bytes)} bytes, sha256 {file.stream_sha256}"),
            ("header", _header(file)),
        ]
        print_facts(file.path, facts)
    if len(written) > 1:
        rows = [(file.path, size(file.bytes), _header(file)) for file in written]
        print_table("files", ("path", "size", "header"), rows, max_rows=len(rows))
    print_table("faults", ("run", "what"), [(name, on_one_line(what)) for name, what in faults])


def _header(file: "Exported") -> str:
    """What the header is, and in what the image differs from its source."""
    return "; ".join(file.notes) or "original: the image is the source's, byte for byte"
