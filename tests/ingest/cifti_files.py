"""CIFTI-2 dense series: axes and XML by nibabel, the file around them byte by byte, lies included."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.cifti2 import BrainModelAxis, Cifti2Header, Cifti2MetaData, SeriesAxis

from tests.ingest.nifti_files import nifti_bytes

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1]])
VOLUME = (5, 4, 3)
DENSE_SERIES = 3002
SURFACE_VERTICES = 32492  # of the 32k mesh of fsLR


def brain_models(*, vertices: int = 21, shift: int = 0) -> BrainModelAxis:
    """Two cortices that lack some vertices, and two structures of voxels; `shift` moves one voxel."""
    left = BrainModelAxis.from_surface(np.arange(0, 2 * vertices, 2), SURFACE_VERTICES, "CORTEX_LEFT")
    right = BrainModelAxis.from_surface(np.arange(5, 5 + vertices), SURFACE_VERTICES, "CORTEX_RIGHT")
    thalamus = np.zeros(VOLUME, bool)
    thalamus[1:3, 1, :] = True
    stem = np.zeros(VOLUME, bool)
    stem[4, 2, :2] = True
    stem[0, 0, shift] = True
    return (
        left
        + right
        + BrainModelAxis.from_mask(thalamus, name="THALAMUS_LEFT", affine=AFFINE)
        + BrainModelAxis.from_mask(stem, name="BRAIN_STEM", affine=AFFINE)
    )


def xml_of(axis: BrainModelAxis, *, frames: int, step: float = 0.72, start: float = 0.0) -> bytes:
    """The XML that nibabel writes for a dense series."""
    header = Cifti2Header.from_axes((SeriesAxis(start, step, frames), axis))
    header.matrix.metadata = Cifti2MetaData({"ParentProvenance": "scanned by Dr Jo Doe on 1999-12-31"})
    return bytes(header.to_xml())


def cifti_bytes(values: "np.ndarray[Any, Any]", xml: bytes, *, order: str = "<", **lies: Any) -> bytes:
    """A file of (t, grayordinates) values, stored series by series as CIFTI says; `lies` replace header fields."""
    size = (8 + len(xml) + 15) // 16 * 16
    extension = struct.pack(order + "2i", size, 32) + xml.ljust(size - 8, b"\0")
    stored = values.reshape(1, 1, 1, 1, *values.shape)
    return nifti_bytes(stored, version=2, order=order, extension=extension, **({"intent_code": DENSE_SERIES} | lies))


def series_like(frames: int, axis: BrainModelAxis, dtype: str = "f4", *, seed: int = 0) -> "np.ndarray[Any, Any]":
    """(t, grayordinates) of noise about a mean of their own."""
    rng = np.random.default_rng(seed)
    values = 1000 + 100 * rng.normal(size=len(axis)) + 5 * rng.normal(size=(frames, len(axis)))
    return np.asarray(values.astype(np.dtype(dtype).newbyteorder("<")))


def write_series(folder: Path, runs: dict[str, "np.ndarray[Any, Any]"], axis: BrainModelAxis, **options: Any) -> Path:
    """Files of these names (without `.dtseries.nii`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in runs.items():
        data = cifti_bytes(values, xml_of(axis, frames=len(values), **options))
        (folder / f"{name}.dtseries.nii").write_bytes(data)
    return folder
