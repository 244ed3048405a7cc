"""Run by test_full_disk in its own process: streams over a cache on a tiny file system, and tells what became of it."""

import json
import logging
import os
import sys
from pathlib import Path

import google_crc32c
import torch

from fmristream.storage.cache import CachedStore
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader


class Told(logging.Handler):
    """What the library said."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def batches(url: str, **options) -> tuple[list[torch.Tensor], StreamingDataset]:
    clips = StreamingDataset(url, window=7, seed=1, **options)
    with StreamingLoader(clips, batch_size=4, threads=2) as loader:
        return [batch.packed.clone() for batch in loader], clips


def is_whole(path: Path) -> bool:
    data = path.read_bytes()
    return int(google_crc32c.value(data[:-4])).to_bytes(4, "little") == data[-4:]


def main(url: str, folder: str) -> None:
    told = Told()
    logging.getLogger("fmristream").addHandler(told)
    expected, _ = batches(url)
    passes = []
    for _ in range(2):
        found, clips = batches(url, cache=folder, cache_bytes=2**30)
        assert isinstance(clips.dataset.store, CachedStore)
        same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        passes.append({"same": same, "hits": clips.dataset.store.cache.hits, "told": list(told.texts)})
        told.texts.clear()
    files = [path for path in Path(folder).glob("??/*") if path.is_file()]
    left = os.statvfs(folder)
    print(
        json.dumps(
            {
                "passes": passes,
                "files": len(files),
                "whole": sum(map(is_whole, files)),
                "unfinished": len(list((Path(folder) / "tmp").iterdir())),
                "free_bytes": left.f_bavail * left.f_frsize,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
