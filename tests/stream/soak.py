"""Run by test_soak in its own process: many batches, and what memory, threads and descriptors do meanwhile."""

import json
import sys

import psutil

from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader


def main(url: str, batches: int, window: int = 7, output: str = "packed") -> None:
    process = psutil.Process()
    clips = StreamingDataset(url, window=window, seed=1, targets=("sex",) if output == "packed" else ())
    seen = []
    with StreamingLoader(clips, batch_size=4, threads=2, output=output) as loader:
        done = 0
        while done < batches:
            for batch in loader:
                assert batch.bold.shape[0] == 4
                done += 1
                if done % 50 == 0:
                    seen.append((done, process.memory_info().rss, process.num_threads(), process.num_fds()))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:4]), *sys.argv[4:5])
