"""The same runs in every layout that is read: ours in three codecs, the published ones, those of other loaders."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.stream_peers.data import TFF_CROP, TFF_DROPPED, Facts, name_of

CODECS = ("lossless", "raw", "int8")


def prepare(facts: Facts, layout: str) -> None:
    """Make a layout once; it appears whole or not at all."""
    target = facts.path / layout
    if target.exists():
        return
    part = facts.path / f"{layout}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    MAKERS[layout](facts, part)
    part.rename(target)


def convert_ours(facts: Facts) -> Facts:
    """Our dataset in each codec; the facts with where its runs lie."""
    from fmristream import convert
    from fmristream import open as open_dataset
    from fmristream.ingest.options import ConvertOptions

    objects = {}
    for codec in CODECS:
        url = facts.path / f"ours-{codec}"
        options = ConvertOptions(codec=codec, mask=str(facts.path / "mask.nii"), split="none", space="MNI")
        if not url.exists():
            convert(str(facts.path / "nifti" / "*.nii"), str(url), options=options)
        dataset = open_dataset(str(url))
        objects[codec] = [dataset.run(name_of(run)).object for run in range(facts.runs)]
    return replace(facts, objects=objects)


def frames_of(facts: Facts, run: int) -> Iterator[tuple[int, NDArray[np.float16]]]:
    """(number, (x, y, z) z-scores) of a run's frames, a window in memory at a time."""
    for start in range(0, facts.frames, facts.window):
        for number, frame in enumerate(facts.zscored(run, start, min(start + facts.window, facts.frames))):
            yield start + number, frame


def swift(facts: Facts, folder: Path) -> None:
    """`img/<subject>/frame_<i>.pt`, (x, y, z, 1) float16 each."""
    import torch

    for run in range(facts.runs):
        (folder / "img" / name_of(run)).mkdir(parents=True)
        for number, frame in frames_of(facts, run):
            values = torch.from_numpy(np.ascontiguousarray(frame))[..., None].clone()
            torch.save(values, folder / "img" / name_of(run) / f"frame_{number}.pt")


def tff(facts: Facts, folder: Path) -> None:
    """`<subject>/global_normalize` and `<subject>/per_voxel_normalize`, each `TR_<i>.pt`, (x, y, z, 1) float32, cropped."""
    import torch

    for run in range(facts.runs):
        center, spread, background = global_moments(facts, run)
        mean, inverse = (values[TFF_CROP] for values in facts.moments(run))
        for name in ("global_normalize", "per_voxel_normalize"):
            (folder / name_of(run) / name).mkdir(parents=True)
        for number in range(TFF_DROPPED, facts.frames):
            frame = np.asarray(facts.stored(run)[number])[TFF_CROP].astype(np.float32)
            whole = np.where(frame == 0, background, (frame - center) / spread)
            for name, values in {
                "global_normalize": whole,
                "per_voxel_normalize": np.where(inverse > 0, (frame - mean) * inverse, np.nan),
            }.items():
                saved = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[..., None].clone()
                torch.save(saved, folder / name_of(run) / name / f"TR_{number - TFF_DROPPED}.pt")


def global_moments(facts: Facts, run: int) -> tuple[float, float, float]:
    """(mean, SD, background) of a run's foreground by TFF's rule, in its crop."""
    count, total, squares = 0, 0.0, 0.0
    for frame in facts.stored(run)[TFF_DROPPED:]:
        inside = np.asarray(frame)[TFF_CROP]
        inside = inside[inside != 0].astype(np.float64)
        count, total, squares = count + inside.size, total + inside.sum(), squares + (inside**2).sum()
    mean = total / count
    sd = float(np.sqrt((squares - count * mean**2) / (count - 1)))  # torch's, unbiased
    return mean, sd, -mean / sd  # the least of all values: of those that are 0


def npy(facts: Facts, folder: Path) -> None:
    """A float16 `.npy` (t, x, y, z) for each run."""
    for run in range(facts.runs):
        shape = (facts.frames, *facts.shape)
        target = np.lib.format.open_memmap(folder / f"{name_of(run)}.npy", mode="w+", dtype=np.float16, shape=shape)
        for number, frame in frames_of(facts, run):
            target[number] = frame
        target.flush()


def webdataset(facts: Facts, folder: Path) -> None:
    """Tars of clips, shuffled, about 300 MB each: `.npy` (t, x, y, z) float16 and `.json`."""
    clips = list(facts.clips())
    np.random.default_rng(0).shuffle(clips)
    clip_bytes = facts.window * int(np.prod(facts.shape)) * 2
    each = max(300_000_000 // clip_bytes, 1)
    for shard, first in enumerate(range(0, len(clips), each)):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number, (run, start) in enumerate(clips[first : first + each]):
                values = io.BytesIO()
                np.save(values, facts.zscored(int(run), int(start), int(start) + facts.window))
                about = json.dumps({"run": int(run), "start": int(start)}).encode()
                for kind, data in (("npy", values.getvalue()), ("json", about)):
                    entry = tarfile.TarInfo(f"{first + number:06d}.{kind}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def mosaic(facts: Facts, folder: Path) -> None:
    """MDS shards of clips; runs in MosaicML's environment."""
    from tools.stream_peers.loaders import mosaic_streaming

    shape = ",".join(map(str, (facts.window, *facts.shape)))
    columns = {"bold": f"ndarray:float16:{shape}", "run": "int", "start": "int"}
    with mosaic_streaming().MDSWriter(out=str(folder), columns=columns) as writer:
        for run, start in facts.clips():
            writer.write({"bold": facts.zscored(run, start, start + facts.window), "run": run, "start": start})


def litdata(facts: Facts, folder: Path) -> None:
    """LitData's chunks of 64 MB; runs in its environment."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, (run, start) in enumerate(facts.clips()):
        writer[number] = {"bold": facts.zscored(run, start, start + facts.window), "run": run, "start": start}
    writer.done()
    writer.merge(1)


def zarr_default(facts: Facts, folder: Path) -> None:
    """Whole volumes as zarr-python stores an array by default: its chunks, its compressor, no shards."""
    import zarr

    for run in range(facts.runs):
        path = folder / f"{name_of(run)}.zarr"
        array = zarr.create_array(str(path), shape=(facts.frames, *facts.shape), dtype="int16", chunks="auto")
        array[...] = np.asarray(facts.stored(run))


MAKERS: dict[str, Callable[[Facts, Path], None]] = {
    "swift": swift,
    "tff": tff,
    "npy": npy,
    "webdataset": webdataset,
    "mosaic": mosaic,
    "litdata": litdata,
    "zarr-default": zarr_default,
}
