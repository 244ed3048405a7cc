"""Windows out of layouts that papers and their code use: a file per frame, NIfTI, `.npy`, Zarr as it comes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.stream_peers.cases import Case, Stream
from tools.stream_peers.data import TFF_DROPPED, Facts, Sample, draw, name_of

Read = Callable[[int, int], Any]


def randomly(facts: Facts, read: Read, *, first: int = 0) -> Stream:
    """Random windows, one after the other."""

    def stream(number: int) -> Iterator[Sample]:
        for run, start in draw(facts, number, first=first):
            yield run, start, read(run, start)

    return stream


def swift(facts: Facts, case: Case) -> Stream:
    """SwiFT's `load_sequence`: a `torch.load` per frame, joined along time; or the same frames put together better."""
    import torch

    torch.set_num_threads(case.threads)
    folder, window = facts.where("swift"), facts.window
    ring = torch.empty((window, *facts.shape), dtype=torch.float16)

    def frames(run: int, start: int) -> list[Any]:
        return [torch.load(f"{folder}/img/{name_of(run)}/frame_{number}.pt") for number in range(start, start + window)]

    def verbatim(run: int, start: int) -> Any:
        return torch.cat([frame.unsqueeze(0) for frame in frames(run, start)], dim=4)

    def stacked(run: int, start: int) -> Any:
        return torch.stack([frame[..., 0] for frame in frames(run, start)])

    def reused(run: int, start: int) -> Any:
        for row, frame in enumerate(frames(run, start)):
            ring[row].copy_(frame[..., 0])
        return ring

    return randomly(facts, {"verbatim": verbatim, "stacked": stacked, "reused": reused}[case.variant])


def tff(facts: Facts, case: Case) -> Stream:
    """TFF's: a `torch.load` per frame of each copy, joined along time, NaN to 0, then the two as channels."""
    import torch

    torch.set_num_threads(case.threads)
    folder, window = facts.where("tff"), facts.window

    def copy(run: int, start: int, name: str) -> Any:
        first = start - TFF_DROPPED
        frames = [torch.load(f"{folder}/{name_of(run)}/{name}/TR_{n}.pt") for n in range(first, first + window)]
        return torch.cat([frame.unsqueeze(0) for frame in frames], dim=4)

    def read(run: int, start: int) -> Any:
        voxelwise = copy(run, start, "per_voxel_normalize")
        voxelwise[voxelwise != voxelwise] = 0
        return torch.cat([copy(run, start, "global_normalize"), voxelwise], dim=0)

    return randomly(facts, read, first=TFF_DROPPED)


def normalized(facts: Facts, values: NDArray[Any], run: int) -> NDArray[np.float16]:
    """(x, y, z, t) stored values as (t, x, y, z) z-scores: what somebody with numpy writes."""
    mean, inverse = facts.moments(run)
    z = (np.asarray(values, dtype=np.float32) - mean[..., None]) * inverse[..., None]
    return np.ascontiguousarray(z.transpose(3, 0, 1, 2).astype(np.float16))


def nibabel_gz(facts: Facts, case: Case) -> Stream:
    """`nibabel.load(path).dataobj[..., a:b]` of a `.nii.gz`: everything before is decompressed each time."""
    import nibabel

    def read(run: int, start: int) -> Any:
        image: Any = nibabel.load(facts.nifti(run, gzipped=True))
        return normalized(facts, image.dataobj[..., start : start + facts.window], run)

    return randomly(facts, read)


def nibabel_mmap(facts: Facts, case: Case) -> Stream:
    """The same of a `.nii`, memory-mapped."""
    import nibabel

    arrays: list[Any] = [np.asanyarray(nibabel.load(facts.nifti(run), mmap="r").dataobj) for run in range(facts.runs)]
    assert all(isinstance(array, np.memmap) for array in arrays)
    return randomly(facts, lambda run, start: normalized(facts, arrays[run][..., start : start + facts.window], run))


def indexed_gzip(facts: Facts, case: Case) -> Stream:
    """`nibabel` over indexed_gzip, with the whole index built beforehand."""
    import indexed_gzip as igzip
    import nibabel
    from nibabel.fileholders import FileHolder

    images: list[Any] = []
    for run in range(facts.runs):
        file = igzip.IndexedGzipFile(str(facts.nifti(run, gzipped=True)))
        file.build_full_index()
        images.append(nibabel.Nifti1Image.from_file_map({"image": FileHolder(fileobj=file)}))
    return randomly(
        facts, lambda run, start: normalized(facts, images[run].dataobj[..., start : start + facts.window], run)
    )


def npy(facts: Facts, case: Case) -> Stream:
    """Float16 z-scores, memory-mapped; copied, because what a model gets must not be the page cache."""
    folder = facts.where("npy")
    arrays = [np.load(f"{folder}/{name_of(run)}.npy", mmap_mode="r") for run in range(facts.runs)]
    ring = np.empty((facts.window, *facts.shape), dtype=np.float16)

    def reused(run: int, start: int) -> Any:
        np.copyto(ring, arrays[run][start : start + facts.window])
        return ring

    if case.variant == "reused":
        return randomly(facts, reused)
    return randomly(facts, lambda run, start: np.array(arrays[run][start : start + facts.window]))


def zarr_default(facts: Facts, case: Case) -> Stream:
    """Whole volumes in zarr-python's own chunks."""
    import zarr

    configure_zarr(case)
    folder = facts.where("zarr-default")
    arrays: list[Any] = [zarr.open_array(f"{folder}/{name_of(run)}.zarr", mode="r") for run in range(facts.runs)]

    def read(run: int, start: int) -> Any:
        return normalized(facts, np.moveaxis(arrays[run][start : start + facts.window], 0, -1), run)

    return randomly(facts, read)


def configure_zarr(case: Case) -> None:
    """As many threads as the case may use; zarrs' pipeline where it is wanted."""
    import zarr

    zarr.config.set({"threading.max_workers": case.threads})
    if case.variant == "zarrs":
        import zarrs  # noqa: F401 - registers its pipeline

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
