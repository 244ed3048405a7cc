"""What no reader can pass: copying the output, and fetching and decoding its bytes without doing anything with them."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.stream_peers.cases import MASKED, Case, Stream
from tools.stream_peers.data import Facts, Sample
from tools.stream_peers.published import randomly


def memcpy(facts: Facts, case: Case) -> Stream:
    """A window's output copied from another one of eight into a buffer that is used again."""
    shape = (int(facts.mask.sum()),) if case.output == MASKED else facts.shape
    source = np.zeros((8, facts.window, *shape), dtype=np.float16)
    source[...] = 1  # pages of its own, not the kernel's page of zeros
    ring = np.empty((facts.window, *shape), dtype=np.float16)

    def stream(number: int) -> Iterator[Sample]:
        row = 0
        while True:
            np.copyto(ring, source[row])
            row = (row + 1) % len(source)
            yield 0, 0, ring

    return stream


def decode(facts: Facts, case: Case) -> Stream:
    """One `pread` of a window's chunks, blosc of each into a buffer that is used again; their checksums where asked for."""
    import google_crc32c
    from numcodecs import blosc

    import fmristream
    from fmristream.shards.codec import CRC_BYTES
    from fmristream.shards.index import ranges_of

    blosc.use_threads = False
    dataset = fmristream.open(facts.where("ours-lossless"))
    readers = [dataset.reader(dataset.run(number)) for number in range(facts.runs)]
    largest = max(int(reader.lengths.max()) for reader in readers) * facts.window
    buffer = np.empty(largest, dtype=np.uint8)
    out = np.empty((facts.window, readers[0].padded_voxels), dtype=readers[0].run.dtype)
    files: dict[str, int] = {}

    def read(run: int, start: int) -> Any:
        reader, row = readers[run], 0
        array = reader.frames_array
        for part in ranges_of(
            reader.lengths, start=start, stop=start + facts.window, frames_per_shard=array.frames_per_shard
        ):
            path = f"{facts.where('ours-lossless')}/{array.object}/c/{part.shard}/0"
            if path not in files:
                files[path] = os.open(path, os.O_RDONLY)
            got, at = os.preadv(files[path], [buffer[: part.stop - part.start]], part.start), 0
            assert got == part.stop - part.start
            for length in part.lengths:
                payload = buffer[at : at + length - CRC_BYTES]
                if case.variant == "crc":
                    stored = int.from_bytes(buffer[at + length - CRC_BYTES : at + length].tobytes(), "little")
                    assert google_crc32c.value(payload) == stored
                blosc.decompress(payload, out[row])
                at, row = at + length, row + 1
        return out

    return randomly(facts, read)
