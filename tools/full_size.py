"""The published SwiFT at full size, end to end on this machine: what it costs to convert, stream and take three steps.

    python tools/full_size.py OUT

Writes two 91 x 109 x 91 x 1,200-frame runs as fMRIPrep derivatives (1.5 GB of .nii.gz), converts them, and trains
`swift_sex` (96^3 x 20 frames) for three steps on the CPU.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE, FRAMES, WINDOW, BATCH, STEPS = "91x109x91", 1200, 20, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder with 3 GB of room; what is there already is used again")
    out = parser.parse_args(arguments).out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    source, dataset, run = out / "derivatives", out / "dataset", out / f"run-{os.getpid()}"
    if not (out / "split.csv").exists():
        synth = [ROOT / "tools" / "synth.py", source, "--derivatives", "--masked", "--subjects", 2, "--shape", SHAPE]
        timed([sys.executable, *synth, "--frames", FRAMES])
        (out / "split.csv").write_text("subject,split\n0001,train\n0002,train\n")
    if not (dataset / "generations").exists():
        seconds = timed([sys.executable, "-m", "fmristream", "convert", source, dataset, "--split", out / "split.csv"])
        megabytes = 2 * 91 * 109 * 91 * 2 * FRAMES / 1e6
        print(f"convert: {seconds:.1f} s, {megabytes / seconds:.0f} MB/s of decompressed int16, {peak()}")
    settings = [
        "train.steps=3",
        f"train.batch_size={BATCH}",
        "data.val_split=",
        "data.test_split=",
        "train.eval_every=0",
    ]
    changes = [word for setting in [f"data.url={dataset}", *settings] for word in ("--set", setting)]
    timed([sys.executable, "-m", "train", "swift_sex", *changes, "--out", run])
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["event"] == "step"]
    assert len(steps) == STEPS
    seconds = statistics.median(step["seconds"] for step in steps)
    wait = statistics.median(step["wait_s"] for step in steps)
    print(
        f"train: {seconds:.2f} s a step of {BATCH} clips, {BATCH * WINDOW / seconds:.1f} frames/s, {wait:.3f} s of it waiting"
    )
    print(f"train: {peak()}; losses {', '.join(format(step['loss'], '.4f') for step in steps)}")
    return 0


def timed(command: Sequence[object]) -> float:
    """Run a command of this checkout; its seconds."""
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def peak() -> str:
    """The largest memory that a finished child had."""
    return f"peak RSS of any process so far {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
