"""What a collection costs to convert: core-hours and bytes for 1,000 runs, from one run of its size on this machine.

    python -m tools.cost OUT [--frames 120] [--json RESULT.json]

Makes a run of each size (BOLD-like noise, a quarter of the volume in the mask, gzip -6), converts it with one thread in a
process that has warmed up, with its mask and without one, and scales by frames: nothing in a conversion grows faster. CPU
time is that of everything `convert` does, from listing the source to the commit.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tools.bench_convert import machine, made_run

_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the runs of a collection are."""

    name: str
    shape: tuple[int, int, int]
    frames: int
    dtype: str


# From the collections' own documentation; shapes of fMRIPrep are those of its 2 mm template.
SIZES = (
    Size(name="HCP Young Adult, rest (MNINonLinear)", shape=(91, 109, 91), frames=1200, dtype="float32"),
    Size(name="UK Biobank, field 20227, cleaned", shape=(88, 88, 64), frames=490, dtype="float32"),
    Size(name="fMRIPrep, 2 mm, 10 min at TR 2 s", shape=(97, 115, 97), frames=300, dtype="float32"),
    Size(name="raw BIDS, 3.5 mm, 10 min at TR 2 s", shape=(64, 64, 36), frames=300, dtype="int16"),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run takes, scaled to its whole length."""

    size: Size
    source_bytes: float
    stored_bytes: float
    cpu_s: float  # the mask is there
    cpu_without_mask_s: float  # it is found in a pass of its own
    wall_s: float  # one thread, the mask is there


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder on the disk to be measured; runs made are kept there")
    parser.add_argument("--frames", type=int, default=120, help="of the run that is measured (default: %(default)s)")
    parser.add_argument("--sizes", nargs="*", metavar="XxYxZxT", help="others, float32, instead of those known")
    parser.add_argument("--json", type=Path, metavar="PATH")
    chosen = parser.parse_args(arguments)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = machine(out)
    costs = [cost_of(size, out, frames=chosen.frames) for size in _sizes(chosen.sizes)]
    print_costs(costs)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": facts, "costs": [asdict(cost) for cost in costs]}, indent=1))
    return 0


def _sizes(words: Sequence[str] | None) -> Sequence[Size]:
    if not words:
        return SIZES
    numbers = [tuple(int(number) for number in word.split("x")) for word in words]
    return [
        Size(name=word, shape=(x, y, z), frames=t, dtype="float32")
        for word, (x, y, z, t) in zip(words, numbers, strict=True)
    ]


def cost_of(size: Size, out: Path, *, frames: int) -> Cost:
    """Convert one run of a size, of so many frames, and scale."""
    import nibabel

    run = made_run(out, size.dtype, size.shape, frames)
    mask = out / f"{Path(run.path).name}.mask.nii.gz"
    affine = nibabel.load(run.path).affine
    nibabel.save(nibabel.Nifti1Image(np.load(run.mask).astype(np.uint8), affine), mask)
    target = out / "cost"
    measured = {choice: _converted(run.path, target, mask=choice) for choice in (str(mask), "auto")}
    stored = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.rmtree(target)
    scale = size.frames / frames
    return Cost(
        size=size,
        source_bytes=Path(run.path).stat().st_size * scale,
        stored_bytes=stored * scale,
        cpu_s=measured[str(mask)][0] * scale,
        cpu_without_mask_s=measured["auto"][0] * scale,
        wall_s=measured[str(mask)][1] * scale,
    )


def _converted(source: str, target: Path, *, mask: str) -> tuple[float, float]:
    """(CPU seconds, seconds) of a conversion, after one that warms up: the median of some."""
    from fmristream.ingest.convert import convert
    from fmristream.ingest.options import ConvertOptions

    options = ConvertOptions(mask=mask, split="none", threads=1)
    seconds = []
    for _ in range(_ROUNDS + 1):
        shutil.rmtree(target, ignore_errors=True)
        cpu, wall = time.process_time(), time.perf_counter()
        convert(source, str(target), options=options)
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    return statistics.median(cpu for cpu, _ in seconds[1:]), statistics.median(wall for _, wall in seconds[1:])


def print_costs(costs: Sequence[Cost]) -> None:
    """One row a collection."""
    print("For 1,000 runs, on one core:\n")
    print("| collection | run | source | stored | core-hours, masks given | core-hours, masks to be found |")
    print("|---|---|---|---|---|---|")
    for cost in costs:
        shape = " × ".join(map(str, (*cost.size.shape, cost.size.frames)))
        print(
            f"| {cost.size.name} | {shape}, {cost.size.dtype} | {cost.source_bytes / 1e9:,.2f} TB | "
            f"{cost.stored_bytes / 1e9:,.2f} TB | {cost.cpu_s / 3.6:,.2f} | {cost.cpu_without_mask_s / 3.6:,.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
