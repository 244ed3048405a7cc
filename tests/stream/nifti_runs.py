"""Arrays in, datasets out: what a test wants to see streamed, written as NIfTI and converted."""

from pathlib import Path

import numpy as np

import fmristream
from fmristream.ingest.options import ConvertOptions
from tests.ingest.nifti_files import nifti_bytes


def converted(folder: Path, runs: dict[str, np.ndarray], **header) -> str:
    """A dataset of these (x, y, z, t) arrays by subject, whole volumes, unsplit; `header` replaces header fields."""
    for subject, stored in runs.items():
        (folder / "source").mkdir(parents=True, exist_ok=True)
        (folder / "source" / f"sub-{subject}_bold.nii").write_bytes(nifti_bytes(stored, **header))
    options = ConvertOptions(mask="none", split="none", space="MNI")
    fmristream.convert(str(folder / "source"), str(folder / "dataset"), options=options)
    return str(folder / "dataset")


def streamed(url: str, normalize: str, **options) -> np.ndarray:
    """(x, y, z, t) float32 of the first run as one window, through the map-style dataset."""
    frames = fmristream.open(url).runs[0].frames
    clips = fmristream.StreamingDataset(url, window=frames, normalize=normalize, **options)
    return clips[0]["bold"][0]
