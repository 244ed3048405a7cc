"""Write a synthetic cohort that looks like BOLD, as a BIDS dataset or as fMRIPrep derivatives.

    python tools/synth.py OUT --subjects 16 --effect coupling --controls
    python tools/synth.py OUT --subjects 4 --shape 91x109x91 --frames 300 --derivatives

The same cohort needs no disk as a synth:// URL; this tool is for trying real files and real folders.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from fmristream._version import __version__
from fmristream.errors import FmriStreamError, UsageError
from fmristream.synth import Cohort, parse_url

TEMPLATE = "MNI152NLin2009cAsym"
SCANNER_CODE, TEMPLATE_CODE = 1, 4
# NIfTI-1 counts frames and voxels in 16 bits.
MAX_LENGTH = 32_767
MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the cohort and where its files go."""

    subject: int
    run: int
    folder: Path
    stem: str


def write_bids(cohort: Cohort, root: Path) -> Iterator[Path]:
    """A raw dataset: whole heads as a scanner sees them. Yields each run's file when it is written."""
    _write_top(cohort, root, kind="raw", made_by={"Name": "fmristream synthetic cohort", "Version": __version__})
    for run in _runs(cohort, root):
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / f"{run.stem}_bold.nii.gz"
        write_nifti(path, cohort.run_frames(run.subject, run.run), _header(cohort, space_code=SCANNER_CODE))
        _write_json(path, {"TaskName": "rest", "RepetitionTime": cohort.tr_s})
        yield path


def write_fmriprep(cohort: Cohort, root: Path) -> Iterator[Path]:
    """Derivatives as fMRIPrep names them: bold, brain mask, confounds. Yields each run's bold file."""
    made_by = {"Name": "fMRIPrep", "Version": "24.1.1", "Description": "simulated by fmristream; nothing was processed"}
    _write_top(cohort, root, kind="derivative", made_by=made_by)
    mask = cohort.brain_mask()
    for run in _runs(cohort, root):
        run.folder.mkdir(parents=True, exist_ok=True)
        spaced = f"{run.stem}_space-{TEMPLATE}"
        path = run.folder / f"{spaced}_desc-preproc_bold.nii.gz"
        global_signal: list[float] = []
        frames = _watched(cohort.run_frames(run.subject, run.run), mask, global_signal)
        write_nifti(path, frames, _header(cohort, space_code=TEMPLATE_CODE))
        _write_json(path, {"TaskName": "rest", "RepetitionTime": cohort.tr_s, "SkullStripped": cohort.masked})
        mask_path = run.folder / f"{spaced}_desc-brain_mask.nii.gz"
        write_nifti(mask_path, [mask.astype(np.uint8)], _mask_header(cohort))
        _write_json(mask_path, {"Type": "Brain"})
        _write_confounds(run, cohort, np.array(global_signal))
        yield path


def write_nifti(path: Path, frames: Iterable[npt.NDArray], header: Any) -> None:
    """A header and its frames, one after the other, so that a run never stands in memory. The same bytes every time."""
    with _reproducible_gzip(path) as file:
        header.write_to(file)
        file.write(bytes(int(header["vox_offset"]) - int(header["sizeof_hdr"]) - 4))
        for frame in frames:
            file.write(frame.tobytes(order="F"))


@contextmanager
def _reproducible_gzip(path: Path) -> Iterator[BinaryIO]:
    """Level 1, without time stamp and file name."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file:
        yield file


def _header(cohort: Cohort, *, space_code: int) -> Any:
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.dtype(cohort.dtype))
    header.set_data_shape((*cohort.shape, cohort.frames))
    header.set_qform(cohort.affine(), code=space_code)
    header.set_sform(cohort.affine(), code=space_code)
    header.set_zooms((*[cohort.voxel_size_mm] * 3, cohort.tr_s))
    return _single_file(header)


def _mask_header(cohort: Cohort) -> Any:
    header = _header(cohort, space_code=TEMPLATE_CODE)
    header.set_data_shape(cohort.shape)
    header.set_data_dtype(np.uint8)
    return header


def _single_file(header: Any) -> Any:
    header.set_xyzt_units("mm", "sec")
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    return header


def _runs(cohort: Cohort, root: Path) -> Iterator[Run]:
    for subject, label in enumerate(cohort.subject_labels()):
        for run in range(cohort.runs):
            entity = f"_run-{run + 1}" if cohort.runs > 1 else ""
            stem = f"sub-{label}_task-rest{entity}"
            yield Run(subject=subject, run=run, folder=root / f"sub-{label}" / "func", stem=stem)


def _write_top(cohort: Cohort, root: Path, *, kind: str, made_by: dict[str, str]) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root}: exists and is not an empty folder; name a new one")
    if max(*cohort.shape, cohort.frames) > MAX_LENGTH:
        raise UsageError(f"{cohort.url()}: NIfTI-1 holds at most {MAX_LENGTH} voxels or frames along an axis")
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": f"Synthetic cohort {cohort.url()}", "BIDSVersion": "1.10.0", "DatasetType": kind}
    _write_json(root / "dataset_description", description | {"GeneratedBy": [made_by]})
    rows = [(f"sub-{row['subject']}", row["sex"], row["age"]) for row in cohort.participants()]
    _write_table(root / "participants.tsv", ("participant_id", "sex", "age"), rows)
    columns = {"sex": {"Levels": {"F": "female", "M": "male"}}, "age": {"Units": "year"}}
    _write_json(root / "participants", columns)
    text = f"Made up, to try software on: {cohort.url()}\nNobody was scanned; sex and age are drawn at random.\n"
    (root / "README").write_text(text, encoding="utf-8")


def _watched(frames: Iterable[npt.NDArray], mask: npt.NDArray, means: list[float]) -> Iterator[npt.NDArray]:
    """The frames, noting each one's mean over the brain."""
    for frame in frames:
        means.append(float(frame[mask].mean(dtype=np.float64)))
        yield frame


def _write_confounds(run: Run, cohort: Cohort, global_signal: npt.NDArray) -> None:
    motion = np.zeros((6, cohort.frames))
    motion[:3] = cohort.motion_mm(run.subject, run.run)
    displaced = np.abs(np.diff(motion, axis=1)).sum(axis=0)
    displacement = ["n/a", *(f"{mm:.6f}" for mm in displaced)]
    rows = [
        (f"{brain:.4f}", moved, *(f"{value:.6f}" for value in place))
        for brain, moved, place in zip(global_signal, displacement, motion.T, strict=True)
    ]
    names = ("global_signal", "framewise_displacement", *MOTION_COLUMNS)
    _write_table(run.folder / f"{run.stem}_desc-confounds_timeseries.tsv", names, rows)


def _write_table(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    lines = ["\t".join(str(cell) for cell in row) for row in (names, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Beside an image, or at a path without suffix."""
    path = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    default = Cohort()
    parser = argparse.ArgumentParser(prog="tools/synth.py", description="Write a synthetic cohort as BIDS.")
    parser.add_argument("out", type=Path, help="a folder that is new or empty")
    parser.add_argument("--subjects", default=default.subjects, help=f"how many (default: {default.subjects})")
    parser.add_argument("--runs", default=default.runs, help=f"per subject (default: {default.runs})")
    parser.add_argument("--shape", default="24x24x24", help="voxels along x, y and z (default: 24x24x24)")
    parser.add_argument("--frames", default=default.frames, help=f"per run (default: {default.frames})")
    parser.add_argument("--tr-s", default=default.tr_s, help=f"seconds from frame to frame (default: {default.tr_s})")
    parser.add_argument("--voxel-size-mm", help="default: the longest side spans 192 mm")
    parser.add_argument("--effect", default=default.effect, help="none, coupling, amplitude or order (default: none)")
    parser.add_argument("--strength", default=default.strength, help=f"of the effect (default: {default.strength})")
    parser.add_argument("--seed", default=default.seed, help=f"default: {default.seed}")
    parser.add_argument("--dtype", default=default.dtype, help=f"default: {default.dtype}")
    parser.add_argument("--masked", action="store_true", help="zero outside the brain; the default is whole heads")
    parser.add_argument("--derivatives", action="store_true", help=f"as fMRIPrep derivatives in {TEMPLATE}")
    parser.add_argument("--controls", action="store_true", help="print how well simple readers tell sex")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cohort and say what is there; 0, or 2 for what makes no sense."""
    from rich.console import Console
    from rich.progress import track

    chosen = vars(_parser().parse_args(arguments))
    out, derivatives, wants_controls = (chosen.pop(name) for name in ("out", "derivatives", "controls"))
    told = {name: str(value).lower() for name, value in chosen.items() if value is not None}
    try:
        cohort = parse_url(f"synth://?{urlencode(told)}")
        writing = (write_fmriprep if derivatives else write_bids)(cohort, out)
        total = cohort.subjects * cohort.runs
        paths = list(track(writing, "writing runs", total=total, console=Console(stderr=True), transient=True))
    except FmriStreamError as problem:
        print(problem, file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in paths)
    print(f"{out}: {len(paths)} runs of {cohort.subjects} subjects, {size / 1e6:.1f} MB, {cohort.url()}")
    if wants_controls:
        from tools.controls import cohort_table

        print(cohort_table(cohort))
    return 0


if __name__ == "__main__":
    # `python tools/synth.py` puts tools/ on the path, not the checkout that holds it.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
