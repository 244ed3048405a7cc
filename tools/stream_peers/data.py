"""Runs that every layout is made of, and what a reader has to know of them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench_convert import gzip_writer, nifti_header

TEMPORAL_SD = 0.016  # of the mean: what sets how well frames compress
TFF_CROP = (slice(8, -8), slice(8, -8), slice(0, -10))  # of x, y, z, as its preprocessing has them for HCP
TFF_DROPPED = 10  # first frames

Sample = tuple[int, int, Any]  # run, first frame, what came of it


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The data in a folder; goes to other processes as JSON.

    Attributes:
        folder: of everything.
        shape: (x, y, z).
        frames: of each run.
        runs: how many.
        window: frames.
        objects: codec -> the runs' Zarr groups in our dataset of that codec, in the order of the runs.
        url: where layouts are read from; the folder itself, or a server's URL.
    """

    folder: str
    shape: tuple[int, int, int]
    frames: int
    runs: int
    window: int
    objects: dict[str, list[str]]
    url: str = ""

    @classmethod
    def load(cls, folder: Path) -> "Facts":
        """Of a folder that was made."""
        return cls.parse((folder / "facts.json").read_text())

    @classmethod
    def parse(cls, text: str) -> "Facts":
        """The inverse of `text`."""
        values = json.loads(text)
        return cls(**{**values, "shape": tuple(values["shape"])})

    @property
    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def where(self, layout: str) -> str:
        """Path or URL of a layout."""
        return f"{self.url or self.folder}/{layout}"

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(x, y, z)."""
        return np.load(self.path / "mask.npy")

    def nifti(self, run: int, *, gzipped: bool = False) -> Path:
        """A run's file."""
        return self.path / "nifti" / f"{name_of(run)}.nii{'.gz' if gzipped else ''}"

    def stored(self, run: int) -> NDArray[np.int16]:
        """(t, x, y, z) of a run, mapped; x is fast."""
        shape = (self.frames, *self.shape[::-1])
        return np.memmap(self.nifti(run), dtype="<i2", mode="r", offset=352, shape=shape).transpose(0, 3, 2, 1)

    def moments(self, run: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(x, y, z) temporal mean and 1 / SD, exactly; 0 outside the mask."""
        mean, inverse = np.load(self.path / "moments.npy", mmap_mode="r")[run]
        return mean, inverse

    def zscored(self, run: int, start: int, stop: int) -> NDArray[np.float16]:
        """(t, x, y, z) per-voxel z of frames: what every layout that is prepared in advance holds."""
        mean, inverse = self.moments(run)
        return ((self.stored(run)[start:stop] - mean) * inverse).astype(np.float16)

    def clips(self) -> Iterator[tuple[int, int]]:
        """(run, first frame) of windows that follow each other: what layouts of clips hold."""
        for run in range(self.runs):
            for start in range(0, self.frames - self.window + 1, self.window):
                yield run, start


def name_of(run: int) -> str:
    """As the file is called, which is what our dataset calls it."""
    return f"sub-{run + 1:02d}_task-rest_bold"


def draw(facts: Facts, seed: int, *, first: int = 0) -> Iterator[tuple[int, int]]:
    """(run, first frame) of random windows, without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.integers(facts.runs)), int(rng.integers(first, facts.frames - facts.window + 1))


def make(folder: Path, *, shape: tuple[int, int, int], frames: int, runs: int, window: int) -> Facts:
    """Noise about a smooth image in an ellipsoid of a quarter of the volume, as int16 `.nii` and `.nii.gz`."""
    facts = Facts(folder=str(folder), shape=shape, frames=frames, runs=runs, window=window, objects={})
    (folder / "nifti").mkdir(parents=True, exist_ok=True)
    mask, anatomy = _anatomy(shape)
    np.save(folder / "mask.npy", mask)
    _write_nifti(folder / "mask.nii", mask.astype(np.int16)[None])
    for run in range(runs):
        rng = np.random.default_rng(run)
        with open(facts.nifti(run), "wb") as file:
            file.write(nifti_header((*shape, frames), "int16"))
            for _ in range(frames):
                noise = rng.standard_normal(shape, dtype=np.float32)
                file.write(np.rint(anatomy * (1 + TEMPORAL_SD * noise)).astype("<i2").tobytes("F"))
        _compress(facts.nifti(run), facts.nifti(run, gzipped=True))
    np.save(folder / "moments.npy", np.stack([_moments(facts.stored(run), mask) for run in range(runs)]))
    return facts


def _anatomy(shape: tuple[int, int, int]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    # .79 of each half axis: 26 % of the volume, 235,000 voxels at 2 mm, as the MNI brain has.
    mask = sum((axis / 0.8) ** 2 for axis in axes) < 1
    waves = sum(np.sin(7 * axis + number) for number, axis in enumerate(axes))
    return mask, ((10_000 + 1000 * waves) * mask).astype(np.float32)


def _moments(stored: NDArray[np.int16], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    total, squares = np.zeros(mask.shape), np.zeros(mask.shape)
    for frame in stored:
        total += frame
        squares += frame.astype(np.float64) ** 2
    mean = total / len(stored)
    sd = np.sqrt(np.maximum(squares / len(stored) - mean**2, 0))
    inverse = np.divide(1, sd, out=np.zeros_like(sd), where=sd > 0)
    return np.stack([mean, inverse]).astype(np.float32)


def _write_nifti(path: Path, frames: NDArray[np.int16]) -> None:
    path.write_bytes(
        nifti_header((*frames.shape[1:], len(frames)), "int16") + frames.transpose(0, 3, 2, 1).astype("<i2").tobytes()
    )


def _compress(source: Path, target: Path) -> None:
    with open(source, "rb") as read, gzip_writer(target) as write:
        shutil.copyfileobj(read, write, 2**20)
