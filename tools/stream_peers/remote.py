"""Windows through a web server that is far away."""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tools.stream_peers.cases import Case, Stream
from tools.stream_peers.data import Facts, Sample, draw, name_of
from tools.stream_peers.ours import Normalizer, batch_of, streaming
from tools.stream_peers.published import Read, randomly
from tools.stream_peers.same_layout import tensorstore_arrays, zarr_arrays


def ours(facts: Facts, case: Case) -> Stream:
    """One window is due, the bound on bytes lets in the others; 0: as the loader decides."""
    batch = batch_of(case)
    bound = {"prefetch_bytes": (case.in_flight - batch) * window_bytes(facts, case)} if case.in_flight else {}
    return streaming(facts, case, url=facts.where(case.layout), threads=case.threads, batch=batch, ahead=2, **bound)


def window_bytes(facts: Facts, case: Case) -> int:
    """Stored bytes of the frames of a window, on average, and a tenth more: the largest windows shall fit, too."""
    shards = (facts.path / case.layout).glob("**/c/*/0")
    return int(sum(path.stat().st_size for path in shards) / (facts.runs * facts.frames) * facts.window * 1.1)


def tensorstore(facts: Facts, case: Case) -> Stream:
    """Futures of so many windows; normalised in order."""
    arrays, moments = tensorstore_arrays(facts, case)
    normalize = Normalizer(facts, moments, case.output)

    def stream(number: int) -> Iterator[Sample]:
        under_way: deque[tuple[int, int, Any]] = deque()
        for run, start in draw(facts, number):
            under_way.append((run, start, arrays[run][start : start + facts.window].read()))
            if len(under_way) == case.in_flight:
                run, start, reading = under_way.popleft()
                yield run, start, normalize(reading.result(), run)

    return stream


def zarr_python(facts: Facts, case: Case) -> Stream:
    """So many threads over arrays of zarr's FsspecStore; normalised in order."""
    arrays, moments = zarr_arrays(facts, case)
    normalize = Normalizer(facts, moments, case.output)
    return ahead(facts, case, lambda run, start: arrays[run][start : start + facts.window], normalize)


def ahead(facts: Facts, case: Case, read: Read, normalize: Normalizer) -> Stream:
    """Windows that are read by as many threads as are in flight."""

    def stream(number: int) -> Iterator[Sample]:
        under_way: deque[tuple[int, int, Future[Any]]] = deque()
        with ThreadPoolExecutor(case.in_flight) as threads:
            for run, start in draw(facts, number):
                under_way.append((run, start, threads.submit(read, run, start)))
                if len(under_way) == case.in_flight:
                    run, start, reading = under_way.popleft()
                    yield run, start, normalize(reading.result(), run)

    return stream


def fsspec_sync(facts: Facts, case: Case) -> Stream:
    """One range request a window by fsspec, decoded and normalised as we do it."""
    import fsspec

    import fmristream
    from fmristream.shards import codec
    from fmristream.shards.index import ranges_of

    files: Any = fsspec.filesystem("http")
    dataset = fmristream.open(facts.where(case.layout))
    readers = [dataset.reader(name_of(number)) for number in range(facts.runs)]
    normalize = Normalizer(facts, [reader.moments for reader in readers], case.output)
    voxels = readers[0].run.voxels
    scratch = np.empty((facts.window, readers[0].padded_voxels), dtype=readers[0].run.dtype)

    def read(run: int, start: int) -> Any:
        reader, row = readers[run], 0
        array = reader.frames_array
        for part in ranges_of(
            reader.lengths, start=start, stop=start + facts.window, frames_per_shard=array.frames_per_shard
        ):
            url = f"{facts.where(case.layout)}/{array.object}/c/{part.shard}/0"
            data, at = memoryview(files.cat_file(url, start=part.start, end=part.stop)), 0
            for length in part.lengths:
                codec.decode_into(data[at : at + length], scratch[row], what=url)
                at, row = at + length, row + 1
        return normalize(scratch[:, :voxels], run)

    return randomly(facts, read)


def swift(facts: Facts, case: Case) -> Stream:
    """SwiFT's files by fsspec: the frames of a window at once, each loaded and stacked."""
    import fsspec
    import torch

    torch.set_num_threads(case.threads)
    files: Any = fsspec.filesystem("http")

    def read(run: int, start: int) -> Any:
        folder = f"{facts.where('swift')}/img/{name_of(run)}"
        urls = [f"{folder}/frame_{number}.pt" for number in range(start, start + facts.window)]
        found = files.cat(urls, batch_size=facts.window)
        return torch.stack([torch.load(io.BytesIO(found[url]))[..., 0] for url in urls])

    return randomly(facts, read)
