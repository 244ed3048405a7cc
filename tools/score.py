"""Compute the report of a run again, from its table of predictions alone: no network, no data, no torch.

    python tools/score.py runs/swift_sex
    python tools/score.py predictions.parquet --out report.json

The numbers are those of the run's report.json to the last bit; where that says something else, this fails and names it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` and `train` are not installed

from fmristream.errors import FmriStreamError, UsageError
from train.files import read_json, write_whole
from train.predictions import FILE, read_predictions
from train.report import print_table, report_text
from train.summary import report_of

DONE, DIFFERS, WRONG_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a table; the exit status is 0, 1 (damaged, or not what report.json says) or 2."""
    options = _parser().parse_args(arguments)
    try:
        path = options.source / FILE if options.source.is_dir() else options.source
        report = report_of(read_predictions(path))
        said = None if options.out is not None else read_json(path.with_name("report.json"))
    except FmriStreamError as error:
        print(f"score: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else DIFFERS
    print_table(report)
    text = report_text(report)
    if options.out is not None:
        try:
            write_whole(options.out, text)
        except OSError as error:
            print(f"score: {options.out}: {error.strerror}; give another --out", file=sys.stderr)
            return WRONG_USAGE
        print(f"written: {options.out}")
    elif said is not None:
        differing = differences(json.loads(text), said)
        found = f"says something else of {', '.join(differing)}; --out FILE writes what the table says"
        print(f"{path.with_name('report.json')}: {found if differing else 'the same numbers'}")
        return DIFFERS if differing else DONE
    return DONE


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What a report says otherwise than its table, bit for bit; what else it holds (a verdict beside baselines) may be.

    Numbers of a split that the table lacks may not.
    """
    lost = [key for key in ("val", "test", "targets") if key in theirs and key not in ours]
    return [key for key, value in ours.items() if key not in theirs or theirs[key] != value] + lost


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tools/score.py", description="Recompute a report from predictions.")
    parser.add_argument(
        "source", type=Path, metavar="OUT_OR_PARQUET", help="folder of a finished run, or its predictions.parquet"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the report; else it is compared")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
