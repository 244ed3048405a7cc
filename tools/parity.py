"""Run every golden case in a folder through our code and say how far it is from the published numbers.

    python tools/parity.py tests/golden

Exit 0: all known cases are within tolerance; 1: one is not, cannot be read, or the folder has no known case.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmristream.errors import FmriStreamError
from tools.golden import Case, GoldenError, case_names, read_case
from tools.parity_prep import check_prep_swift
from tools.parity_swift import Difference, check_published_swift, check_swift
from tools.parity_tff import check_published_tff, check_tff

# Preprocessed values are stored as float16.
PREP_TOLERANCE = 1e-3


def _check_prep_swift(case: Case) -> list[Difference]:
    case.tensors("io")
    return [
        Difference(group="preprocessing", name=name, value=value, tolerance=PREP_TOLERANCE)
        for name, value in check_prep_swift(case.name, case.folder).items()
    ]


# Beginning of a case's name -> its check.
CHECKS: dict[str, Callable[[Case], list[Difference]]] = {
    "swift_": check_swift,
    "pub_swift_": check_published_swift,
    "prep_swift_": _check_prep_swift,
    "tff_": check_tff,
    "pub_tff_": check_published_tff,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Check a folder; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of golden cases")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    names = case_names(folder)
    known = [name for name in names if name.startswith(tuple(CHECKS))]
    passed = [_report(folder, name) for name in known]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"not known: {', '.join(unknown)}")
    if not known:
        print(f"{folder}: no known case; their names begin with {', '.join(CHECKS)}")
        return 1
    print(f"{sum(passed)} of {len(known)} known cases within tolerance")
    return 0 if all(passed) else 1


def _report(folder: Path, name: str) -> bool:
    """Run one case and print its largest difference per group of tensors."""
    (check,) = [check for beginning, check in CHECKS.items() if name.startswith(beginning)]
    start = time.monotonic()
    try:
        rows = check(read_case(folder, name))
    except (GoldenError, FmriStreamError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        # Whatever a damaged case runs into is that case's failure; the others are still run.
        print(f"{name}: FAILED: {type(error).__name__}: {error}")
        return False
    faults = [row for row in rows if not row.is_within]
    verdict = "ok" if rows and not faults else "FAILED"
    print(f"{name}: {verdict}, {len(rows)} compared in {time.monotonic() - start:.1f} s")
    for group in dict.fromkeys(row.group for row in rows):
        worst = max((row for row in rows if row.group == group), key=_badness)
        print(f"  {group:22} {worst.value:8.1e}  of {worst.tolerance:.0e}  {worst.name}")
    for row in faults:
        print(f"  past tolerance: {row.name} differs by {row.value:.3e}, {row.tolerance:.0e} allowed")
    return verdict == "ok"


def _badness(row: Difference) -> float:
    return row.value if row.value == row.value else float("inf")


if __name__ == "__main__":
    sys.exit(main())
