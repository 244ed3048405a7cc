"""Tables that several threads decode at once: the loader's readers share those of one dataset."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from fmristream.catalog.run import StoredArray, StoredFile
from fmristream.catalog.tables import ArraysEncoder, ArraysFile

_THREADS = 8
_GROUPS, _ROWS = 24, 40


def _array(number: int) -> StoredArray:
    return StoredArray(
        name="voxels",
        object=f"{number:032x}",
        space_digest="ab" * 32,
        dtype="int16",
        encoding="residual",
        shape=(number, 5),
        files=(StoredFile(name="zarr.json", bytes=number, digest=f"{number:012x}"),),
    )


def test_threads_may_share_a_table():
    encoder = ArraysEncoder(bulk_digest="blake3")
    for group in range(_GROUPS):
        encoder.add([(row, _array(row)) for row in range(group * _ROWS, (group + 1) * _ROWS)])
    data = encoder.finish()
    rows = range(0, _GROUPS * _ROWS, 7)
    for _ in range(10):
        file, start = ArraysFile(data, bulk_digest="blake3"), Barrier(_THREADS)

        def read(_: int, file: ArraysFile = file, start: Barrier = start) -> list[StoredArray]:
            start.wait()
            return file.arrays(rows)

        with ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(read, range(_THREADS)):
                assert found == [_array(row) for row in rows]
