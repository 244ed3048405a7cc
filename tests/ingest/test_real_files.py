"""What becomes of real scans: a table of expected verdicts, one per file.

The files are not ours to ship (see the licences beside them). Where `FMRISTREAM_REAL_DATA` names a folder with them,
all are converted; those that ship inside the nibabel package are always there.
"""

import csv
import os
from dataclasses import replace
from pathlib import Path

import nibabel
import pytest

import fmristream
from fmristream.ingest.options import ConvertOptions, ConvertReport
from fmristream.ingest.sources.listing import is_cifti, is_dense_series, without_suffix
from fmristream.report.verify import verify

TABLE = Path(__file__).with_name("real_files.tsv")
REAL = Path(os.environ.get("FMRISTREAM_REAL_DATA", "/nonexistent"))
WHOLE = ConvertOptions(mask="none", split="none")


def verdicts() -> dict[str, str]:
    """File -> `converts`, or words that the reason for its quarantine must contain."""
    with TABLE.open(encoding="utf-8") as file:
        return {row["file"]: row["verdict"] for row in csv.DictReader(file, delimiter="\t")}


def check(report: ConvertReport, url: str, expected: dict[str, str]) -> None:
    converted = {run.name for run in fmristream.open(url).runs}
    reasons = {entry.name: entry.reason for entry in report.quarantined}
    wrong = {}
    for file, verdict in expected.items():
        names = {without_suffix(file), file}  # the suffix stays where two files differ in nothing else
        if verdict == "converts":
            if not names & converted:
                wrong[file] = reasons.get(without_suffix(file), "neither converted nor quarantined")
        elif not any(verdict in reasons.get(name, "") for name in names):
            wrong[file] = f"expected {verdict!r}: {[reasons.get(name) for name in names]}"
    assert not wrong
    assert len(converted) + len(reasons) == len(expected)


def require_every_voxel_equal(url: str, source: Path, *, cifti: bool = False) -> None:
    findings = verify(url, deep=True, against=str(source), cifti=cifti)
    assert not findings.faults
    assert findings.voxels_compared > 0


def test_the_runs_inside_nibabel_convert_and_equal_what_nibabel_reads(tmp_path: Path) -> None:
    shipped = Path(nibabel.__file__).parent / "tests" / "data"
    names = ["functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "anatomical.nii", "row_major.dconn.nii"]
    (tmp_path / "scans" / "nibabel").mkdir(parents=True)
    for name in names:
        (tmp_path / "scans" / "nibabel" / name).symlink_to(shipped / name)
    url = str(tmp_path / "dataset")
    report = fmristream.convert(str(tmp_path / "scans"), url, options=WHOLE)
    check(report, url, {f"nibabel/{name}": verdicts()[f"nibabel/{name}"] for name in names})
    require_every_voxel_equal(url, tmp_path / "scans")


@pytest.mark.skipif(not REAL.is_dir(), reason="FMRISTREAM_REAL_DATA names no folder with the real files")
def test_every_real_file_has_the_verdict_of_the_table(tmp_path: Path) -> None:
    url = str(tmp_path / "dataset")
    report = fmristream.convert(str(REAL), url, options=WHOLE)
    assert report.exit_code == 3
    series = {file for file in verdicts() if is_dense_series(file)}
    assert {file.name for file in report.not_chosen} == series
    check(report, url, {file: verdict for file, verdict in verdicts().items() if file not in series})
    require_every_voxel_equal(url, REAL)


@pytest.mark.skipif(not REAL.is_dir(), reason="FMRISTREAM_REAL_DATA names no folder with the real files")
def test_every_real_cifti_file_has_the_verdict_of_the_table(tmp_path: Path) -> None:
    url = str(tmp_path / "dataset")
    report = fmristream.convert(str(REAL), url, options=replace(WHOLE, cifti=True))
    check(report, url, {file: verdict for file, verdict in verdicts().items() if is_cifti(file)})
    require_every_voxel_equal(url, REAL, cifti=True)
