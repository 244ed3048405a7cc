"""What a catalogue of many runs costs: plan, commit, tables, index, `info` and `open`. No voxels: runs are made up.

    python tools/bench_catalogue.py OUT --runs 100000

Every row is what a real conversion would write (random digests, sizes and lengths, 550 frames a run); the objects of the
runs themselves are not there. `open` and `info` run in processes of their own, whose private memory is read from Linux.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmristream.catalog.run import StoredArray, StoredFile
from fmristream.catalog.tables import Participant
from fmristream.ingest.commit import Addition, Converted, commit_addition
from fmristream.ingest.execute import Engine
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.options import ConvertOptions, MaskChoice
from fmristream.ingest.pending import FinishedRun
from fmristream.ingest.plan import plan_spaces
from fmristream.ingest.run_stream import RunHeader
from fmristream.ingest.sources import SourceRun
from fmristream.ingest.splitting import split_record, split_subjects
from fmristream.ingest.tasks import SurveyedRun
from fmristream.shards.hashing import NEW_BULK_DIGEST
from fmristream.storage import open_store

FRAMES = 550  # the mean of 55 million frames in 100,000 runs
SHAPE = (91, 109, 91)
VOXELS = 235375
AFFINE = ((-2.0, 0.0, 0.0, 90.0), (0.0, 2.0, 0.0, -126.0), (0.0, 0.0, 2.0, -72.0), (0.0, 0.0, 0.0, 1.0))
CHUNK_BYTES = (290_000, 330_000)

# Printed by a process that does one thing, with its own seconds and private memory.
PROBE = """
import json, sys, time
started = time.monotonic()
{body}
seconds = time.monotonic() - started
private = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private"))
print(json.dumps({{"s": seconds, "private_mb": private / 1000}}))
"""
OPEN = "import fmristream; ds = fmristream.open({url!r}); ds.run(len(ds.runs) // 2); ds.arrays_of(0)"
# Everything up to which frames of which run each sample of the first batch is; torch and kernels are not in it.
PLAN = """import fmristream
from fmristream.sampling.deal import Schedule, World
from fmristream.sampling.order import Locality
ds = fmristream.open({url!r})
clips = fmristream.StreamingDataset(
    ds, window=20, stride=1, seed=7, where="age > 40 and task == 'rest' and site in ('a', 'b')"{more}
)
rows = clips.rows(Schedule(order=clips.order, batch_size=64).batch(10**9, World()))
assert len(rows) == 64 * clips.views
"""
MORE = ", random_phase=True, weights='column:sex', views='same-subject', locality=8"
INFO = "from fmristream.report.info import describe; import fmristream; describe(fmristream.open({url!r}))"


def main() -> None:
    """Make the catalogue and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out}: exists; name a new folder")
    figures = measure(arguments.out, arguments.runs)
    if not os.environ.get("KEEP"):
        shutil.rmtree(arguments.out)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:24} {value:12,.3f}" if isinstance(value, float) else f"{name:24} {value:12,}")


def measure(out: Path, count: int) -> dict[str, Any]:
    """Seconds, bytes and megabytes by name."""
    draw = random.Random(0)
    url = str(out)
    surveyed = [_surveyed(number, draw) for number in range(count)]
    figures: dict[str, Any] = {"runs": count, "frames": count * FRAMES}
    with _timed(figures, "plan_s"):
        parts, _ = split_subjects((run.source for run in surveyed), ConvertOptions())
        with Engine(1) as engine:
            plan = plan_spaces(surveyed, MaskChoice.parse("none"), engine)
    (space,) = plan.spaces.values()
    converted = [Converted(surveyed=run, finished=_finished(space.digest, draw)) for run in surveyed]
    addition = Addition(
        converted=converted, parts=parts, spaces=plan.spaces, split=split_record("hash", ConvertOptions()),
        mask={"frames": 0, "kind": "none"}, parameters=ConvertOptions().parameters, headers={}, codec={"name": "lossless"},
        bulk_digest=NEW_BULK_DIGEST, participants=[_participant(run.source.subject, draw) for run in surveyed[::2]],
    )  # fmt: skip
    with _timed(figures, "commit_s"):
        commit_addition(open_store(url), None, addition)
    sizes = {folder: sum(file.stat().st_size for file in (out / folder).iterdir()) for folder in ("tables", "index")}
    figures |= {
        "tables_bytes": sizes["tables"],
        "tables_bytes_a_run": sizes["tables"] / count,
        "index_bytes_a_frame": sizes["index"] / (count * FRAMES),
    }
    probes = {
        "nothing": "import pyarrow.parquet, numpy",
        "open": OPEN,
        "first_batch": PLAN.replace("{more}", ""),
        "first_batch_all": PLAN.replace("{more}", MORE),
        "info": INFO,
    }
    for name, body in probes.items():
        runs = [_probe(body.format(url=url)) for _ in range(3)]
        figures |= {f"{name}_s": sorted(run["s"] for run in runs)[1], f"{name}_private_mb": runs[-1]["private_mb"]}
    return figures


class _timed:
    def __init__(self, figures: dict[str, Any], name: str) -> None:
        self._figures, self._name = figures, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._figures[self._name] = time.monotonic() - self._started


def _probe(body: str) -> dict[str, float]:
    command = [sys.executable, "-c", PROBE.format(body=body)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


def _surveyed(number: int, draw: random.Random) -> SurveyedRun:
    subject, session = f"{1_000_000 + number // 2}", str(number % 2 + 1)
    name = f"sub-{subject}_ses-{session}_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold"
    source = SourceRun(
        key=f"sub-{subject}/ses-{session}/func/{name}.nii.gz", name=name, url=f"/nowhere/{name}.nii.gz",
        subject=subject, session=session, task="rest", space="MNI152NLin2009cAsym", tr_s=0.735,
    )  # fmt: skip
    header = RunHeader(
        shape=SHAPE, frames=FRAMES, dtype=np.dtype("<i2"), slope=1.0, inter=0.0, affine=AFFINE, tr_s=0.735, space="MNI"
    )
    size = draw.randint(300_000_000, 500_000_000)
    return SurveyedRun(source=source, header=header, space=source.space, tr_s=0.735, source_bytes=size)


def _participant(subject: str, draw: random.Random) -> Participant:
    """A row of the participants table; an age in ten is missing."""
    age = None if draw.random() < 0.1 else float(draw.randint(20, 80))
    return {"subject": subject, "age": age, "sex": draw.choice("FM"), "site": draw.choice("abc")}


def _finished(space_digest: str, draw: random.Random) -> FinishedRun:
    identity = draw.randbytes(8).hex()
    lengths = np.array([draw.randint(*CHUNK_BYTES) for _ in range(FRAMES)], dtype="<u4")
    scalars = {
        "residual_wraps": False, "valid_min": float(draw.randint(-50, 0)), "valid_max": float(draw.randint(9000, 30000)),
        "nonfinite": 0, "foreground_count": draw.randint(129_000_000, 129_456_250), "foreground_mean": draw.random() * 1e4,
        "foreground_sd": draw.random() * 3e3, "foreground_min": float(draw.randint(-50, 0)),
        "foreground_max": float(draw.randint(9000, 30000)),
    }  # fmt: skip
    return FinishedRun(
        object=f"runs/{identity}.zarr", digest=draw.randbytes(32).hex(), space_digest=space_digest, scalars=scalars,
        outside=0, arrays=tuple(_arrays(identity, space_digest, int(lengths.sum()), draw)), lengths=lengths.tobytes(),
        source=Fingerprint(size=draw.randint(300_000_000, 500_000_000), crc=f"gz:{draw.randbytes(4).hex()}:992892"),
    )  # fmt: skip


def _arrays(identity: str, space_digest: str, shard_bytes: int, draw: random.Random) -> Iterator[StoredArray]:
    folder = f"runs/{identity}.zarr"

    def file(name: str, size: int) -> StoredFile:
        return StoredFile(name=name, bytes=size + draw.randint(0, size // 20), digest=draw.randbytes(32).hex())

    make: Callable[..., StoredArray] = StoredArray
    files = (file("c/0/0", shard_bytes), file("zarr.json", 1250))
    yield make(
        name="residual", object=f"{folder}/residual", space_digest=space_digest, dtype="<i2", encoding="difference",
        shape=(FRAMES, VOXELS), frames_per_shard=FRAMES, files=files,
    )  # fmt: skip
    for name, dtype, shape, size in (
        ("reference", "<i2", (VOXELS,), 370_000),
        ("moments", "<f2", (2, VOXELS), 770_000),
    ):
        chunk = "/".join(["c", *("0" for _ in shape)])
        yield make(
            name=name, object=f"{folder}/{name}", space_digest=space_digest, dtype=dtype, encoding="direct", shape=shape,
            files=(file(chunk, size), file("zarr.json", 900)),
        )  # fmt: skip
    yield make(
        name="stats", object=f"stats/{identity}", space_digest=space_digest, dtype="<f4", encoding="blob",
        shape=(2, VOXELS), files=(file("", 1_370_000),),
    )  # fmt: skip
    yield make(
        name="", object=folder, space_digest=space_digest, dtype="<i2", encoding="group", shape=(),
        files=(file("zarr.json", 1150),),
    )  # fmt: skip


if __name__ == "__main__":
    main()
