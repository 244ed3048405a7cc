"""Run by test_local_copy in its own process: streams two epochs, and tells every file that was opened for writing."""

import json
import os
import sys
from pathlib import Path

opened: list[str] = []
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITING):
            opened.append(str(path))
    elif event in ("os.rename", "os.mkdir", "os.link", "os.truncate"):
        opened.append(str(arguments[0]))


def main(url: str, cache: str) -> None:
    from fmristream.stream.clips import StreamingDataset
    from fmristream.stream.loader import StreamingLoader

    clips = StreamingDataset(url, window=7, seed=1, **({"cache": cache} if cache else {}))
    kept = set()
    first = []
    with StreamingLoader(clips, batch_size=4, threads=2) as loader:
        for batch in loader:
            first.append(float(batch.packed.double().sum()))
        asked = loader.counts.requests
        for _ in loader:
            for number in os.listdir("/proc/self/fd"):
                try:
                    said = Path(f"/proc/self/fdinfo/{number}").read_text()
                    flags = int(said.split("flags:")[1].split()[0], 8)
                    target = os.readlink(f"/proc/self/fd/{number}")
                except OSError:
                    continue
                if flags & (os.O_WRONLY | os.O_RDWR) and target.startswith("/"):
                    kept.add(target)
        again = loader.counts.requests - asked
    print(json.dumps({"opened": opened, "descriptors": sorted(kept), "sums": first, "asked": asked, "again": again}))


if __name__ == "__main__":
    sys.addaudithook(_watch)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
