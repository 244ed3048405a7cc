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
from tools.parity_brainlm import check_brainlm, check_published_brainlm, check_published_vitmae, check_vitmae
from tools.parity_prep import CHECKS as PREP_CHECKS
from tools.parity_swift import Difference, check_published_swift, check_swift
from tools.parity_tff import check_published_tff, check_tff

# SwiFT stores preprocessed values as float16; the others, up to 700 large, as float32.
PREP_TOLERANCES = {"prep_swift_": 1e-3}
PREP_TOLERANCE = 1e-4


def _check_prep(case: Case) -> list[Difference]:
    case.tensors("io")
    ((beginning, check),) = [item for item in PREP_CHECKS.items() if case.name.startswith(item[0])]
    tolerance = PREP_TOLERANCES.get(beginning, PREP_TOLERANCE)
    return [
        Difference(group="preprocessing", name=name, value=value, tolerance=tolerance)
        for name, value in check(case.name, case.folder).items()
    ]


# Beginning of a case's name -> its check; the longest beginning decides.
CHECKS: dict[str, Callable[[Case], list[Difference]]] = {
    "swift_": check_swift,
    "pub_swift_": check_published_swift,
    **dict.fromkeys(PREP_CHECKS, _check_prep),
    "brainlm_": check_brainlm,
    "brainlm_vitmae_": check_vitmae,
    "pub_brainlm_": check_published_brainlm,
    "pub_brainlm_vitmae_": check_published_vitmae,
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
    check = CHECKS[max((beginning for beginning in CHECKS if name.startswith(beginning)), key=len)]
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
