"""What each codec costs and what it changes: bytes a voxel, speed, error in temporal SD, functional connectivity.

    python -m tools.bench_codecs [FILE.nii.gz ...] [--frames 240] [--rounds 3] [--json RESULT.json]

Without files an int16 and a float32 run of 64 x 64 x 36 voxels are made: an anatomy with shared slow fluctuations, 1.6 % temporal
SD, and three frames of motion. Every run is converted in each codec; what is read back is compared with what the source
stored, for every voxel of the mask and every frame. Beside them two codings that others use, made here of the same values:
z-scores as float16, and z-scores as int8 of one step for the whole run (max|z| / 127).

Bytes a voxel and frame are those of the frames, and in brackets of all objects of the run but zarr.json. Speed is MB of the
source's values a second in one thread: encoding in memory, with statistics and digests, and for lossy codecs with their
first pass; decoding to stored values, from files in the page cache. Errors are over voxels that change. Connectivity is the
correlation of random pairs of voxels, and of the means of 100 blocks of consecutive voxels: the largest and mean change of r.
"""

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fmristream
from fmristream.catalog.run import Run
from fmristream.ingest.options import ConvertOptions
from fmristream.shards.dataset import Dataset
from fmristream.shards.run_writer import RunWriter
from fmristream.signal.quantize import LOSSY_CODECS, Quantizer, RangeMeasure
from fmristream.storage import open_store

CODECS = ("lossless", "raw", "int16", "int8")
SHAPE = (64, 64, 36)
BLOCKS = 100
PAIRS_OF = 600  # voxels, of which all pairs are taken
# Frames that are decoded at a time: a window of training.
WINDOW = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One coding of one run."""

    run: str
    codec: str
    bytes_per_voxel: float  # of frames
    all_bytes_per_voxel: float  # with what is stored once a run, by voxel
    encode_mb_s: float | None  # None: a coding that is here for its errors only
    decode_mb_s: float | None
    bound_sd: float | None
    max_error_sd: float
    rms_error_sd: float
    escaped_share: float
    voxel_dr_max: float
    voxel_dr_mean: float
    block_dr_max: float
    block_dr_mean: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a stored bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="runs to use instead of made ones")
    parser.add_argument("--frames", type=int, default=240, help="of made runs")
    parser.add_argument("--shape", default="x".join(map(str, SHAPE)), help="of made runs")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median speed is told")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fmristream-codecs-") as scratch:
        shape = tuple(int(size) for size in options.shape.split("x"))
        files = options.files or made_runs(Path(scratch), (*shape, options.frames))
        rows = [
            row
            for number, file in enumerate(files)
            for row in rows_of(file, Path(scratch) / str(number), rounds=options.rounds)
        ]
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    broken = [row for row in rows if row.bound_sd is not None and row.max_error_sd > row.bound_sd * (1 + 1e-6)]
    for row in broken:
        print(f"{row.run}, {row.codec}: the bound {row.bound_sd} does not hold: {row.max_error_sd}", file=sys.stderr)
    return 1 if broken else 0


def made_runs(folder: Path, shape: tuple[int, ...]) -> list[Path]:
    """An int16 and a float32 run of the same signal."""
    import nibabel

    rng = np.random.default_rng(0)
    x, y, z, frames = shape
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in (x, y, z)), indexing="ij"))
    brain = (grid**2).sum(axis=0) < 0.7
    anatomy = np.where(brain, rng.uniform(6000, 12000, (x, y, z)), 0)
    slow = np.cumsum(rng.standard_normal((8, frames)), axis=1)
    slow = (slow - slow.mean(axis=1, keepdims=True)) / slow.std(axis=1, keepdims=True)
    weights = rng.uniform(-1, 1, (8, 4, 4, 4)).repeat(-(-x // 4), 1).repeat(-(-y // 4), 2).repeat(-(-z // 4), 3)
    paths = [folder / f"made_{name}.nii" for name in ("int16", "float32")]
    bold = np.empty(shape, dtype=np.float32)
    for t in range(frames):
        change = np.tensordot(slow[:, t], weights[:, :x, :y, :z], axes=1) * 0.004 + 0.014 * rng.standard_normal(
            (x, y, z)
        )
        motion = {frames // 3: 0.1, frames // 3 + 1: 0.1, frames // 2: 0.3}.get(t, 0.0) * grid[1]
        bold[..., t] = anatomy * (1 + change + motion)
    for path, dtype in zip(paths, ("<i2", "<f4"), strict=True):
        nibabel.save(nibabel.Nifti1Image(bold.astype(dtype), np.diag([3.0, 3.0, 3.0, 1.0])), path)
    return paths


def rows_of(file: Path, folder: Path, *, rounds: int) -> Iterator[Row]:
    """One run in every coding."""
    exact = _converted(file, folder / "lossless", "lossless")
    run = exact.run(0)
    values = exact.reader(run).read_stored(0, run.frames)
    compare = Comparison(file.name.partition(".")[0], values)
    for codec in CODECS:
        dataset = exact if codec == "lossless" else _converted(file, folder / codec, codec)
        reader = dataset.reader(0)
        decoded = reader.read_stored(0, run.frames)
        told = reader.attributes.get("quantization", {})
        yield compare.row(
            codec,
            decoded.astype(np.float64),
            bytes_per_voxel=_stored_bytes(dataset, reader.frames_array.name) / values.size,
            all_bytes_per_voxel=_stored_bytes(dataset) / values.size,
            encode_mb_s=values.nbytes / 1e6 / _seconds(lambda c=codec: _encode(exact, run, values, c), rounds),
            decode_mb_s=values.nbytes / 1e6 / _seconds(lambda r=reader: _decode(r, run), rounds),
            bound_sd=told.get("bound_sd"),
            escaped_share=told.get("escaped", 0) / values.size,
        )
    yield from compare.others()


class Comparison:
    """A run's values, and what other values change of them; errors and correlations in float64."""

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        self._name = name
        finite = np.isfinite(values).all(axis=0)
        self._all = values.astype(np.float64)
        with np.errstate(invalid="ignore"):
            known = np.where(np.isfinite(self._all), self._all, np.nan)
            self._known = np.isfinite(known).any(axis=0)
            self._mean, self._sd = np.zeros(values.shape[1]), np.zeros(values.shape[1])
            self._mean[self._known] = np.nanmean(known[:, self._known], axis=0)
            self._sd[self._known] = np.nanstd(known[:, self._known], axis=0)
        low, high = np.nanmin(np.nan_to_num(known), axis=0), np.nanmax(np.nan_to_num(known), axis=0)
        self._changing = (self._sd > 0) & (low < high)
        steady = np.flatnonzero(self._changing & finite)
        self._sample = np.random.default_rng(0).permutation(steady)[:PAIRS_OF]
        self._blocks = [block for block in np.array_split(steady, min(BLOCKS, len(steady))) if block.size]

    def row(self, codec: str, decoded: NDArray[np.float64], **rest: Any) -> Row:
        """The errors of one coding, in the units of the source."""
        with np.errstate(invalid="ignore"):
            error = np.abs(decoded - self._all)[:, self._changing] / self._sd[self._changing]
        error[~np.isfinite(error)] = 0  # NaN and infinities that came back as such
        unchanged = ~self._changing
        assert np.array_equal(decoded[:, unchanged], self._all[:, unchanged], equal_nan=True), "constants are exact"
        voxels, blocks = self._changes(decoded)
        return Row(
            run=self._name,
            codec=codec,
            max_error_sd=float(error.max(initial=0)),
            rms_error_sd=float(np.sqrt(np.mean(error**2))),
            voxel_dr_max=float(voxels.max()),
            voxel_dr_mean=float(voxels.mean()),
            block_dr_max=float(blocks.max()),
            block_dr_mean=float(blocks.mean()),
            **rest,
        )

    def others(self) -> Iterator[Row]:
        """Codings of z-scores that others use."""
        sd = np.where(self._changing, self._sd, 1)
        with np.errstate(invalid="ignore"):
            z = np.where(self._changing, (self._all - self._mean) / sd, 0)
        half = z.astype(np.float16).astype(np.float64)
        step = np.nanmax(np.abs(np.where(np.isfinite(z), z, 0))) / 127
        coarse = np.rint(z / step) * step
        for name, coded, size in (("fp16-z", half, 2.0), ("global-int8", coarse, 1.0)):
            decoded = np.where(self._changing, coded * sd + self._mean, self._all)
            rest = {"bytes_per_voxel": size, "all_bytes_per_voxel": size, "encode_mb_s": None, "decode_mb_s": None}
            yield self.row(name, decoded, escaped_share=0.0, bound_sd=None, **rest)

    def _changes(self, decoded: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """|change of r| of pairs of voxels, and of pairs of blocks."""
        changes = []
        for series_of in (self._of_voxels, self._of_blocks):
            with np.errstate(invalid="ignore", divide="ignore"):  # a series that was coded to a constant has no r
                before, after = (np.nan_to_num(np.corrcoef(series_of(data).T)) for data in (self._all, decoded))
            upper = np.triu_indices(len(before), k=1)
            changes.append(np.abs(after - before)[upper])
        return changes[0], changes[1]

    def _of_voxels(self, data: NDArray[np.float64]) -> NDArray[np.float64]:
        return data[:, self._sample]

    def _of_blocks(self, data: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([data[:, block].mean(axis=1) for block in self._blocks], axis=1)


def _converted(file: Path, url: Path, codec: Any) -> Dataset:
    report = fmristream.convert(str(file), str(url), options=ConvertOptions(split="none", codec=codec, threads=1))
    assert report.runs == 1
    return fmristream.open(str(url))


def _stored_bytes(dataset: Dataset, name: str | None = None) -> int:
    _, arrays = dataset.arrays_of(0)
    wanted = arrays.values() if name is None else [arrays[name]]
    return sum(file.bytes for array in wanted for file in array.files if not file.name.endswith("zarr.json"))


def _encode(dataset: Dataset, run: Run, values: NDArray[Any], codec: str) -> None:
    lossy = LOSSY_CODECS.get(codec)
    quantizer = None
    if lossy is not None and lossy.takes(values.dtype):
        measure = RangeMeasure(frames=len(values), dtype=values.dtype)
        for frame in values:
            measure.add(frame)
        quantizer = Quantizer(
            codec=lossy, scale=measure.finish(lossy), dtype=values.dtype, slope=run.slope, inter=run.inter
        )
    with RunWriter(
        open_store(f"memory://bench-codecs-{secrets.token_hex(4)}"),
        dataset.space(run),
        frames=len(values),
        dtype=values.dtype,
        slope=run.slope,
        inter=run.inter,
        affine=run.affine,
        tr_s=run.tr_s,
        bulk_digest=dataset.bulk_digest,
        is_raw=codec == "raw",
        quantizer=quantizer,
    ) as writer:
        for frame in values:
            writer.add(frame)  # and leaves without an end: nothing of it stays


def _decode(reader: Any, run: Run) -> None:
    for start in range(0, run.frames, WINDOW):
        reader.read_stored(start, min(start + WINDOW, run.frames))


def _seconds(work: Callable[[], None], rounds: int) -> float:
    """The median of some rounds after a first one."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:] or found)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    columns = ("run", "codec", "B a voxel", "encode MB/s", "decode MB/s", "bound", "max error", "rms error", "escaped")
    columns += ("voxels: max, mean Δr", "blocks: max, mean Δr")
    lines = [_line(columns), "|---" * len(columns) + "|"]
    for row in rows:
        speeds = ["–" if speed is None else f"{speed:,.0f}" for speed in (row.encode_mb_s, row.decode_mb_s)]
        cells = (
            row.run,
            row.codec,
            f"{row.bytes_per_voxel:.2f} ({row.all_bytes_per_voxel:.2f})",
            *speeds,
            "–" if row.bound_sd is None else f"{row.bound_sd:g}",
            f"{row.max_error_sd:.4f}",
            f"{row.rms_error_sd:.4f}",
            f"{row.escaped_share:.1e}",
            f"{row.voxel_dr_max:.5f}, {row.voxel_dr_mean:.6f}",
            f"{row.block_dr_max:.5f}, {row.block_dr_mean:.6f}",
        )
        lines.append(_line(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
