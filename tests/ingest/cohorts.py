"""Small cohorts of NIfTI files for conversions, and what a dataset holds, as comparable values."""

from pathlib import Path

import numpy as np
import pytest

import fmristream
from fmristream.errors import FormatError
from fmristream.ingest.options import ConvertOptions, ConvertReport
from fmristream.storage import open_store
from tests.ingest.nifti_files import gzip_members, nifti_bytes

SHAPE = (7, 6, 5, 20)

WHOLE = ConvertOptions(mask="none", split="none")


def bold(dtype: str = "i2", *, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A brain of sorts: an anatomy that fluctuates by a few percent."""
    rng = np.random.default_rng(seed)
    anatomy = rng.uniform(0.3, 1.0, shape[:3]) * (100 if dtype in ("u1", "i1") else 4000)
    noise = 1 + 0.04 * rng.standard_normal(shape)
    return np.asfortranarray((anatomy[..., None] * noise).astype(f"<{dtype}"))


def write_runs(folder: Path, runs: dict[str, np.ndarray], *, gzipped: bool = True, **header) -> str:
    """`<name>.nii.gz` for every array."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, stored in runs.items():
        data = nifti_bytes(stored, **header)
        path = folder / f"{name}.nii{'.gz' if gzipped else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip_members(data, level=1) if gzipped else data)
    return str(folder)


def six_runs(folder: Path, **header) -> str:
    """Three subjects with two runs each."""
    names = [f"sub-{subject}/sub-{subject}_run-{run}_bold" for subject in "abc" for run in (1, 2)]
    return write_runs(folder, {name: bold(seed=seed) for seed, name in enumerate(names)}, **header)


def convert(source: str, url: str, **options) -> ConvertReport:
    """Whole volumes, no split, unless told otherwise."""
    return fmristream.convert(source, url, options=ConvertOptions(**{"mask": "none", "split": "none", **options}))


def contents(url: str) -> dict[str, bytes]:
    """The stored values of every run that can be read, all of it."""
    dataset = fmristream.open(url)
    return {run.name: dataset.reader(run).read_stored(0, run.frames).tobytes() for run in dataset.runs}


def is_committed(url: str) -> bool:
    """Whether there is a dataset; where there is none, opening must say just that."""
    if open_store(url).list("generations"):
        return True
    with pytest.raises(FormatError, match="no dataset here"):
        fmristream.open(url)
    return False


def stored_bytes_of(array: np.ndarray) -> bytes:
    """What `contents` says of a run that is stored whole."""
    return np.moveaxis(array, -1, 0).reshape(array.shape[-1], -1).tobytes()


def objects(url: str) -> set[str]:
    """Every object below a dataset's root but unfinished scratch files."""
    store = open_store(url)
    folders = ("confounds", "events", "generations", "headers", "index", "pending", "recordings", "runs", "sketches", "spaces",
               "stats", "tables")  # fmt: skip
    return {key for folder in folders for key in store.list(folder)}


def stored(url: str) -> dict[str, bytes]:
    """The same with their bytes, and what `gc` and others leave beside them."""
    store = open_store(url)
    return {key: store.read(key) for key in sorted({*objects(url), *store.list("receipts"), *store.list("notes")})}
