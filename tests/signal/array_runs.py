"""A run in memory, as recipes see one: statistics written out in numpy, frames handed out as readers hand them out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fmristream.catalog.run import Run
from fmristream.signal.prepared import Layout, StoredParcels
from fmristream.signal.recipes import parse_recipe, prepare


@dataclass(eq=False)
class ArrayRun:
    """(t, v) stored values of a run; `reads` says which frames were asked for."""

    stored: np.ndarray
    slope: float = 1.0
    inter: float = 0.0
    tr_s: float | None = 2.0
    table: Mapping[str, np.ndarray] | None = None
    mask: np.ndarray | None = None
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    of_atlas: StoredParcels | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)

    where = "memory: run sub-1_bold"

    @property
    def bold(self) -> np.ndarray:
        return self.stored.astype(np.float64) * self.slope + self.inter

    @cached_property
    def run(self) -> Run:
        inside = np.isfinite(self.bold) & (self.bold != 0)
        known = self.bold[inside]
        return Run(
            name="sub-1_bold", subject="1", space="MNI", group="1", frames=len(self.stored), tr_s=self.tr_s,
            shape=(self.stored.shape[1], 1, 1) if self.mask is None else self.mask.shape, voxels=self.stored.shape[1],
            space_digest="00", affine=tuple(self.affine.reshape(-1)), dtype=self.stored.dtype.str, slope=self.slope,
            inter=self.inter, digest="00", object="runs/0", objects_digest="00", residual_wraps=False,
            valid_min=float(np.nanmin(self.stored)), valid_max=float(np.nanmax(self.stored)),
            nonfinite=int((~np.isfinite(self.bold)).sum()), foreground_count=len(known),
            foreground_mean=float(known.mean()), foreground_sd=float(known.std(ddof=1)),
            foreground_min=float(known.min()), foreground_max=float(known.max()), outside=0, source_bytes=0, source_crc="",
        )  # fmt: skip

    @property
    def is_difference(self) -> bool:
        return self.stored.dtype.kind in "iu"

    @cached_property
    def reference(self) -> np.ndarray:
        return np.rint(self.stored[:16].mean(0)).astype(self.stored.dtype)

    @property
    def moments(self) -> np.ndarray:
        return self.exact_moments

    @cached_property
    def exact_moments(self) -> np.ndarray:
        wide = np.where(np.isfinite(self.stored), self.stored, np.nan).astype(np.float64)
        mean, sd = np.nanmean(wide, 0), np.nanstd(wide, 0)
        return np.stack([mean - (self.reference if self.is_difference else 0), sd]).astype(np.float32)

    def read_stored(self, start: int, stop: int) -> np.ndarray:
        self.reads.append((start, stop))
        return self.stored[start:stop].copy()

    @cached_property
    def layout(self) -> Layout:
        mask = np.ones((self.stored.shape[1], 1, 1), dtype=bool) if self.mask is None else self.mask
        return Layout(voxels=self.stored.shape[1], mask=mask, affine=self.affine)

    def confounds(self) -> Mapping[str, Any] | None:
        return self.table

    def parcels(self, atlas: str) -> StoredParcels:
        assert self.of_atlas is not None
        return self.of_atlas


def frames_of(run: ArrayRun, frames: range) -> np.ndarray:
    """What a reader would decode."""
    stored = run.stored[np.array(frames)]
    return stored - run.reference if run.is_difference else stored.copy()


def made(run: ArrayRun, text: str, frames: range | None = None, **options: Any) -> np.ndarray:
    """(c, t, w) float32: what a recipe makes of frames, of all of them where none are named."""
    prepared = prepare(parse_recipe(text, **options), run, exact=True)
    frames = range(len(run.stored)) if frames is None else frames
    out = np.full((prepared.channels, len(frames), prepared.width), np.nan, dtype=np.float32)
    prepared(frames_of(run, frames), frames, out)
    assert np.isfinite(out).all()
    return out


def brain_like(dtype: str = "<i2", *, frames: int = 120, voxels: int = 40, seed: int = 0) -> np.ndarray:
    """(t, v): anatomy, drift, noise; voxel 3 never changes."""
    rng = np.random.default_rng(seed)
    anatomy = rng.uniform(800, 3000, voxels)
    drift = np.linspace(-1, 1, frames)[:, None] * rng.normal(0, 0.05, voxels)
    bold = anatomy * (1 + drift + 0.03 * rng.standard_normal((frames, voxels)))
    bold[:, 3] = 1000
    return bold.astype(dtype)


def table_of(
    frames: int = 120, *, seed: int = 1, bad: tuple[int, ...] = (20, 21, 24, 60, 118)
) -> dict[str, np.ndarray]:
    """Columns as fMRIPrep calls them, first rows of derivatives missing."""
    rng = np.random.default_rng(seed)
    table: dict[str, np.ndarray] = {}
    for axis in ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"):
        course = np.cumsum(rng.normal(0, 0.02, frames))
        slope = np.concatenate([[np.nan], np.diff(course)])
        table |= {axis: course, f"{axis}_derivative1": slope, f"{axis}_power2": course**2}
        table[f"{axis}_derivative1_power2"] = slope**2
    for name in ("white_matter", "csf", "global_signal"):
        table[name] = 500 + rng.normal(0, 5, frames)
    for number in range(6):
        table[f"a_comp_cor_{number:02d}"] = rng.standard_normal(frames)
        table[f"ica_{number:02d}"] = rng.standard_normal(frames)
    for number in (1, 4):
        table[f"fix_noise_{number:02d}"] = table[f"ica_{number:02d}"]
    table["framewise_displacement"] = np.concatenate([[np.nan], rng.uniform(0, 0.3, frames - 1)])
    table["std_dvars"] = np.concatenate([[np.nan], rng.uniform(0.8, 1.2, frames - 1)])
    table["framewise_displacement"][list(bad)] = 0.9
    table["non_steady_state_outlier00"] = np.eye(frames)[0]
    return table
